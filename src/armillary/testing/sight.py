"""Laws of sight and taps: the matrix that is shown is the one that acted, and looking changes nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from armillary.base.errors import UnsupportedError
from armillary.nn.mechanism import Mixer
from armillary.nn.taps import Edit, Taps
from armillary.testing.cases import Case, Trial
from armillary.testing.compare import near, refuses, require, same

PARTS = ("v", "weights", "mixed")  # what every mixer with an exact matrix lets be watched


def sight(case: Case) -> None:
    """Frozen and applied to one-hot values the mixer gives its exact matrix; others, exact Jacobians."""
    trial = Trial(case, batch=2, length=9)
    mixer = trial.module
    assert isinstance(mixer, Mixer)
    with torch.no_grad():
        if case.can.sight == "exact":
            for fields in _surroundings(case, trial):
                _exact(trial, mixer, fields)
        else:
            refuses(lambda: mixer.sight(trial.x, trial.ctx()), "sight without an exact matrix")
    _jacobian(case)


def _surroundings(case: Case, trial: Trial) -> list[dict[str, Tensor]]:
    found: list[dict[str, Tensor]] = [{}]
    if not case.cross and case.can.packed:
        found.append({"documents": (torch.arange(trial.length) >= 4).long().expand(trial.batch, -1)})
    if not case.cross and case.can.padding:
        found.append({"padding": torch.arange(trial.length) < torch.tensor([[trial.length], [6]])})
    return found


def _exact(trial: Trial, mixer: Mixer, fields: dict[str, Tensor]) -> None:
    ctx, what = trial.ctx(**fields), ", ".join(fields) or "plain"
    frozen, values = mixer.freeze(trial.x, ctx), mixer.values(trial.x, ctx)
    mixed = mixer.mix(frozen, values)
    matrix = mixer.sight(trial.x, ctx)
    near(mixer.finish(mixed, trial.x, ctx), mixer(trial.x, ctx), f"{what}: finish(mix(freeze, values)) against forward")
    shape = (trial.batch, matrix.shape[1], trial.length, values.shape[1])
    require(matrix.shape == shape, f"{what}: the matrix has shape {tuple(matrix.shape)}, expected {shape}")
    near(_apply(matrix, values), mixed, f"{what}: matrix · values against the mix")
    near(mixer.mix(frozen, 2 * values + 1) - mixer.mix(frozen, values + 1), mixed, f"{what}: the mix is not linear")
    replaced = mixer.mix(dataclasses.replace(frozen, weights=matrix), values)
    near(replaced, mixed, f"{what}: the mix with its own matrix put in")
    if trial.case.order == "causal" and not trial.case.cross:
        later = matrix.triu(1)
        require(bool((later == 0).all()), f"{what}: the matrix of a causal mixer has weights above the diagonal")
    if "documents" in fields and trial.case.order == "causal":
        require(bool((matrix[:, :, 4:, :4] == 0).all()), "the matrix crosses a document's border")


def _apply(matrix: Tensor, values: Tensor) -> Tensor:
    """[B, H, T, S] on [B, S, G, K], each group of values serving its heads → [B, T, H, K]."""
    each = values.repeat_interleave(matrix.shape[1] // values.shape[2], 2)
    return torch.einsum("bhts,bshk->bthk", matrix, each)


def _jacobian(case: Case) -> None:
    """Against central differences in float64, along every input of one token."""
    trial = Trial(case, batch=1, length=3, dtype=torch.float64, source=3)
    found = trial.module.jacobian(trial.x, trial.ctx())
    source = trial.x if trial.memory is None else trial.memory.hidden
    columns = []
    step = 1e-5
    for feature in range(source.shape[2]):
        outputs = []
        for sign in (1, -1):
            moved = source.clone()
            moved[0, 1, feature] += sign * step
            if trial.memory is None:
                outputs.append(trial.whole(moved))
            else:
                outputs.append(trial.whole(memory=type(trial.memory)(moved)))
        columns.append((outputs[0] - outputs[1]) / (2 * step))
    near(found[:, :, :, 1], torch.stack(columns, -1).detach(), "the Jacobian against differences", 1e-5)


# -- taps


def taps(case: Case) -> None:
    """Watching and identity edits change nothing, edits act, in forward and in extend."""
    trial = Trial(case, length=9)
    with torch.no_grad():
        _watched(trial, "forward", lambda taps: trial.whole(taps=taps))
        if case.extends:
            _watched(trial, "extend", lambda taps: _two_chunks(trial, taps))
        if case.mixes and case.can.sight == "exact":
            _weights(trial)


def _two_chunks(trial: Trial, taps: Taps | None) -> Tensor:
    state, cut = trial.state(), max(4, trial.first())
    first = trial.extend(state, trial.x[:, :cut], 0, taps=taps)
    return torch.cat([first, trial.extend(state, trial.x[:, cut:], cut, taps=taps)], 1)


def _watched(trial: Trial, what: str, call: Callable[[Taps | None], Tensor]) -> None:
    expected = call(None)
    watch = Taps(["*"])
    same(call(watch), expected, f"{what} while watched")
    names = list(watch.seen)
    exact = trial.case.mixes and trial.case.can.sight == "exact"
    for part in PARTS if exact else ():
        require(f"here.{part}" in names, f"{what} passes no tap '{part}' (it passes {', '.join(names) or 'none'})")
    if _weighs(trial, what):
        near(call(Taps(edits=[("*", torch.clone)])), expected, f"{what} with identity edits everywhere")
    for name in names:
        if name.endswith(".weights"):
            continue  # an edit goes through the matrix, which rounds otherwise
        identity: Edit = torch.clone
        same(call(Taps(edits=[(name, identity)])), expected, f"{what} with an identity edit of {name}")
        moved = call(Taps(edits=[(name, lambda value: value * 1.5 + 0.25)]))
        require(not torch.equal(moved, expected), f"{what}: an edit of {name} changes nothing")


def _weighs(trial: Trial, what: str) -> bool:
    """Whether the weights can be edited here: a state without tokens has none over those that are gone."""
    if what == "forward" or trial.case.can.state == "span" or not trial.case.mixes:
        return True
    try:
        _two_chunks(trial, Taps(edits=[("here.weights", torch.clone)]))
    except UnsupportedError:
        return False
    return True


def _weights(trial: Trial) -> None:
    mixer = trial.module
    watch = Taps(["here.weights", "here.v", "here.mixed"])
    y = trial.whole(taps=watch)
    seen = {part: watch.seen[f"here.{part}"] for part in PARTS}
    near(seen["weights"], mixer.sight(trial.x, trial.ctx()), "the watched weights against the matrix")
    near(_apply(seen["weights"], seen["v"]), seen["mixed"], "watched weights · values against the watched mix")
    near(mixer.finish(seen["mixed"], trial.x, trial.ctx()), y, "the watched mix, finished")
    shift = Taps(["here.mixed"], [("here.weights", lambda weights: weights.roll(1, -1))])
    y = trial.whole(taps=shift)
    mixed = _apply(seen["weights"].roll(1, -1), seen["v"])
    near(shift.seen["here.mixed"], mixed, "the mix under edited weights")
    near(y, mixer.finish(mixed, trial.x, trial.ctx()), "the output under edited weights")
    state_holds_tokens = trial.case.can.state == "span"
    if trial.case.extends and state_holds_tokens:
        watch, cut = Taps(["here.weights"]), max(4, trial.first())
        state = trial.state()
        for start, stop in ((0, cut), (cut, 9)):
            trial.extend(state, trial.x[:, start:stop], start, taps=watch)
        last = watch.seen["here.weights"]
        near(last, seen["weights"][:, :, cut:], "weights watched in extend against those of the whole")
