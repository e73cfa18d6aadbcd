"""The attention op: its blocks, kernels and special cases against the definition with the whole matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from armillary.nn.mask import Causal, Documents, Keys, Mask, Others, PerHead, Prefix, Window, both
from armillary.nn.ops import attend as module
from armillary.nn.ops import blocked, plain_ops
from armillary.nn.ops.attend import attend, attend_plain

B, H, G, T, K = 2, 4, 2, 33, 8
IDS = torch.repeat_interleave(torch.tensor([0, 1, 2]), torch.tensor([10, 3, 20])).expand(B, T)
REAL = torch.arange(T) < torch.tensor([[33], [20]])

_NEAR = Window(5, 0)
MASKS: dict[str, Mask | None] = {
    "none": None,
    "causal": Causal(),
    "documents": Causal() & Documents(IDS, IDS),
    "padding": Keys(REAL),
    "prefix": Causal() | Prefix(torch.tensor([12, 3])),
    "offset": Causal(torch.tensor([0, -5])),  # the first queries of the second row see nothing
    "window": Window(6, 0),
    "both_ways": Window(4, 9),
    "dilated": Window(9, 0, dilation=3),
    "dilated_both_ways": Window(8, 4, dilation=4),
    "window_of_documents": Window(6, 0) & Documents(IDS, IDS),
    "others": Causal() & Others(alone=torch.arange(T)[None] == 0),
    "heads": PerHead((_NEAR, Causal(), _NEAR, Window(9, 0, dilation=3))),
    "heads_of_documents": both(PerHead((_NEAR, Causal(), _NEAR, Causal())), Documents(IDS, IDS)),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": torch.tensor([0.3, -1.0, 2.0, 0.0])},
    "bias": {"bias": lambda rows, columns: -0.1 * (rows[:, None] - columns).abs().float().expand(1, H, -1, -1)},
}


def tensors(value_width: int = K) -> list[Tensor]:
    shapes = [(B, H, T, K), (B, G, T, K), (B, G, T, value_width)]
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def whole_matrix(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None) -> Tensor:
    """The definition again, under the mask as PyTorch's own attention takes it."""
    k, v = (x.repeat_interleave(H // G, 1) for x in (k, v))
    seen = None if mask is None else mask.rows(torch.arange(T), torch.arange(T)).expand(B, H, -1, -1)
    scores = q @ k.transpose(2, 3) * 0.4
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    return torch.softmax(scores, -1).nan_to_num(0.0) @ v


@pytest.mark.parametrize("mask", MASKS)
def test_the_plain_form_is_the_whole_matrix(mask: str, agree: Any) -> None:
    """Also where it gathers the few keys of each query."""
    q, k, v = tensors()
    with torch.no_grad(), plain_ops():
        agree(attend(q, k, v, mask=MASKS[mask], scale=0.4)[0], whole_matrix(q, k, v, MASKS[mask]))


def compare(q: Tensor, k: Tensor, v: Tensor, learned: list[Tensor], agree: Any, **request: Any) -> None:
    found, mass = attend(q, k, v, scale=0.4, **request)
    expected, whole = attend_plain(q, k, v, scale=0.4, **request)
    agree(found, expected)
    assert (mass is None) == (whole is None)
    if mass is not None:
        agree(mass, whole)
    weights = torch.randn_like(expected)
    ours = torch.autograd.grad((found * weights).sum(), [q, k, v, *learned])
    theirs = torch.autograd.grad((expected * weights).sum(), [q, k, v, *learned])
    for a, b in zip(ours, theirs, strict=True):
        agree(a, b, 2e-5)


@pytest.mark.parametrize("rows", [8, 512])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mask", MASKS)
def test_blocks_of_rows_give_the_definition(
    mask: str, variant: str, rows: int, agree: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK", rows)
    monkeypatch.setattr(blocked, "ROWS", rows)
    q, k, v = tensors()
    request = VARIANTS[variant]
    compare(q, k, v, [], agree, mask=MASKS[mask], **request)
    with torch.no_grad():
        expected, _ = attend_plain(q, k, v, mask=MASKS[mask], scale=0.4, **request)
        agree(attend(q, k, v, mask=MASKS[mask], scale=0.4, **request)[0], expected)
        if mask in ("none", "padding"):
            few, _ = attend(q[:, :, :3], k, v, mask=MASKS[mask], scale=0.4, **request)
            if variant != "bias":
                agree(few, expected[:, :, :3])


def test_learned_scores_and_sinks_learn_through_blocks(agree: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 8)
    q, k, v = tensors(value_width=6)
    table = torch.randn(H, T, T, requires_grad=True)
    sinks = torch.randn(H, requires_grad=True)
    bias = lambda rows, columns: table[:, rows][:, :, columns][None]  # noqa: E731
    compare(q, k, v, [table], agree, mask=Causal(), bias=bias)
    compare(q, k, v, [table, sinks], agree, mask=Causal(), bias=bias, sinks=sinks, want_mass=True)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mask", MASKS)
def test_mass_sums_the_weights_of_the_queries(mask: str, variant: str) -> None:
    q, k, v = tensors()
    request = VARIANTS[variant]
    _, mass = attend(q, k, v, mask=MASKS[mask], scale=0.4, want_mass=True, **request)
    assert mass is not None and mass.shape == (B, H, T)
    alive = torch.full((B,), T) if mask != "offset" else torch.tensor([T, T - 5])
    total = mass.sum(-1).detach()
    if variant == "sinks":
        assert bool((total < alive[:, None]).all()), "sinks took nothing"
    else:
        torch.testing.assert_close(total, alive[:, None].expand(B, H).float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("queries", [1, 3, 33])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_query_that_sees_nothing_gives_zeros(variant: str, queries: int, gradients: bool) -> None:
    q, k, v = tensors()
    seen = torch.zeros(B, T, dtype=torch.bool)
    seen[0] = True
    with torch.set_grad_enabled(gradients):
        y, _ = attend(q[:, :, :queries], k, v, mask=Keys(seen), scale=0.4, **VARIANTS[variant])
        assert bool((y[1] == 0).all()) and bool((y[0] != 0).all())
        if gradients:
            for slope in torch.autograd.grad(y.sum(), [q, k, v]):
                assert bool(slope.isfinite().all())


def test_the_fused_form_is_pytorchs(agree: Any) -> None:
    """An oracle of our own definition, for the plainest request."""
    q, k, v = tensors()
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.4, enable_gqa=True)
    agree(attend_plain(q, k, v, mask=Causal(), scale=0.4)[0], expected)
    agree(attend(q, k, v, mask=Causal(), scale=0.4)[0], expected)


def test_no_square_matrix_outlives_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything kept for the backward pass is linear in length: no saved tensor has T·T elements."""
    monkeypatch.setattr(module, "BLOCK", 32)
    length = 256
    q, k = torch.randn(1, 1, length, 4, requires_grad=True), torch.randn(1, 1, length, 4)
    for request in ({"mask": Causal()}, {"mask": Causal(), "softcap": 2.0}, {"mask": None}):
        sizes: list[int] = []

        def keep(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            attend(q, k, k, scale=0.5, **request)  # type: ignore[arg-type]
        assert sizes and max(sizes) < length * length / 4
