"""What a variant takes: bytes of state and time by length, memory of training, measured on fresh weights.

Times are of whole rows, forward and backward. At every length the batch is chosen so that the number
of tokens is the same, so that what a call costs besides its tokens does not flatten the curve.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from armillary.base.errors import UnsupportedError
from armillary.checkpoints.assemble import pick_device
from armillary.compare.statistics import exponent
from armillary.nn.context import Context
from armillary.nn.describe import describe
from armillary.nn.mechanism import MixerSettings, Place, initialise
from armillary.nn.network import ModelSettings, Network, build
from armillary.nn.ops import computes_bf16
from armillary.recipe import Recipe
from armillary.recipe.training import TrainingSettings
from armillary.train import Trainer
from armillary.train.precision import settled
from armillary.train.trainer import DTYPES

SHORTEST, LONGEST = 256, 4096  # bounds of the longest row that is timed
HALVINGS = 4  # from the longest row down to the shortest
REPEATS = 3
SECONDS = 4.0  # that one point may take; longer ones are not repeated

Report = Callable[[float], None]


def measure(recipe: Recipe, vocabulary: int, report: Report = lambda share: None) -> dict[str, Any]:
    """Plain data: what the variant declares and what was measured of it (None where it could not be)."""
    model = recipe.model if recipe.model.vocabulary else recipe.model.derive(vocabulary=vocabulary)
    training = settled(recipe.training)
    rows = training.micro_batch or training.batch
    if training.threads is not None:
        torch.set_num_threads(training.threads)
    declared = describe(
        model,
        length=training.context,
        batch=rows,
        bf16=training.precision == "bf16",
        recompute=training.recompute == "blocks",
    )
    device = pick_device(training.device)
    # Emulated, bf16 is so slow that nothing else would be seen; growth does not depend on it.
    native = training.precision == "float32" or device.type != "cpu" or computes_bf16()
    dtype = DTYPES[training.precision if native else "float32"]
    longest = model.derive(context=max(model.context, LONGEST))
    report(0.05)
    memory = training_memory(model, training, device)
    report(0.2)
    lengths = _lengths(training.context, lambda tokens: _network_pass(longest, tokens // 16, 16, dtype, device))
    states = state_bytes(longest, lengths, dtype, device)
    report(0.4)
    whole = times(lambda rows, length: _network_pass(longest, rows, length, dtype, device), lengths)
    report(0.8)
    mixers = times(lambda rows, length: _mixer_pass(longest, rows, length, dtype, device), lengths)
    report(1.0)
    return {
        "parameters": declared.parameters,
        "active_parameters": declared.active,
        "embedding_parameters": declared.embedding,
        "flops_per_token": declared.flops_per_token,
        "context": training.context,
        "declared_state_bytes": declared.state_bytes,
        "predicted_training_bytes": declared.training_bytes,
        "training_bytes": memory,
        "blocks": list(declared.blocks),
        "state_bytes": None if states is None else [list(pair) for pair in states],
        "time": _fitted(whole),
        "mixer_time": _fitted(mixers),
        "device": str(device),
        "precision": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


def state_bytes(
    model: ModelSettings, lengths: list[int], dtype: torch.dtype, device: torch.device
) -> list[tuple[int, int]] | None:
    """(tokens, bytes that the state of one row holds after them); None for what has no state to extend."""
    if model.form != "decoder":
        return None
    network = _network(model, dtype, device).eval()
    found = []
    with torch.no_grad():
        for length in lengths:
            state = network.init_state(1, length)
            ids = _ids(model, 1, length, device)
            for start in range(0, length, 256):
                network.extend(ids[:, start : start + 256], state, last=True)
            found.append((length, state.nbytes))
    return found


def times(prepare: Callable[[int, int], Callable[[], None]], lengths: list[int]) -> list[tuple[int, float]] | None:
    """(length, seconds of one row, forward and backward), the shortest of a few; None if it is refused.

    prepare: (rows, length) → a call to be timed.
    """
    found = []
    try:
        for length in lengths:
            rows = max(1, max(lengths) // length)
            call = prepare(rows, length)
            start = time.perf_counter()
            call()
            best = time.perf_counter() - start
            if best < SECONDS:
                best = min([best, *(_timed(call) for _ in range(REPEATS if best < SECONDS / 4 else 1))])
            found.append((length, best / rows))
    except UnsupportedError:
        return None
    return found


def _timed(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _fitted(points: list[tuple[int, float]] | None) -> dict[str, Any] | None:
    if points is None:
        return None
    found = exponent([length for length, _ in points], [seconds for _, seconds in points])
    return {"points": [list(point) for point in points], "exponent": found.to_data()}


def _lengths(context: int, prepare: Callable[[int], Callable[[], None]]) -> list[int]:
    """Lengths that double up to one from which much longer rows than the training's can be told, or as
    far as the machine's speed allows. prepare: (tokens) → a call to be timed."""
    longest = min(LONGEST, max(SHORTEST, 8 * context))
    least = 16 << HALVINGS
    per_token = _timed(prepare(least)) / least
    while longest > least and longest * per_token > SECONDS / 3:
        longest //= 2
    return [longest >> back for back in range(HALVINGS, -1, -1)]


