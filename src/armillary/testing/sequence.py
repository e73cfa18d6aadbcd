"""Laws of sequences: chunking, causality, packing, padding, and going back.

Every mixer, and everything that works within a position, is fed whole sequences, chunks, ragged
rows and neighbours that must not matter, on the paths with and without gradients.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from armillary.base.errors import UnsupportedError
from armillary.nn.state import SpanState, State
from armillary.testing.cases import Case, Trial, padded, swap
from armillary.testing.compare import held, near, refuses, require, same, slopes_near, untouched

SEEDS = (1, 2)
LONG, SHORT = 20, 6  # on either side of the length from which ops take another path


# -- chunking


def chunking(case: Case) -> None:
    """Whole, in random chunks, token by token and in ragged rows: the same numbers and gradients."""
    for seed in SEEDS:
        with torch.no_grad():
            trial = Trial(case, length=12, seed=seed)
            expected = trial.whole()
            _chunks(trial, expected, trial.cuts())
            first = trial.first()
            _chunks(trial, expected, [(0, first), *((t, t + 1) for t in range(first, trial.length))])
            _ragged(trial, expected)
    _gradients(Trial(case, length=9))
    with torch.no_grad():
        _storage(Trial(case))


def _chunks(trial: Trial, expected: Tensor, cuts: list[tuple[int, int]]) -> None:
    state = trial.state()
    if state is not None and trial.case.mixes and not trial.case.cross:
        declared = trial.case.can.state
        require(state.kind == declared, f"the state is of kind {state.kind}, declared is {declared}")
    pieces = [trial.fill(state, stop, start) for start, stop in cuts]
    near(torch.cat(pieces, 1), expected, f"chunks of {[b - a for a, b in cuts]} against the whole")
    for row in range(trial.batch):
        rows = slice(row, row + 1)
        lone = trial.state(rows)
        alone = [trial.extend(lone, trial.x[rows, a:b], a, rows=rows) for a, b in cuts]
        near(torch.cat(alone, 1), expected[rows], f"row {row} as a batch of its own")


def _schedule(trial: Trial) -> list[Tensor]:
    """How many tokens each row takes at each step; 0 is common, and rows end at different steps."""
    left = torch.full((trial.batch,), trial.length)
    least = trial.side["prefix"].clamp(min=1) if trial.case.order == "prefix" else torch.ones_like(left)
    steps = []
    while bool((left > 0).any()):
        take = torch.minimum(trial.integers(0, 4, trial.batch), left)
        begins = (left == trial.length) & (take > 0)
        take = torch.where(begins, torch.maximum(take, least), take)
        if bool((take > 0).any()):
            steps.append(take)
            left = left - take
    return steps


def _ragged(trial: Trial, expected: Tensor) -> None:
    """Rows of different lengths; what stands in invalid places reaches neither outputs nor state."""
    state, twin = trial.state(), trial.state()
    start = torch.zeros(trial.batch, dtype=torch.int64)
    for lengths in _schedule(trial):
        width = int(lengths.max()) + 1  # one place that no row fills
        valid = torch.arange(width) < lengths[:, None]
        places = trial.places(start, width)
        real = trial.x.gather(1, places)
        before = held(state)
        outputs = []
        for each in (state, twin):
            noise = trial.noise(*real.shape) * 30
            outputs.append(trial.extend(each, torch.where(valid[..., None], real, noise), start, lengths=lengths))
        untouched(before, held(state), lengths == 0, "an empty row changed the state")
        same(outputs[0][valid], outputs[1][valid], "invalid tokens changed outputs")
        _equal_states(state, twin, "invalid tokens changed the state")
        wanted = expected.gather(1, places)
        near(outputs[0][valid], wanted[valid], f"ragged rows of lengths {lengths.tolist()} from {start.tolist()}")
        start = start + lengths


def _equal_states(state: State | None, other: State | None, what: str) -> None:
    """The same answers are what counts, so places that no token has reached yet may differ in size only."""
    ours, theirs = held(state), held(other)
    untouched(ours, theirs, torch.ones(0 if state is None else state.batch, dtype=torch.bool), what)


def _gradients(trial: Trial) -> None:
    """The gradient of the chunks is the gradient of the whole; no tensor of an earlier state changes."""
    x = trial.x.clone().requires_grad_()
    trial = swap(trial, x=x)
    wanted = trial.parameters()
    weights = trial.noise(*x.shape)

    def slopes(y: Tensor) -> list[Tensor | None]:
        return list(torch.autograd.grad((y * weights).sum(), [x, *wanted], allow_unused=True))

    expected = slopes(trial.whole())
    for cuts in (trial.cuts(), [(t, t + 1) for t in range(trial.length)] if trial.first() == 1 else trial.cuts()):
        state, pieces = trial.state(), []
        for start, stop in cuts:
            old = [] if state is None else list(state.tensors.values())
            copies = [tensor.detach().clone() for tensor in old]
            pieces.append(trial.fill(state, stop, start))
            for tensor, copy in zip(old, copies, strict=True):
                same(tensor, copy, "with gradients a tensor of the state was written in place")
        slopes_near(trial.module, slopes(torch.cat(pieces, 1)), expected, "in chunks")
    state, begun = trial.state(), torch.zeros(trial.batch, dtype=torch.int64)
    total = []
    for lengths in _schedule(trial):
        width = int(lengths.max())
        valid = torch.arange(width) < lengths[:, None]
        places = trial.places(begun, width)
        y = trial.extend(state, x.gather(1, places), begun, lengths=lengths)
        total.append((y * weights.gather(1, places) * valid[..., None]).sum())
        begun = begun + lengths
    found = list(torch.autograd.grad(torch.stack(total).sum(), [x, *wanted], allow_unused=True))
    slopes_near(trial.module, found, expected, "in ragged chunks")


def _storage(trial: Trial) -> None:
    """Without gradients, with room, storage is written in place."""
    state = trial.state(capacity=trial.length)
    before = {} if state is None else dict(state.tensors)  # held, so that no new tensor comes to lie in its place
    trial.fill(state, trial.first())
    trial.fill(state, trial.length, trial.first())
    if state is not None:
        same_place = all(t.data_ptr() == before[name].data_ptr() for name, t in state.tensors.items())
        require(same_place, "without gradients the state was not written in place")


def selection(case: Case) -> None:
    """Rows of a state can be picked, repeated, reordered and joined; each goes on as before."""
    for seed in SEEDS:
        trial = Trial(case, batch=4, length=10, seed=seed)
        with torch.no_grad():
            expected, cut = trial.whole(), max(trial.first(), 4)
            state = trial.state()
            trial.fill(state, cut)
            require(state is None or state.batch == 4, "the state's batch is not the number of its rows")
            rows = torch.tensor([2, 0, 2, 3, 1])
            copied = None if state is None else state.select(rows)
            y = trial.extend(copied, trial.x[rows, cut:], cut, rows=rows)
            near(y, expected[rows, cut:], "selected rows")
            near(trial.fill(state, 10, cut), expected[:, cut:], "the state that rows were selected from")

            halves = [torch.tensor([0, 1]), torch.tensor([2, 3])]
            reach = [cut, min(10, cut + 3)]  # two states that have come to different places
            states = []
            for half, stop in zip(halves, reach, strict=True):
                states.append(trial.state(half, capacity=stop))
                trial.extend(states[-1], trial.x[half, :stop], 0, rows=half)
            joined = None if states[0] is None else type(states[0]).join([s for s in states if s is not None])
            start = torch.tensor(reach).repeat_interleave(2)
            places = trial.places(start, 3)
            lengths = torch.minimum(torch.full((4,), 3), 10 - start)
            y = trial.extend(joined, trial.x.gather(1, places), start, lengths=lengths)
            valid = torch.arange(3) < lengths[:, None]
            near(y[valid], expected.gather(1, places)[valid], "joined states")
            if joined is not None:
                require(joined.nbytes > 0 and joined.to("cpu").nbytes == joined.nbytes, "nbytes or to() is wrong")
            if seed == SEEDS[0] and state is not None:
                _kept(trial, expected, cut)


def _kept(trial: Trial, expected: Tensor, cut: int) -> None:
    """What an engine does with the rows of one state: work on some, put others in their place, share beginnings."""
    state = trial.state(capacity=trial.length)
    assert state is not None
    trial.fill(state, cut)
    before = held(state)
    part, some = state.rows(1, 2), torch.tensor([1, 2])
    near(trial.extend(part, trial.x[some, cut:], cut, rows=some), expected[some, cut:], "rows of a state")
    state.absorb(1, part)
    untouched(before, held(state), torch.tensor([True, False, False, True]), "a chunk of some rows changed others")
    lone, third = trial.state(torch.tensor([3]), capacity=cut), torch.tensor([3])
    assert lone is not None
    trial.extend(lone, trial.x[third, :cut], 0, rows=third)
    state.absorb(0, lone)
    part = state.rows(0, 1)
    near(
        trial.extend(part, trial.x[third, cut:], cut, rows=third), expected[third, cut:], "a row put in another's place"
    )
    if not isinstance(state, SpanState) or not state.divisible:
        return
    fresh = trial.state(torch.tensor([3]))
    assert isinstance(fresh, SpanState)
    for start, stop in ((0, cut - 1), (cut - 1, cut)):
        fresh.paste(0, start, state.cut(3, start, stop))
    near(trial.extend(fresh, trial.x[third, cut:], cut, rows=third), expected[third, cut:], "entries that were pasted")


# -- causality


def causality(case: Case) -> None:
    """In float64 no output depends on a later input, exactly; in float32 by at most 1e-6."""
    trial = Trial(case, batch=2, length=6, dtype=torch.float64)
    slopes = _slopes(trial)
    if case.mixes and not case.cross and case.order == "bidirectional":
        later = torch.ones(trial.length, trial.length, dtype=torch.bool).triu(1)
        sees = bool((slopes[:, later] != 0).any()) or _moves(trial, trial.length - 1, 0)
        require(sees, "declared bidirectional, but nothing later is seen")
        return
    seen = _may_see(trial)
    off = slopes.masked_fill(seen, 0).abs()
    require(bool((off == 0).all()), f"an output depends on an input that it may not see: {float(off.max()):.2e}")
    if case.mixes and not case.cross:
        # early tokens of a mixer that does not look at itself have nothing to choose among
        still = (slopes.sum(2) == 0).any(0).nonzero()[:, 0].tolist()
        require(all(_moves(trial, t, t) for t in still), "an output depends on no input")
        last = trial.length - 1
        own = bool((slopes[:, last, last] != 0).all()) or _moves(trial, last, last)
        require(own, "an output does not depend on its own input")
    for length in (LONG, SHORT):
        for gradients in (False, True):
            with torch.set_grad_enabled(gradients):
                _perturbed(Trial(case, length=length))


def _may_see(trial: Trial) -> Tensor:
    """[B, T, S]: whether an output may depend on an input."""
    steps = torch.arange(trial.length)
    own = (steps[:, None] == steps).expand(trial.batch, -1, -1)
    if not trial.case.mixes or trial.case.cross:
        return own
    seen = (steps[:, None] >= steps).expand(trial.batch, -1, -1)
    return seen | (steps < trial.side["prefix"][:, None, None]) if trial.case.order == "prefix" else seen


def _slopes(trial: Trial) -> Tensor:
    """[B, T, S]: the size of a random combination of the derivatives of output t by input s; 0 only
    where all of them are, as far as a random combination can tell."""
    x = trial.x.clone().requires_grad_()
    y = trial.whole(x)
    weights = trial.noise(*y.shape)
    sums = (y * weights).sum((0, 2))
    rows = [torch.autograd.grad(each, x, retain_graph=True, materialize_grads=True)[0] for each in sums]
    return torch.stack(rows, 1).abs().sum(-1)


def _moves(trial: Trial, source: int, target: int) -> bool:
    """Whether another input at one token moves the output at another in every row: what was chosen
    discretely has a derivative of 0 and depends on its input all the same. Some of a few inputs must
    lead to another choice."""
    base, moved = trial.whole().detach()[:, target], torch.zeros(trial.batch, dtype=torch.bool)
    for _ in range(8):
        x = trial.x.clone()
        x[:, source] = trial.noise(*x[:, source].shape) * 3
        moved |= (trial.whole(x).detach()[:, target] != base).any(-1)
    return bool(moved.all())


def _perturbed(trial: Trial) -> None:
    base = trial.whole().detach()
    most = _rounding(base)
    for t in {1, trial.length // 2, trial.length - 1}:
        if trial.case.order == "prefix" and t < trial.first():
            continue
        for factor in (1.0, 50.0):
            x = trial.x.clone()
            x[:, t:] = trial.noise(*x[:, t:].shape) * factor
            change = float((trial.whole(x).detach()[:, :t] - base[:, :t]).abs().max())
            require(change <= most, f"inputs from {t} on changed outputs before it by {change:.2e}")


def _rounding(y: Tensor) -> float:
    """What neighbours may move y by: where rows are multiplied together, how many there are decides the
    order of sums, so large outputs move by more than small ones."""
    return 1e-6 * max(1.0, float(y.abs().max()))


# -- neighbours that must not matter


def packing(case: Case) -> None:
    """Documents side by side in one row do not see each other; or the mixer says that they would."""
    parts = [[5, 1, 14], [9, 4, 7]]
    trial = Trial(case, batch=2, length=LONG)
    documents = torch.stack([torch.repeat_interleave(torch.tensor([7, 3, 5]), torch.tensor(p)) for p in parts])
    positions = torch.stack([torch.cat([torch.arange(n) for n in p]) for p in parts])
    if case.cross or not case.can.packed:
        refuses(lambda: trial.whole(documents=documents), "packed documents")
        return
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            y = trial.whole(documents=documents, positions=positions).detach()
            for row, sizes in enumerate(parts):
                start = 0
                for size in sizes:
                    part = slice(start, start + size)
                    # a row's prefix lies in its first document
                    fields = {} if start == 0 or case.order != "prefix" else {"side": {"prefix": torch.zeros(1).long()}}
                    alone = trial.alone(row, part, **fields)
                    near(y[row : row + 1, part].detach(), alone.detach(), f"document {start}:{start + size} alone")
                    x = trial.x.clone()
                    x[row, part] = trial.noise(size, x.shape[2]) * 50
                    changed = trial.whole(x, documents=documents, positions=positions).detach() - y
                    changed[row, part] = 0
                    worst = float(changed.abs().max())
                    require(worst <= _rounding(y), f"a document changed its neighbours by {worst:.2e}")
                    start += size


def padding(case: Case) -> None:
    """Padding on either side changes nothing; or the mixer says that it would."""
    for length in (LONG, SHORT):
        trial = Trial(case, batch=3, length=length)
        if case.cross:
            _padded_memory(trial)
            continue
        real = torch.tensor([length, length - 2, 1 if case.order != "prefix" else length - 1])
        left = torch.arange(length) >= (length - real)[:, None]
        right = torch.arange(length) < real[:, None]
        if not case.can.padding:
            refuses(partial(trial.whole, padding=right), "padding")
            return
        for gradients in (False, True):
            with torch.set_grad_enabled(gradients):
                for valid, side in ((left, "left"), (right, "right")):
                    _neighbours(trial, valid, side)


def _neighbours(trial: Trial, valid: Tensor, side: str) -> None:
    x = torch.where(valid[..., None], trial.x, trial.noise(*trial.x.shape) * 50)
    positions = (valid.long().cumsum(1) - 1).clamp(min=0)
    trial = swap(trial, x=x)
    y = trial.whole(padding=valid, positions=positions).detach()
    for row in range(trial.batch):
        alone = trial.alone(row, valid[row].nonzero()[:, 0]).detach()
        found = y[row : row + 1] if trial.case.reads and y.dim() == 2 else y[row : row + 1, valid[row]]
        near(found, alone, f"row {row} padded on the {side}")


def _padded_memory(trial: Trial) -> None:
    assert trial.memory is not None
    hidden = trial.memory.hidden
    for side in ("left", "right"):
        real = torch.tensor([7, 4, 1])
        steps = torch.arange(hidden.shape[1])
        valid = steps < real[:, None] if side == "right" else steps >= (7 - real)[:, None]
        noisy = torch.where(valid[..., None], hidden, trial.noise(*hidden.shape) * 50)
        masked = swap(trial, memory=padded(type(trial.memory)(noisy), valid))
        y = masked.whole().detach()
        state = masked.state()
        near(masked.fill(state, trial.length).detach(), y, f"a memory padded on the {side}, through the state")
        for row in range(trial.batch):
            memory = type(trial.memory)(hidden[row : row + 1, valid[row]])
            near(y[row : row + 1], trial.alone(row, slice(None), memory=memory).detach(), f"a {side}-padded memory")


# -- going back


def rollback(case: Case) -> None:
    """Snapshots bring a state back exactly; truncation cuts it where declared, and raises elsewhere."""
    with torch.no_grad():
        trial = Trial(case, length=10)
        cut = max(trial.first(), 3)
        state = trial.state()
        if state is None:
            return
        trial.fill(state, cut)
        kept = state.snapshot()
        copy = held(kept)
        once = trial.fill(state, 10, cut)
        untouched(copy, held(kept), torch.ones(trial.batch, dtype=torch.bool), "the snapshot moved on")
        for attempt in ("first", "second"):
            state.restore(kept)
            same(trial.fill(state, 10, cut), once, f"after the {attempt} restore")
            untouched(copy, held(kept), torch.ones(trial.batch, dtype=torch.bool), "the snapshot was written to")
        lengths = torch.tensor([cut + 2, cut, cut + 5])
        if case.cross:
            return
        if case.can.rollback != "truncate":
            try:
                state.truncate(lengths)
            except UnsupportedError:
                return
            require(False, "truncate is not declared, yet it did not raise")
        expected = trial.whole()
        state.truncate(lengths)
        places = trial.places(lengths, 3)
        valid = lengths[:, None] + torch.arange(3) < 10
        y = trial.extend(state, trial.x.gather(1, places), lengths, lengths=valid.sum(1))
        near(y[valid], expected.gather(1, places)[valid], f"after truncation to {lengths.tolist()}")
