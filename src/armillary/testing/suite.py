"""Which laws hold for which mechanism, and running them: for pytest by `laws_for`, for a person by `check`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from armillary.base.errors import InputError, nearest
from armillary.base.registry import Registry
from armillary.nn.driver import drivers
from armillary.nn.heads.base import heads
from armillary.nn.mechanism import (
    MechanismSettings,
    MixerSettings,
    PositionSettings,
    channels,
    mixers,
    norms,
    positions,
)
from armillary.testing import contract, numerics, sequence, sight
from armillary.testing.cases import Case, NotApplicable

_REGISTRIES: tuple[Registry[MechanismSettings], ...] = (mixers, channels, positions, norms, heads, drivers)  # type: ignore[assignment]
ROLES = tuple(registry.role for registry in _REGISTRIES)


@dataclass(frozen=True)
class LawResult:
    """law: its name and the example in brackets; detail: what was broken, or why it was skipped."""

    law: str
    passed: bool
    detail: str = ""
    seconds: float = 0.0
    skipped: bool = False


def _always(case: Case) -> bool:
    return True


def _sequential(case: Case) -> bool:
    return not case.reads


def _chunked(case: Case) -> bool:
    return not case.reads and case.extends and case.can.chunking


def _mixes(case: Case) -> bool:
    return case.mixes


def _looks(case: Case) -> bool:
    return isinstance(case.settings, MixerSettings)  # a whole stack has no matrix of its own


def _whole(case: Case) -> bool:
    return case.role != "driver"  # it goes from block to block, each of which is a graph


def _sloped(case: Case) -> bool:
    return not getattr(case.settings, "detached", False)  # a gradient that is cut is no derivative


def _stateful(case: Case) -> bool:
    return case.mixes and case.extends


def _drives(case: Case) -> bool:
    return case.role == "driver"


def _positioned(case: Case) -> bool:
    return isinstance(case.example.settings, PositionSettings)


def _tapped(case: Case) -> bool:
    return case.mixes or case.role == "channel"


def _within(case: Case) -> bool:
    return case.role == "channel"


def _compiles(case: Case) -> bool:
    return case.example.compiled


_LAWS: tuple[tuple[str, Callable[[Case], None], Callable[[Case], bool]], ...] = (
    ("chunking", sequence.chunking, _chunked),
    ("selection", sequence.selection, _chunked),
    ("causality", sequence.causality, _sequential),
    ("packing", sequence.packing, _sequential),
    ("padding", sequence.padding, _always),
    ("rollback", sequence.rollback, _stateful),
    ("gradient", numerics.gradient, _sloped),
    ("cost", numerics.cost, _always),
    ("sight", sight.sight, _looks),
    ("taps", sight.taps, _tapped),
    ("plain", numerics.plain, _always),
    ("graph", numerics.graph, _whole),
    ("compiler", numerics.compiler, _compiles),
    ("bf16", numerics.bf16, _always),
    ("poison", numerics.poison, _always),
    ("determinism", numerics.determinism, _always),
    ("noise", numerics.noise, _always),
    ("recipe", contract.recipe, _always),
    ("meta", contract.meta, _always),
    ("sites", contract.sites, _positioned),
    ("mask", contract.mask, _within),
    ("unsupported", contract.unsupported, _looks),
    ("refusals", contract.refusals, _drives),
)


def laws_of(case: Case) -> dict[str, Callable[[], None]]:
    """The laws that apply to one case, by name, each as a check (see `laws_for`)."""
    return {law: partial(run, case) for law, run, applies in _LAWS if applies(case)}


def laws_for(role: str, name: str, *, thorough: bool = True) -> list[tuple[str, Callable[[], None]]]:
    """Every law of a registered mechanism as (name, check); a check returns when the law holds and
    raises LawBroken when not, NotApplicable when it cannot be tried here.

    thorough: compile every example into a graph; without, the first of each order, and none that goes
    through the full compiler anyway (compiling is most of what the laws cost).

    Raises InputError for an unknown role and SettingsError for an unknown name.
    """
    registry = next((r for r in _REGISTRIES if r.role == role), None)
    if registry is None:
        raise InputError(f"there is no role '{role}'", hint=nearest(role, ROLES))
    settings = registry.get(name)
    laws: list[tuple[str, Callable[[], None]]] = []
    compiled: set[tuple[str, bool]] = set()
    for example in settings.examples():
        case = Case(role, name, example)
        shape = (case.order, case.cross)
        once = thorough or not (shape in compiled or example.compiled)
        laws += [(f"{law}[{example.name}]", run) for law, run in laws_of(case).items() if law != "graph" or once]
        compiled.add(shape)
    return laws + [(f"limit[{limit}]", run) for limit, run in numerics.limits(role, name, settings)]


def check(role: str, name: str, progress: Callable[[LawResult], None] | None = None) -> list[LawResult]:
    """Hold a registered mechanism to every law; `progress` hears of each result as it comes.

    A law that raises anything at all is broken: its detail is then the error.
    """
    results = []
    for law, run in laws_for(role, name):
        began = time.perf_counter()
        passed, skipped, detail = True, False, ""
        try:
            run()
        except NotApplicable as reason:
            skipped, detail = True, str(reason)
        except AssertionError as broken:
            passed, detail = False, str(broken)
        except Exception as error:
            passed, detail = False, f"{type(error).__name__}: {error}"
        results.append(LawResult(law, passed, detail, time.perf_counter() - began, skipped))
        if progress is not None:
            progress(results[-1])
    return results
