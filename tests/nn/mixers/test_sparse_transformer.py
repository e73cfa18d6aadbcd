"""Strided and fixed patterns against the paper's index sets, written as loops, and dense attention over them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from armillary.base.errors import SettingsError, UnsupportedError
from armillary.nn.context import Context
from armillary.nn.mechanism import Place
from armillary.nn.mixers.sparse_transformer import SparseTransformer, SparseTransformerSettings
from armillary.nn.ops import attend as module

T, WIDTH, L, C = 29, 16, 6, 2


def made(order: str = "causal", layer: int = 0, **settings: Any) -> SparseTransformer:
    chosen = SparseTransformerSettings(**{"stride": L, "summary": C, **settings})
    mixer = chosen.build(Place(WIDTH, order=order, layer=layer))
    generator = torch.Generator().manual_seed(3)
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return mixer


def published(i: int, part: str, stretch: int = 0, both_ways: bool = False) -> set[int]:
    """Section 4.3 of the paper: A_i of each part (and itself)."""
    tokens = range(T) if both_ways else range(i + 1)
    if part == "strided A":
        return {j for j in tokens if abs(i - j) <= L}
    if part == "strided B":
        return {j for j in tokens if (i - j) % L == 0}
    if part == "fixed A":
        return {j for j in tokens if math.floor(j / L) == math.floor(i / L)}
    first = L - C * (stretch + 1)
    return {j for j in tokens if first <= j % L < first + C} | {i}


def heads(pattern: str, combine: str, layer: int, both_ways: bool) -> Tensor:
    """[H, T, T] bool."""
    table = torch.zeros(4, T, T, dtype=torch.bool)
    for head in range(4):
        for i in range(T):
            stretch = (head // 2 if combine == "heads" else head) % (L // C)
            near = published(i, f"{pattern} A", both_ways=both_ways)
            far = published(i, f"{pattern} B", stretch, both_ways)
            chosen = {"heads": (near, far)[head % 2], "layers": (near, far)[layer % 2], "union": near | far}[combine]
            table[head, i, list(chosen)] = True
    return table


CASES = [
    (pattern, combine, layer, order)
    for pattern in ("strided", "fixed")
    for combine, layer in (("heads", 0), ("union", 0), ("layers", 0), ("layers", 1))
    for order in ("causal", "bidirectional")
]


@pytest.mark.parametrize(("pattern", "combine", "layer", "order"), CASES)
def test_it_is_dense_attention_over_the_papers_sets(
    pattern: str, combine: str, layer: int, order: str, agree: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK", 8)
    mixer = made(order, layer, pattern=pattern, combine=combine)
    seen = heads(pattern, combine, layer, order == "bidirectional")
    x, weights = torch.randn(2, T, WIDTH, requires_grad=True), torch.randn(2, T, WIDTH)

    def dense() -> Tensor:
        q, k, v = (product(x).unflatten(-1, (4, 4)).transpose(1, 2) for product in (mixer.q, mixer.k, mixer.v))
        scores = (q @ k.transpose(2, 3) / 2).masked_fill(~seen, -torch.inf)
        return mixer.o((torch.softmax(scores, -1) @ v).transpose(1, 2).flatten(2))

    found, expected = mixer(x, Context()), dense()
    agree(found, expected, 2e-5)
    wanted = [x, *mixer.parameters()]
    ours = torch.autograd.grad((found * weights).sum(), wanted)
    for a, b in zip(ours, torch.autograd.grad((expected * weights).sum(), wanted), strict=True):
        agree(a, b, 1e-4)
    with torch.no_grad():
        assert torch.equal(mixer.sight(x[:1], Context())[0] > 0, seen)


@pytest.mark.parametrize("pattern", ["strided", "fixed"])
def test_density_is_the_closed_form(pattern: str) -> None:
    """Causal, n = m·l tokens: A of `strided` has l entries a row less its beginning, and so on."""
    n, m = 24, 4
    near, far = (made(pattern=pattern, combine="layers", layer=layer, distinct=False) for layer in (0, 1))
    with torch.no_grad():
        counts = [int((each.sight(torch.randn(1, n, WIDTH), Context())[0, 0] > 0).sum()) for each in (near, far)]
    if pattern == "strided":
        assert counts == [n * (L + 1) - L * (L + 1) // 2, L * m * (m + 1) // 2]
    else:
        # a block's summary: seen by later blocks whole, within its block as a triangle; and each other token itself
        summaries = m * (m - 1) // 2 * L * C + m * C * (C + 1) // 2
        assert counts == [m * L * (L + 1) // 2, summaries + m * (L - C)]


@pytest.mark.parametrize("pattern", ["strided", "fixed"])
@pytest.mark.parametrize("combine", ["heads", "union", "layers"])
def test_two_layers_connect_everything(pattern: str, combine: str) -> None:
    first, second = (heads(pattern, combine, layer, False).any(0) for layer in (0, 1))
    for layer, table in enumerate((first, second)):
        with torch.no_grad():
            mixer = made(pattern=pattern, combine=combine, layer=layer)
            assert torch.equal((mixer.sight(torch.randn(1, T, WIDTH), Context())[0] > 0).any(0), table)
    # information moves through A before B (layers), or through either
    joined = (second.long() @ first.long() > 0) | (first.long() @ second.long() > 0)
    assert torch.equal(joined, torch.ones(T, T, dtype=torch.bool).tril())


def packed(mixer: SparseTransformer, x: Tensor) -> Tensor:
    sizes = [11, 3, 15]
    documents = torch.repeat_interleave(torch.arange(3), torch.tensor(sizes)).expand(2, -1)
    positions = torch.cat([torch.arange(n) for n in sizes])[None]
    found = mixer(x, Context(documents=documents, positions=positions))
    alone = torch.cat([mixer(part, Context()) for part in x.split(sizes, 1)], 1)
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)
    return found


@pytest.mark.parametrize("combine", ["heads", "union"])
@pytest.mark.parametrize("pattern", ["strided", "fixed"])
def test_blocks_are_counted_from_the_start_of_each_document(pattern: str, combine: str) -> None:
    packed(made(pattern=pattern, combine=combine), torch.randn(2, T, WIDTH))


def test_blocks_of_rows_touch_few_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fixed patterns: near keys by their bounds, summaries picked, also in packed rows."""
    monkeypatch.setattr(module, "BLOCK", 4)
    touched: list[int] = []
    whole = module._rows

    def watched(q: Tensor, k: Tensor, v: Tensor, start: int, stop: int, low: int, reach: int, *rest: Any) -> Any:
        touched.append(reach - low + (0 if rest[-1] is None else rest[-1].places.shape[1]))
        return whole(q, k, v, start, stop, low, reach, *rest)

    monkeypatch.setattr(module, "_rows", watched)
    x = torch.randn(2, T, WIDTH)
    made(combine="heads", distinct=False)(x, Context())
    assert max(touched) == 4 + T * C // L  # part B: its own rows and nine summaries
    touched.clear()
    packed(made(combine="union", distinct=False), x)
    assert max(touched) <= 4 + (L - 1) + T * C // L


