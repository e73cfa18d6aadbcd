"""Masks against truth tables written out, composed, and asked for a few rows at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from armillary.nn.mask import Causal, Documents, Keys, Marked, Mask, Others, PerHead, Prefix, Spans, Window, both, dense

IDS = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 1, 1, 2, 2, 2]])
VALID = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]]).bool()
PLACES = torch.tensor([[0, 1, 0, 1, 2, 0], [0, 0, 1, 2, 3, 4]])  # positions of the tokens within their documents
LENGTHS = torch.tensor([3, 0])
B, T = IDS.shape


def table(allows: object) -> Tensor:
    """[B, T, S] from a Python predicate of (row, query, key)."""
    return torch.tensor([[[bool(allows(b, t, s)) for s in range(T)] for t in range(T)] for b in range(B)])  # type: ignore[operator]


CASES: dict[str, tuple[Mask, object]] = {
    "causal": (Causal(), lambda b, t, s: s <= t),
    "offset": (Causal(2), lambda b, t, s: s <= t + 2),
    "ragged": (Causal(torch.tensor([0, 3])), lambda b, t, s: s <= t + (0, 3)[b]),
    "prefix": (Prefix(LENGTHS), lambda b, t, s: s < (3, 0)[b]),
    "documents": (Documents(IDS, IDS), lambda b, t, s: IDS[b, t] == IDS[b, s]),
    "keys": (Keys(VALID), lambda b, t, s: VALID[b, s]),
    "both": (Causal() & Documents(IDS, IDS), lambda b, t, s: s <= t and IDS[b, t] == IDS[b, s]),
    "either": (Causal() | Prefix(LENGTHS), lambda b, t, s: s <= t or s < (3, 0)[b]),
    "window": (Window(1, 2), lambda b, t, s: -2 <= t - s <= 1),
    "dilated": (Window(None, 0, 2), lambda b, t, s: s <= t and (t - s) % 2 == 0),
    "others": (Others(), lambda b, t, s: t != s),
    "marked": (Marked(VALID), lambda b, t, s: VALID[b, s]),
    "stretches": (Spans(PLACES, PLACES, 2), lambda b, t, s: PLACES[b, t] // 2 == PLACES[b, s] // 2),
    "window or marked": (Window(0, 0) | Marked(VALID, 5), lambda b, t, s: t == s or VALID[b, s]),
    "marked of all kinds": (
        ((Causal() & (Window(1, 0) | Marked(VALID))) & Documents(IDS, IDS)) & Keys(VALID),
        lambda b, t, s: s <= t and (t - s <= 1 or VALID[b, s]) and IDS[b, t] == IDS[b, s] and VALID[b, s],
    ),
    "marked twice": (
        (Window(0, 0) | Marked(VALID)) & (Window(2, 0) | Marked(~VALID)),
        lambda b, t, s: (t == s or VALID[b, s]) and (0 <= t - s <= 2 or not VALID[b, s]),
    ),
    "all": (
        ((Causal() | Prefix(LENGTHS)) & Documents(IDS, IDS)) & Keys(VALID),
        lambda b, t, s: (s <= t or s < (3, 0)[b]) and IDS[b, t] == IDS[b, s] and VALID[b, s],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_masks_are_their_predicates(name: str) -> None:
    mask, allows = CASES[name]
    found = dense(mask, T, T, torch.device("cpu"))
    assert found is not None and found.dtype == torch.bool
    assert torch.equal(found.expand(B, 1, T, T)[:, 0], table(allows))


@pytest.mark.parametrize("name", CASES)
def test_a_few_rows_are_rows_of_the_whole(name: str) -> None:
    mask, allows = CASES[name]
    rows, columns = torch.tensor([1, 4]), torch.arange(5)
    assert torch.equal(mask.rows(rows, columns).expand(B, 1, 2, 5)[:, 0], table(allows)[:, rows][:, :, :5])


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_seen_beyond_the_bounds(name: str) -> None:
    mask, allows = CASES[name]
    rest = table(allows)
    marks = mask.marks(T)
    assert (marks is not None) == (mask.most(T) > 0)
    if marks is not None:
        assert int(marks.sum(1).max()) <= mask.most(T)
        rest = rest & ~marks[:, None]
    for at in range(1, T + 1):
        assert not rest[:, :at, mask.reach(at, T) :].any()
        assert not rest[:, at:, : mask.low(at)].any()
    places = mask.candidates(T, T, torch.device("cpu"))
    if places is not None:
        near = (places[:, :, None] == torch.arange(T)).any(1)
        assert not (rest & ~near).any()
    apart = torch.arange(T)[:, None] - torch.arange(T)
    assert not table(allows)[:, apart % mask.residues() != 0].any()


def test_bounds_spare_work() -> None:
    assert Causal().reach(2, T) == 2, "a causal mask must spare the work above the diagonal"
    assert (Causal() & Keys(VALID)).reach(2, T) == 2
    near = Causal() & (Window(1, 0) | Marked(VALID)) & Documents(IDS, IDS)
    assert (near.low(3), near.reach(4, T)) == (2, 4), "marked keys must not widen the bounds of the others"
    assert (Window(None, 0, 3) & Documents(IDS, IDS)).residues() == 3


@pytest.mark.parametrize("name", CASES)
def test_some_of_the_keys_are_columns_of_the_whole(name: str) -> None:
    mask, allows = CASES[name]
    places = torch.tensor([[4, 0, 1], [5, 3, 2]])
    found = mask.take(places, T).rows(torch.arange(T), torch.arange(3)).expand(B, 1, T, 3)[:, 0]
    assert torch.equal(found, table(allows).gather(2, places[:, None].expand(-1, T, -1)))


def test_heads_are_bounded_together() -> None:
    heads = PerHead((Window(0, 0) | Marked(VALID), Window(2, 0)))
    assert heads.low(4) == 2 and heads.most(T) == T
    found = heads.take(torch.tensor([[2, 5]]), T).rows(torch.arange(T), torch.arange(2))
    whole = dense(heads, T, T, torch.device("cpu"))
    assert whole is not None and torch.equal(found, whole[..., [2, 5]])


def test_none_allows_everything() -> None:
    causal = Causal()
    assert both(None, None) is None
    assert both(causal, None) is causal and both(None, causal) is causal
    assert dense(None, T, T, torch.device("cpu")) is None