def _network_pass(
    model: ModelSettings, rows: int, length: int, dtype: torch.dtype, device: torch.device
) -> Callable[[], None]:
    network = _network(model, dtype, device)
    ids = _ids(model, rows, length, device)
    side = {"prefix": torch.zeros(rows, dtype=torch.int64, device=device)} if model.form == "prefix" else None

    def call() -> None:
        network.zero_grad(set_to_none=True)
        hidden = network.hidden(ids, side=side)
        network.cross_entropy(hidden, ids).backward()
        _wait(device)

    return call


def _mixer_pass(
    model: ModelSettings, rows: int, length: int, dtype: torch.dtype, device: torch.device
) -> Callable[[], None]:
    """All token mixers of the stack, without what stands around them."""
    settings = [branch.mixer for block in model.layers() for branch in block.all() if branch.mixer is not None]
    distinct: dict[str, tuple[MixerSettings, int]] = {}
    for mixer in settings:
        key = repr(mixer.to_data())
        distinct[key] = (mixer, distinct[key][1] + 1 if key in distinct else 1)
    modules = []
    for mixer, count in distinct.values():
        place = Place(
            width=model.width, order=model.place().order, length=model.context, depth=model.depth, path="mixer"
        )
        with torch.device(device):
            module = mixer.build(place)
        if any(True for _ in module.parameters()):
            initialise(module, 0)
        modules.append((module, count))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, length, model.width, generator=generator).to(device, dtype).requires_grad_()
    side = {"prefix": torch.zeros(rows, dtype=torch.int64, device=device)} if model.form == "prefix" else {}
    ctx = Context(side=side)

    def call() -> None:
        for module, count in modules:
            for _ in range(count):
                module.zero_grad(set_to_none=True)
                x.grad = None
                module(x, ctx).float().sum().backward()
        _wait(device)

    return call


def training_memory(model: ModelSettings, training: TrainingSettings, device: torch.device) -> int | None:
    """Most bytes that two updates add to what the process held; None where that cannot be told."""
    _let_go()
    before = _reset_peak(device)
    if before is None:
        return None
    network = build(model, seed=0).to(device)
    network.tie()
    # eager: a compiler's own memory is not the model's
    rows = training.micro_batch or training.batch
    once = training.derive(compile="no", device="auto", seconds=3600.0, batch=rows, micro_batch=None)
    trainer = Trainer(network, once)
    length = trainer.objective.tokens(training.context)
    ids = _ids(model, rows, length, torch.device("cpu"))
    for _ in range(2):
        trainer.step(ids)
    peak = _peak(device)
    del trainer, network
    _let_go()
    return None if peak is None else max(0, peak - before)


def _network(model: ModelSettings, dtype: torch.dtype, device: torch.device) -> Network:
    network = build(model, seed=0).to(device).compute(dtype)
    network.tie()
    return network


def _ids(model: ModelSettings, rows: int, length: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.vocabulary or 1, (rows, length), generator=generator).to(device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _let_go() -> None:
    """Give freed memory back to the system, so that it does not count as held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _reset_peak(device: torch.device) -> int | None:
    """Bytes held now, with the peak set back to that; None where the system does not allow it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return int(torch.cuda.memory_allocated(device))
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _peak(device)


def _peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return None
