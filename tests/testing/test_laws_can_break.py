"""Each law fails on a mechanism that breaks it: attention, retention or a position with one flaw put in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from pydantic import Field
from torch import Tensor, nn

from armillary import testing
from armillary.base.errors import InputError, SettingsError
from armillary.nn.channels.expert_choice import ExpertChoiceSettings
from armillary.nn.context import Context
from armillary.nn.cost import Cost
from armillary.nn.example import Example, Limit
from armillary.nn.mechanism import Capabilities, Frozen, Mixer, Place, mixers
from armillary.nn.mixers.attention import Attention, AttentionSettings, Look
from armillary.nn.mixers.retention import Retention, RetentionSettings
from armillary.nn.ops import plain
from armillary.nn.positions.alibi import Alibi, AlibiSettings
from armillary.nn.state import FixedState, SpanState
from armillary.testing import contract, numerics, sequence, sight
from armillary.testing.cases import Case

Law = Callable[[Case], None]


def case(module: type[Mixer], settings: type[Any] | None = None, **place: Any) -> Case:
    """A case of retention or attention built as `module`."""
    base: type[Any] = settings or (RetentionSettings if issubclass(module, Retention) else AttentionSettings)

    class Flawed(base):  # type: ignore[misc]
        def build(self, place: Place) -> Any:
            return module(self, place)  # type: ignore[arg-type]

    return Case("mixer", base.kind, Example("flawed", Flawed(heads=2), place))


def broken(law: Law, flawed: Case, what: str) -> None:
    with pytest.raises(testing.LawBroken, match=what):
        law(flawed)


class _Noisy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 1.01


# -- chunking


class CountsFromZero(Retention):
    def extend(self, x: Tensor, state: Any, ctx: Context) -> Tensor:
        return super().extend(x, state, ctx.replace(positions=torch.arange(x.shape[1])[None] * 2))


class IgnoresLengths(Retention):
    def extend(self, x: Tensor, state: Any, ctx: Context) -> Tensor:
        return super().extend(x, state, ctx.replace(lengths=None))


class LetsGarbageIn(Retention):
    """Empty rows are kept, but what stands behind a row's tokens enters its state."""

    def extend(self, x: Tensor, state: Any, ctx: Context) -> Tensor:
        lengths = ctx.lengths
        if lengths is not None:
            ctx = ctx.replace(lengths=torch.where(lengths > 0, lengths + 1, 0).clamp(max=x.shape[1]))
        return super().extend(x, state, ctx)


class ForgetsGradients(Retention):
    def extend(self, x: Tensor, state: Any, ctx: Context) -> Tensor:
        state.tensors["matrix"] = state.tensors["matrix"].detach()
        return super().extend(x, state, ctx)


class _Replaced(FixedState):
    def put(self, name: str, value: Tensor) -> None:
        self.tensors[name] = value


class _InPlace(FixedState):
    def put(self, name: str, value: Tensor) -> None:
        self.tensors[name].data.copy_(value)


class _Window(FixedState):
    kind: ClassVar[str] = "window"


class _Alias(FixedState):
    def snapshot(self) -> Any:
        return self._with(self.tensors)


class _Cuts(FixedState):
    def truncate(self, lengths: Tensor) -> None:
        pass


class _Unaware(SpanState):
    def select(self, rows: Tensor) -> Any:
        other = super().select(rows)
        other._set_lengths(self.lengths[: len(rows)].clamp(max=2))
        return other


class _CutsTooMuch(SpanState):
    def truncate(self, lengths: Tensor) -> None:
        super().truncate(lengths - 1)


def with_state(base: type[Any], kind: type[Any]) -> type[Any]:
    class Stateful(base):  # type: ignore[misc]
        def init_state(self, *args: Any, **more: Any) -> Any:
            return kind(super().init_state(*args, **more).tensors)

    return Stateful