def test_strided_heads_under_documents_go_by_residue(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    whole = module._rows

    def watched(q: Tensor, k: Tensor, *rest: Any) -> Any:
        calls.append(q.shape[2] * k.shape[2])
        return whole(q, k, *rest)

    monkeypatch.setattr(module, "_rows", watched)
    mixer = made(pattern="strided", combine="layers", layer=1)
    mixer(torch.randn(1, T, WIDTH), Context(documents=torch.zeros(1, T, dtype=torch.int64)))
    assert len(calls) == L and sum(calls) == 5 * 5**2 + 4**2


def test_a_graph_bounds_what_it_cannot_count() -> None:
    """In a compiled block the number of summaries follows from the length; positions that break it are refused."""
    mixer = made(combine="heads", distinct=False)
    x = torch.randn(2, T, WIDTH)
    torch._dynamo.reset()
    compiled = torch.compile(mixer, backend="aot_eager", fullgraph=True, dynamic=False)
    positions = torch.stack([torch.arange(T), torch.cat([torch.arange(20), torch.arange(9)])])
    documents = (positions.cumsum(1) < 0).long() + (torch.arange(T) >= 20).long() * torch.tensor([[0], [1]])
    ctx = Context(positions=positions, documents=documents)
    torch.testing.assert_close(compiled(x, ctx), mixer(x, ctx), rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="more keys are marked"):
        compiled(x, ctx.replace(positions=torch.full_like(positions, L - 1)))
    torch._dynamo.reset()


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"summary \(9\) must be at most stride \(4\)"):
        SparseTransformerSettings(stride=4, summary=9)
    with pytest.raises(SettingsError, match="needs two heads"):
        SparseTransformerSettings(heads=1)
    with pytest.raises(SettingsError, match="stride"):
        SparseTransformerSettings(stride=0)
    with pytest.raises(UnsupportedError, match="cannot be prefix"):
        SparseTransformerSettings().build(Place(WIDTH, order="prefix"))
