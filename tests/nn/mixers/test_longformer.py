"""Longformer against transformers' layer with global tokens, and its causal form against loops over tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LongformerConfig
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

from armillary.base.errors import SettingsError, UnsupportedError
from armillary.base.settings import parse
from armillary.nn.context import Context
from armillary.nn.linear import LinearSettings
from armillary.nn.mechanism import Place, initialise
from armillary.nn.mixers.attention import AttentionSettings
from armillary.nn.mixers.longformer import Longformer, LongformerSettings
from armillary.nn.ops import attend as module
from armillary.nn.positions.alibi import AlibiSettings

T, WIDTH, N = 40, 16, 3
PARTS = (("q", "query"), ("k", "key"), ("v", "value"))


def made(order: str = "causal", **settings: Any) -> Longformer:
    mixer = LongformerSettings(**{"heads": 2, "window": 5, "globals": N, **settings}).build(Place(WIDTH, order=order))
    generator = torch.Generator().manual_seed(3)
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.4, generator=generator)
    return mixer


@pytest.mark.parametrize("padded", [False, True])
def test_both_ways_is_the_peers_layer(padded: bool, agree: Any, load: Any, shake: Any) -> None:
    config = LongformerConfig(
        hidden_size=WIDTH, num_attention_heads=2, attention_window=[8], attention_probs_dropout_prob=0.0
    )
    theirs = LongformerSelfAttention(config, 0)
    shake(theirs)
    ours = made("bidirectional", bias=True, out_bias=False)
    table = {"o.weight": torch.eye(WIDTH)}
    for a, b in PARTS:
        for part in ("weight", "bias"):
            table[f"{a}.{part}"] = getattr(getattr(theirs, b), part)
            table[f"{a}_global.{part}"] = getattr(getattr(theirs, f"{b}_global"), part)
    load(ours, table)
    x, weights = torch.randn(2, T, WIDTH, requires_grad=True), torch.randn(2, T, WIDTH)
    padding = torch.arange(T) < torch.tensor([[T], [31 if padded else T]])
    # theirs: 10000 for global tokens, −10000 for padding, else 0
    kinds = torch.zeros(2, T).masked_fill(~padding, -10000.0)
    kinds[:, :N] = 10000.0
    expected = theirs(x, kinds, is_index_masked=kinds < 0, is_index_global_attn=kinds > 0, is_global_attn=True)[0]
    found = ours(x, Context(padding=padding))
    real = padding[..., None]
    agree(found * real, expected * real, 2e-5)
    wanted = [x, *(getattr(ours, f"{a}{kind}").weight for a, _ in PARTS for kind in ("", "_global"))]
    peers = [x, *(getattr(theirs, f"{b}{kind}").weight for _, b in PARTS for kind in ("", "_global"))]
    mine = torch.autograd.grad((found * weights * real).sum(), wanted)
    for a, b in zip(mine, torch.autograd.grad((expected * weights * real).sum(), peers), strict=True):
        agree(a, b, 1e-4)


def written_out(mixer: Longformer, x: Tensor, window: int) -> Tensor:
    """Causal: a token sees its window and the first N; the first N see one another by the global products."""
    rows = []
    for t in range(len(x)):
        kind = "_global" if t < N else ""
        q, k, v = (getattr(mixer, f"{name}{kind}").weight for name in "qkv")
        seen = [s for s in range(t + 1) if t < N or s < N or t - s < window]
        heads = []
        for h in range(2):
            part = slice(8 * h, 8 * h + 8)
            scores = (x[seen] @ k[part].t()) @ (q[part] @ x[t]) / 8**0.5
            heads.append(torch.softmax(scores, 0) @ (x[seen] @ v[part].t()))
        rows.append(torch.cat(heads))
    return torch.stack(rows) @ mixer.o.weight.t()


@pytest.mark.parametrize("block", [512, 8])
def test_causal_is_its_definition(block: int, agree: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    mixer = made()
    x, weights = torch.randn(1, T, WIDTH, requires_grad=True), torch.randn(1, T, WIDTH)
    found, expected = mixer(x, Context()), written_out(mixer, x[0], 5)[None]
    agree(found, expected, 2e-5)
    wanted = [x, *mixer.parameters()]
    mine = torch.autograd.grad((found * weights).sum(), wanted)
    for a, b in zip(mine, torch.autograd.grad((expected * weights).sum(), wanted), strict=True):
        agree(a, b, 1e-4)
    with torch.no_grad():
        state = mixer.init_state(1, T, torch.float32, "cpu")
        cuts = [(0, 2), (2, 9), (9, 10), (10, 33), (33, T)]
        pieces = [mixer.extend(x[:, a:b], state, Context(positions=torch.arange(a, b)[None])) for a, b in cuts]
        agree(torch.cat(pieces, 1), expected, 2e-5)


def test_the_state_does_not_grow() -> None:
    mixer = made()
    state = mixer.init_state(2, 1000, torch.float32, "cpu")
    size = state.nbytes
    with torch.no_grad():
        mixer.extend(torch.randn(2, 100, WIDTH), state, Context())
    # keys and values of five tokens, and of the first three by both products, and which those are
    assert state.nbytes == size == 2 * ((5 * 2 + N * 4) * WIDTH * 4 + N * 8)


@pytest.mark.parametrize("order", ["causal", "bidirectional"])
def test_all_global_with_one_set_of_products_is_dense(order: str, agree: Any) -> None:
    for settings in ({"globals": 1000}, {"window": 1000}):
        mixer, dense = made(order, **settings), AttentionSettings(heads=2).build(Place(WIDTH, order=order))
        dense.load_state_dict({name: p for name, p in mixer.state_dict().items() if "_global" not in name})
        for name in "qkv":
            getattr(mixer, f"{name}_global").load_state_dict(getattr(mixer, name).state_dict())
        for length in (1, 2, T):
            x = torch.randn(2, length, WIDTH)
            agree(mixer(x, Context()), dense(x, Context()), 2e-5)


def test_global_products_start_as_the_local_ones() -> None:
    mixer = LongformerSettings(bias=True).build(Place(WIDTH))
    initialise(mixer, 5)
    for name in "qkv":
        local, own = getattr(mixer, name), getattr(mixer, f"{name}_global")
        assert torch.equal(local.weight, own.weight) and local.weight is not own.weight
        assert local.weight.std().item() > 0


@pytest.mark.parametrize("order", ["causal", "bidirectional"])
def test_every_document_has_its_own_global_tokens(order: str, agree: Any) -> None:
    mixer = made(order)
    x = torch.randn(2, T, WIDTH)
    sizes = [17, 2, 21]
    documents = torch.repeat_interleave(torch.arange(3), torch.tensor(sizes)).expand(2, -1)
    positions = torch.cat([torch.arange(n) for n in sizes])[None]
    found = mixer(x, Context(documents=documents, positions=positions))
    agree(found, torch.cat([mixer(part, Context()) for part in x.split(sizes, 1)], 1), 2e-5)


def test_blocks_of_rows_touch_few_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 8)
    touched: list[int] = []
    whole = module._rows

    def watched(q: Tensor, k: Tensor, v: Tensor, start: int, stop: int, low: int, reach: int, *rest: Any) -> Any:
        touched.append(reach - low + (0 if rest[-1] is None else rest[-1].places.shape[1]))
        return whole(q, k, v, start, stop, low, reach, *rest)

    monkeypatch.setattr(module, "_rows", watched)
    made()(torch.randn(2, T, WIDTH), Context())
    assert max(touched) == 8 + 4 + N


def test_a_graph_serves_packed_rows(agree: Any) -> None:
    mixer = made()
    x, sizes = torch.randn(2, T, WIDTH), [17, 23]
    documents = torch.repeat_interleave(torch.arange(2), torch.tensor(sizes)).expand(2, -1)
    ctx = Context(documents=documents, positions=torch.cat([torch.arange(n) for n in sizes])[None])
    torch._dynamo.reset()
    agree(torch.compile(mixer, backend="aot_eager", fullgraph=True, dynamic=False)(x, ctx), mixer(x, ctx), 2e-5)
    torch._dynamo.reset()


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(SettingsError, match="globals"):
        LongformerSettings(globals=0)
    with pytest.raises(SettingsError, match="rotations only"):
        LongformerSettings(position=AlibiSettings())
    with pytest.raises(SettingsError, match="diagonal must be true"):
        LongformerSettings(diagonal=False)
    with pytest.raises(UnsupportedError, match="cannot be prefix"):
        LongformerSettings().build(Place(WIDTH, order="prefix"))


@pytest.mark.parametrize("kind", ["dense", "low_rank"])
def test_global_products_start_as_copies_of_the_local_ones(kind: str) -> None:
    linear = {"all": parse(LinearSettings, {"kind": kind})}
    mixer = LongformerSettings(heads=2, bias=True).build(Place(16, linear=linear))
    initialise(mixer, 1)
    for name in ("q", "k", "v"):
        own = getattr(mixer, f"{name}_global").state_dict()
        for part, value in getattr(mixer, name).state_dict().items():
            assert torch.equal(own[part], value), f"{name}.{part}"
            assert bool(value.any()) or part.endswith("bias")