@pytest.mark.parametrize(
    "module, what",
    [
        (CountsFromZero, "against the whole"),
        (IgnoresLengths, "an empty row changed the state"),
        (LetsGarbageIn, "invalid tokens changed the state"),
        (ForgetsGradients, "gradient of .* in chunks"),
        (with_state(Retention, _Replaced), "not written in place"),
        (with_state(Retention, _InPlace), "written in place"),
        (with_state(Retention, _Window), "kind window"),
    ],
)
def test_chunking(module: type[Mixer], what: str) -> None:
    broken(sequence.chunking, case(module), what)


def test_selection() -> None:
    broken(sequence.selection, case(with_state(Attention, _Unaware)), "selected rows")


# -- causality, neighbours, going back


class SeesTheEnd(Attention):
    def finish(self, mixed: Tensor, x: Tensor, ctx: Context) -> Tensor:
        return super().finish(mixed, x, ctx) + 1e-9 * x[:, -1:]


class SeesOnlyThePast(Attention):
    def _mask(self, ctx: Context, look: Look) -> Any:
        self.order = "causal"
        return super()._mask(ctx, look)


class IgnoresDocuments(Attention):
    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        return super().forward(x, ctx.replace(documents=None))


class IgnoresPadding(Attention):
    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        return super().forward(x, ctx.replace(padding=None))


class NeverPacks(AttentionSettings):
    capabilities: ClassVar[Capabilities] = dataclasses.replace(
        AttentionSettings.capabilities, packed=False, padding=False
    )


class AcceptsAnything(Attention):
    def accept(self, ctx: Context, *, extending: bool = False) -> None:
        pass


def test_causality() -> None:
    broken(sequence.causality, case(SeesTheEnd), "may not see")
    broken(sequence.causality, case(SeesOnlyThePast, order="bidirectional"), "nothing later is seen")
    broken(sequence.causality, case(SeesTheEnd, order="prefix"), "may not see")


def test_neighbours() -> None:
    broken(sequence.packing, case(IgnoresDocuments), "changed its neighbours")
    broken(sequence.padding, case(IgnoresPadding), "padded on the left")
    undeclared = case(AcceptsAnything, NeverPacks)
    broken(sequence.packing, undeclared, "was accepted")
    broken(sequence.padding, undeclared, "was accepted")


def test_going_back() -> None:
    broken(sequence.rollback, case(with_state(Retention, _Alias)), "snapshot")
    broken(sequence.rollback, case(with_state(Retention, _Cuts)), "not declared")
    broken(sequence.rollback, case(with_state(Attention, _CutsTooMuch)), "after truncation")


# -- numbers


class WrongSlope(Attention):
    def values(self, x: Tensor, ctx: Context) -> Tensor:
        return _Noisy.apply(super().values(x, ctx))  # type: ignore[no-any-return,no-untyped-call]


class OtherFastForm(Attention):
    def mix(self, frozen: Frozen, values: Tensor) -> Tensor:
        return super().mix(frozen, values) * (1.0 if plain() else 1.001)


class Understated(RetentionSettings):
    def cost(self, place: Place, length: int, itemsize: int = 2) -> Cost:
        declared = super().cost(place, length, itemsize)
        return Cost(declared.flops * 0.97, declared.state_bytes)


class Forgotten(RetentionSettings):
    def cost(self, place: Place, length: int, itemsize: int = 2) -> Cost:
        return Cost(super().cost(place, length, itemsize).flops, 0)


class LooksAtData(Attention):
    def values(self, x: Tensor, ctx: Context) -> Tensor:
        return super().values(x, ctx) * (2 if float(x.detach().sum()) > 0 else 1)


class GrowsInBf16(Attention):
    def finish(self, mixed: Tensor, x: Tensor, ctx: Context) -> Tensor:
        return super().finish(mixed, x, ctx).float()


class RoughInBf16(Retention):
    def finish(self, mixed: Tensor, x: Tensor, ctx: Context) -> Tensor:
        return super().finish(mixed, x, ctx) * (1 if x.dtype != torch.bfloat16 else 1.1)


class NeverDrawn(Attention):
    def __init__(self, settings: AttentionSettings, place: Place) -> None:
        super().__init__(settings, place)
        self.extra = nn.Parameter(torch.empty(place.width))


