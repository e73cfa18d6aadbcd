"""Laws of numbers: gradients, plain against fast, cost, compilers, low precision, limits, seeds."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from armillary.base.errors import ArmillaryError
from armillary.nn.context import Context
from armillary.nn.cost import count
from armillary.nn.example import Example, Limit
from armillary.nn.ops import plain_ops
from armillary.nn.training import Training
from armillary.testing.cases import Case, NotApplicable, Trial
from armillary.testing.compare import near, require, same, slopes_near

BF16_ERROR = 0.03  # root mean square, relative: a few roundings to 8 bits of a few intermediate results


def gradient(case: Case) -> None:
    """gradcheck in float64: by every input, and by all parameters at once along random directions."""
    trial = Trial(case, batch=2, length=4, dtype=torch.float64, source=3)
    names = [name for name, _ in trial.module.named_parameters()]
    memory = [] if trial.memory is None else [trial.memory.hidden]

    def call(x: Tensor, *rest: Tensor) -> Any:
        ctx = trial.ctx()
        if trial.memory is not None:
            ctx = ctx.replace(memory=type(trial.memory)(rest[0]))
        weights = dict(zip(names, rest[len(memory) :], strict=False))
        return torch.func.functional_call(trial.module, weights, (x, ctx))

    def free(tensors: list[Tensor]) -> list[Tensor]:
        return [tensor.detach().clone().requires_grad_() for tensor in tensors]

    _gradcheck(call, free([trial.x, *memory]), fast=False)
    _gradcheck(call, free([trial.x, *memory, *trial.parameters()]), fast=True)
    if case.extends and not case.reads:
        first = max(2, trial.first())

        def chunks(x: Tensor) -> Tensor:
            state = trial.state()
            return torch.cat([trial.extend(state, x[:, :first], 0), trial.extend(state, x[:, first:], first)], 1)

        if first < trial.length:
            _gradcheck(chunks, free([trial.x]), fast=True)


def _gradcheck(call: Callable[..., Tensor], inputs: list[Tensor], fast: bool) -> None:
    try:
        torch.autograd.gradcheck(call, inputs, fast_mode=fast, check_undefined_grad=False)
    except RuntimeError as error:
        require(False, f"gradcheck: {str(error).strip().splitlines()[0]}")


def plain(case: Case) -> None:
    """The fast forms give the numbers and gradients of the plain ones."""
    for length in (20, 5):
        trial = Trial(case, length=length)
        variants: list[dict[str, Any]] = [{}]
        if case.mixes and not case.cross and case.can.packed:
            variants.append({"documents": (torch.arange(length) >= length // 3).long().expand(3, -1)})
        if case.mixes and not case.cross and case.can.padding:
            variants.append({"padding": torch.arange(length) < torch.tensor([length, length - 2, length - 1])[:, None]})
        for fields in variants:
            with torch.no_grad(), plain_ops():
                expected = trial.whole(**fields)
            with torch.no_grad():
                near(trial.whole(**fields), expected, f"without gradients, {length} tokens, {', '.join(fields)}")
            found = _run(trial, **fields)
            with plain_ops():
                wanted = _run(trial, **fields)
            _compare(trial, found, wanted, f"{length} tokens, {', '.join(fields)}", 2e-4)


def _run(trial: Trial, call: Callable[..., Tensor] | None = None, **fields: Any) -> list[Tensor]:
    """Output, gradient of x and of every parameter (zeros where it takes no part)."""
    x = trial.x.clone().requires_grad_()
    y = (trial.module if call is None else call)(x, trial.ctx(**fields))
    generator = torch.Generator().manual_seed(5)
    weights = torch.randn(y.shape, generator=generator).to(y.dtype)
    wanted: list[Tensor] = [x, *trial.parameters()]
    slopes = torch.autograd.grad((y * weights).sum(), wanted, allow_unused=True)
    return [y.detach(), *(torch.zeros_like(w) if s is None else s for w, s in zip(wanted, slopes, strict=True))]


def _compare(trial: Trial, found: list[Tensor], expected: list[Tensor], what: str, tolerance: float) -> None:
    """Outputs and gradients as `_run` gives them."""
    near(found[0], expected[0], f"output, {what}", tolerance)
    slopes_near(trial.module, found[1:], expected[1:], what, tolerance)


def cost(case: Case) -> None:
    """Declared FLOPs and state bytes are within 2% of counted ones, at two lengths and two widths."""
    for width in (16, 32):
        for length in (15, 32):
            trial = Trial(case, batch=1, length=length, width=width, source=length)
            declared = case.cost(width, length, 4)
            counted = count(trial.whole)
            require(
                abs(declared.flops - counted) <= 0.02 * counted,
                f"width {width}, {length} tokens: declared {declared.flops:.0f} FLOPs, counted {counted:.0f}",
            )
            if case.reads:
                continue
            nbytes = 0
            if case.extends:
                with torch.no_grad():
                    state = trial.state(capacity=length)
                    trial.fill(state, length)
                    nbytes = 0 if state is None else state.nbytes
            require(
                abs(declared.state_bytes - nbytes) <= 0.02 * nbytes,
                f"width {width}, {length} tokens: declared {declared.state_bytes:.0f} state bytes, counted {nbytes}",
            )


def graph(case: Case) -> None:
    """Compiled into one graph (aot_eager), forward and backward are unchanged."""
    _compiled(case, "aot_eager", 1e-5)


def compiler(case: Case) -> None:
    """Through the full compiler, forward and backward are unchanged."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX") or "c++", "g++", "clang++")):
        raise NotApplicable("there is no C++ compiler here")
    _compiled(case, "inductor", 1e-4)


