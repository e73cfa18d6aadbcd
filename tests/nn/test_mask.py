"""Masks against truth tables written out, composed, and asked for a few rows at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from armillary.nn.mask import Causal, Documents, Keys, Mask, Prefix, both, dense

IDS = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 1, 1, 2, 2, 2]])
VALID = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]]).bool()
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
def test_nothing_is_seen_beyond_the_reach(name: str) -> None:
    mask, allows = CASES[name]
    for stop in range(1, T + 1):
        reach = mask.reach(stop, T)
        assert not table(allows)[:, :stop, reach:].any()
    assert Causal().reach(2, T) == 2, "a causal mask must spare the work above the diagonal"
    assert (Causal() & Keys(VALID)).reach(2, T) == 2


def test_none_allows_everything() -> None:
    causal = Causal()
    assert both(None, None) is None
    assert both(causal, None) is causal and both(None, causal) is causal
    assert dense(None, T, T, torch.device("cpu")) is None