class ReadsUnwritten(Attention):
    def values(self, x: Tensor, ctx: Context) -> Tensor:
        values = super().values(x, ctx)
        return values + torch.empty(values.shape) * 0


class DrawsGlobally(NeverDrawn):
    def reset(self, generator: torch.Generator | None) -> None:
        nn.init.normal_(self.extra)


class DrawsInCalls(Attention):
    def values(self, x: Tensor, ctx: Context) -> Tensor:
        torch.rand(1)
        return super().values(x, ctx)


@pytest.mark.parametrize(
    "law, flawed, what",
    [
        (numerics.gradient, case(WrongSlope), "gradcheck"),
        (numerics.plain, case(OtherFastForm), "off by"),
        (numerics.cost, case(Retention, Understated), "FLOPs"),
        (numerics.cost, case(Retention, Forgotten), "state bytes"),
        (numerics.graph, case(LooksAtData), "Unsupported|UserError"),
        (numerics.bf16, case(GrowsInBf16), "float32 came out"),
        (numerics.bf16, case(RoughInBf16), "off by"),
        (numerics.poison, case(NeverDrawn), "extra was never given a value"),
        (numerics.poison, case(ReadsUnwritten), "never written"),
        (numerics.determinism, case(DrawsGlobally), "from the same seed"),
        (numerics.determinism, case(DrawsInCalls), "global generator"),
    ],
)
def test_numbers(law: Law, flawed: Case, what: str) -> None:
    broken(law, flawed, what)


def test_poison_leaves_no_trace() -> None:
    with pytest.raises(ZeroDivisionError), numerics.poisoned():
        raise ZeroDivisionError
    assert not torch.are_deterministic_algorithms_enabled()


# -- sight and taps


class AddsToTheMix(Attention):
    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        return super().forward(x, ctx) + 0.01 * x


class NotLinear(Attention):
    def mix(self, frozen: Frozen, values: Tensor) -> Tensor:
        return super().mix(frozen, values + values.tanh())


class WrongJacobian(Attention):
    def jacobian(self, x: Tensor, ctx: Context) -> Tensor:
        return super().jacobian(x, ctx) * 1.001


class ChangesWhenWatched(Attention):
    def values(self, x: Tensor, ctx: Context) -> Tensor:
        return super().values(x, ctx) * (1.0 if ctx.taps is None else 1.001)


class HidesInExtend(Retention):
    def extend(self, x: Tensor, state: Any, ctx: Context) -> Tensor:
        return super().extend(x, state, ctx.replace(taps=None))


class IgnoresEdits(Attention):
    def mix(self, frozen: Frozen, values: Tensor) -> Tensor:
        return super().mix(dataclasses.replace(frozen, weights=None), values)


def test_sight() -> None:
    broken(sight.sight, case(AddsToTheMix), "against forward")
    broken(sight.sight, case(NotLinear), "values against the mix")
    broken(sight.sight, case(WrongJacobian), "the Jacobian against differences")


def test_taps() -> None:
    broken(sight.taps, case(ChangesWhenWatched), "forward while watched")
    broken(sight.taps, case(HidesInExtend), "extend passes no tap 'v'")
    broken(sight.taps, case(IgnoresEdits), "under edited weights")


# -- contract


class Undescribed(AttentionSettings):
    more: int = 1


class Unsourced(AttentionSettings):
    source: ClassVar[str] = ""


class KeptOnCPU(Attention):
    def __init__(self, settings: AttentionSettings, place: Place) -> None:
        super().__init__(settings, place)
        self.extra = nn.Parameter(torch.zeros(3, device="cpu"))


class IgnoresTheMask(Attention):
    def _mask(self, ctx: Context, look: Look) -> Any:
        return super()._mask(ctx.replace(mask=None), look)


class ExtendsAnyway(Attention):
    def accept(self, ctx: Context, *, extending: bool = False) -> None:
        super().accept(ctx, extending=False)


class NoSink(Alibi):
    def decay(self, positions: Tensor) -> Tensor:
        return positions.float()