def _compiled(case: Case, backend: str, tolerance: float) -> None:
    trial = Trial(case, length=18)
    expected = _run(trial)
    torch._dynamo.reset()
    try:
        found = _run(trial, torch.compile(trial.module, backend=backend, fullgraph=True, dynamic=False))
    except torch._dynamo.exc.TorchDynamoException as error:
        require(False, f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
    finally:
        torch._dynamo.reset()
    _compare(trial, found, expected, f"under {backend}", tolerance)


def bf16(case: Case) -> None:
    """In bf16 the result is bf16 and stays close to float32 on the same inputs, whole and in chunks."""
    # Random weights handed on from segment to segment blow any rounding up, so drivers hand on once.
    length = 8 if case.role == "driver" else 16
    trial = Trial(case, length=length)
    x = trial.x.bfloat16()
    memory = trial.memory
    low = Trial(case, length=length)
    low.x, low.dtype = x, torch.bfloat16
    if memory is not None:
        low.memory = type(memory)(memory.hidden.bfloat16())
        trial.memory = type(memory)(memory.hidden.bfloat16().float())
    with torch.no_grad():
        expected = trial.whole(x.float())
        found = {"whole": low.whole()}
        if case.extends and not case.reads:
            state = low.state()
            cut = max(5, low.first())
            pieces = [low.fill(state, cut), low.fill(state, cut + 1, cut), low.fill(state, length, cut + 1)]
            found["in chunks"] = torch.cat(pieces, 1)
    for how, y in found.items():
        require(y.dtype == torch.bfloat16, f"{how}: bf16 went in and {y.dtype} came out")
        require(bool(y.isfinite().all()), f"{how}: not finite in bf16")
        error = float((y.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt())
        require(error <= BF16_ERROR, f"{how}: off by {error:.3f} in bf16, at most {BF16_ERROR}")
    trained = _run(low)
    for (name, parameter), slope in zip(low.module.named_parameters(), trained[2:], strict=True):
        require(slope.dtype == parameter.dtype, f"the gradient of {name} is {slope.dtype}")
        require(bool(slope.isfinite().all()), f"the gradient of {name} is not finite in bf16")


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill every buffer that nobody has written (torch.empty and its kin) with NaN inside the block."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        require(bool(torch.empty(3).isnan().all()), "buffers could not be poisoned")
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def poison(case: Case) -> None:
    """With NaN in every buffer that nobody has written, parameters, outputs and gradients are finite."""
    with poisoned():
        trial = Trial(case, length=18)
        for name, value in [*trial.module.named_parameters(), *trial.module.named_buffers()]:
            if value.is_floating_point():
                require(bool(value.isfinite().all()), f"{name} was never given a value")
        for value in _run(trial):
            require(bool(value.isfinite().all()), "an output or gradient reads memory that was never written")
        if case.extends and not case.reads:
            with torch.no_grad():
                state = trial.state()
                first = max(trial.first(), 4)
                y = [trial.fill(state, first)]
                lengths = torch.tensor([1, 0, 3])
                ragged = trial.extend(state, trial.x[:, first : first + 3], first, lengths=lengths)
                y.append(ragged[torch.arange(3) < lengths[:, None]])
                start = first + lengths
                y.append(trial.extend(state, trial.x[:, :1], start))
            for value in y:
                require(bool(value.isfinite().all()), "extend reads memory that was never written")


def determinism(case: Case) -> None:
    """Parameters follow from the seed alone, those that their module calls `undrawn` not even from that; a
    call repeats bit for bit and leaves the generators alone."""
    torch.manual_seed(11)
    one = case.build(fresh=True, seed=3).state_dict()
    torch.manual_seed(12)
    two, other = case.build(fresh=True, seed=3).state_dict(), case.build(fresh=True, seed=4).state_dict()
    for name, value in one.items():
        same(two[name], value, f"{name} from the same seed")
    numbers = {name: value for name, value in one.items() if value.is_floating_point() and value.numel() > 1}
    trial = Trial(case)
    modules = dict(trial.module.named_modules())
    for name in (name for name, value in numbers.items() if float(value.std()) > 0):
        path, _, short = name.rpartition(".")
        undrawn = short in getattr(modules[path], "undrawn", ())
        require(
            torch.equal(other[name], one[name]) == undrawn, f"{name} is {'not ' * undrawn}the same from another seed"
        )
    before = torch.get_rng_state()
    same(trial.whole(), trial.whole(), "the same call twice")
    require(torch.equal(torch.get_rng_state(), before), "a call draws from the global generator")


def noise(case: Case) -> None:
    """In an update noise follows from the update's seed alone; what declares none is unmoved by it."""
    trial = Trial(case, length=18)
    one, again, other = (_run(trial, training=Training.of(seed)) for seed in (1, 1, 2))
    for a, b in zip(one, again, strict=True):
        same(a, b, "the same seed twice")
    drawn = case.can.noise
    if drawn:
        require(not torch.equal(one[0], other[0]), "noise is declared, yet another seed changes nothing")
    else:
        same(other[0], one[0], "noise is not declared: the output under another seed")
        same(trial.whole().detach(), one[0], "noise is not declared: the output outside an update")
    before = torch.get_rng_state()
    trial.whole(training=Training.of(3))
    require(torch.equal(torch.get_rng_state(), before), "a call in an update draws from the global generator")


def limits(role: str, name: str, settings: type[Any]) -> list[tuple[str, Callable[[], None]]]:
    """The checks of every stated limit."""
    return [(limit.name, _limit(role, name, limit)) for limit in settings.limits()]


def _limit(role: str, name: str, limit: Limit) -> Callable[[], None]:
    def law() -> None:
        for length in (20, 6):
            trial = Trial(Case(role, name, limit.example), length=length)
            with torch.no_grad():
                near(trial.whole(), _reference(role, name, limit.reference, trial), f"limit '{limit.name}'")

    return law


def _reference(role: str, name: str, reference: Example | Callable[..., Tensor], trial: Trial) -> Tensor:
    if not isinstance(reference, Example):
        return reference(trial.module, trial.x, trial.ctx())
    module: nn.Module = Case(role, name, reference).build()
    try:
        module.load_state_dict(trial.module.state_dict())
    except (RuntimeError, ArmillaryError) as error:
        require(False, f"the limit's reference has other parameters: {error}")
    ctx: Context = trial.ctx()
    y: Tensor = module(trial.x, ctx)
    return y