class Blind(Alibi):
    def bias(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        return super().bias(q_pos, k_pos) * 0


def test_contract() -> None:
    broken(contract.recipe, case(Attention, Unsourced), "no source")
    broken(contract.recipe, case(Attention, Undescribed), "'more' has no description")
    broken(contract.meta, case(KeptOnCPU), "with storage on the meta device: extra")
    broken(contract.unsupported, case(AcceptsAnything), "lengths in forward: was accepted")
    broken(contract.unsupported, case(IgnoresTheMask), "hidden by the objective's mask")
    broken(contract.unsupported, case(ExtendsAnyway), "documents in extend: was accepted")


@pytest.mark.parametrize("module, what", [(NoSink, "the site 'decay'"), (Blind, "does not depend on the position")])
def test_sites(module: type[Alibi], what: str) -> None:
    class Flawed(AlibiSettings):
        def build(self, place: Place, heads: int = 1, head_width: int = 0) -> Alibi:
            return module(heads)

    broken(contract.sites, Case("position", "alibi", Example("flawed", Flawed())), what)


# -- the public face


def test_a_channel_whose_tokens_compete_may_not_take_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    can = ExpertChoiceSettings.can
    monkeypatch.setattr(ExpertChoiceSettings, "can", lambda self: dataclasses.replace(can(self), mask=True))
    broken(contract.mask, Case("channel", "expert_choice", ExpertChoiceSettings.examples()[0]), "hidden place")


@pytest.fixture
def registered() -> Iterator[type[AttentionSettings]]:
    @mixers.register
    class FlawedSettings(AttentionSettings):
        """Attention that sees the end."""

        kind: ClassVar[str] = "flawed_for_tests"
        gain: float = Field(1.0, gt=0, description="does nothing")

        def build(self, place: Place) -> Attention:
            return SeesTheEnd(self, place)

        @classmethod
        def examples(cls) -> list[Example]:
            return [Example("plain", cls())]

        @classmethod
        def limits(cls) -> list[Limit]:
            return [
                Limit("never", Example("plain", cls()), lambda module, x, ctx: x * 0),
                Limit("other", Example("plain", cls()), Example("biased", cls(bias=True))),
            ]

    yield FlawedSettings
    del mixers._entries["flawed_for_tests"]


def test_check_reports_every_law(registered: type[AttentionSettings]) -> None:
    heard: list[testing.LawResult] = []
    results = testing.check("mixer", "flawed_for_tests", heard.append)
    assert results == heard
    assert [result.law for result in results] == [law for law, _ in testing.laws_for("mixer", "flawed_for_tests")]
    failed = {result.law: result.detail for result in results if not result.passed}
    assert "may not see" in failed["causality[plain]"]
    assert "off by" in failed["limit[never]"] and "other parameters" in failed["limit[other]"]
    passed = {result.law for result in results if result.passed}
    assert {"recipe[plain]", "meta[plain]", "bf16[plain]", "cost[plain]"} <= passed
    assert all(result.seconds >= 0 and not result.skipped for result in results)


def test_a_crash_is_a_broken_law(registered: type[AttentionSettings], monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(self: Any, place: Place) -> None:
        raise ZeroDivisionError("no such thing")

    monkeypatch.setattr(registered, "build", crash)
    results = testing.check("mixer", "flawed_for_tests")
    assert all("ZeroDivisionError: no such thing" in r.detail for r in results if not r.law.startswith("recipe"))


def test_unknown_names_are_explained() -> None:
    with pytest.raises(InputError, match="no role 'mixr'.*\n.*mixer"):
        testing.laws_for("mixr", "attention")
    with pytest.raises(SettingsError, match="did you mean 'attention'"):
        testing.check("mixer", "atention")


def test_no_compiler_is_said_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    grouped = next(example for example in AttentionSettings.examples() if example.name == "grouped")
    with pytest.raises(testing.NotApplicable, match=r"no C\+\+ compiler"):
        numerics.compiler(Case("mixer", "attention", grouped))
