"""Windows against peers' layers from the same weights, and against dense attention under the mask written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LongformerConfig, MistralConfig
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralRotaryEmbedding

from armillary.base.errors import SettingsError, UnsupportedError
from armillary.nn.context import Context
from armillary.nn.mechanism import Place
from armillary.nn.mixers.attention import AttentionSettings
from armillary.nn.mixers.window import WindowAttention, WindowSettings
from armillary.nn.positions.rope import RopeSettings

T, WIDTH = 40, 16


def slopes(y: Tensor, weights: Tensor, wanted: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad((y * weights).sum(), wanted)


def test_causal_is_mistrals(agree: Any, load: Any, shake: Any) -> None:
    config = MistralConfig(
        hidden_size=WIDTH, num_attention_heads=4, num_key_value_heads=2, head_dim=4, sliding_window=5
    )
    config._attn_implementation = "eager"
    theirs = MistralAttention(config, 0)
    shake(theirs)
    ours = WindowSettings(window=5, kv_heads=2, position=RopeSettings()).build(Place(WIDTH))
    names = {"q.weight": "q_proj", "k.weight": "k_proj", "v.weight": "v_proj", "o.weight": "o_proj"}
    load(ours, {own: getattr(theirs, name).weight for own, name in names.items()})
    x, weights = torch.randn(2, T, WIDTH, requires_grad=True), torch.randn(2, T, WIDTH)
    steps = torch.arange(T)
    distance = steps[:, None] - steps
    seen = torch.where((distance >= 0) & (distance < 5), 0.0, -torch.inf)[None, None]
    rotation = MistralRotaryEmbedding(config)(x, steps[None])
    expected = theirs(x, rotation, seen)[0]
    found = ours(x, Context())
    agree(found, expected)
    mine = slopes(found, weights, [x, ours.q.weight, ours.v.weight])
    peers = slopes(expected, weights, [x, theirs.q_proj.weight, theirs.v_proj.weight])
    for a, b in zip(mine, peers, strict=True):
        agree(a, b, 2e-5)


def test_both_ways_is_longformers(agree: Any, load: Any, shake: Any) -> None:
    """Without global tokens; their window counts both sides."""
    config = LongformerConfig(
        hidden_size=WIDTH, num_attention_heads=2, attention_window=[8], attention_probs_dropout_prob=0.0
    )
    theirs = LongformerSelfAttention(config, 0)
    shake(theirs)
    ours = WindowSettings(heads=2, window=5, bias=True, out_bias=False).build(Place(WIDTH, order="bidirectional"))
    ours.o.weight = nn.Parameter(torch.eye(WIDTH))
    own = {
        f"{a}.{part}": getattr(getattr(theirs, b), part)
        for a, b in (("q", "query"), ("k", "key"), ("v", "value"))
        for part in ("weight", "bias")
    }
    load(ours, own | {"o.weight": torch.eye(WIDTH)})
    x, weights = torch.randn(2, T, WIDTH, requires_grad=True), torch.randn(2, T, WIDTH)
    none = torch.zeros(2, T)
    expected = theirs(x, none, is_index_masked=none.bool(), is_index_global_attn=none.bool(), is_global_attn=False)[0]
    found = ours(x, Context())
    agree(found, expected, 2e-5)
    for a, b in zip(slopes(found, weights, [x]), slopes(expected, weights, [x]), strict=True):
        agree(a, b, 5e-5)


@pytest.mark.parametrize("both_ways", [False, True])
def test_every_head_sees_its_own_window(both_ways: bool) -> None:
    order = "bidirectional" if both_ways else "causal"
    settings = WindowSettings(window=(1, 3, 2, 9), dilation=(1, 1, 4, 2))
    mixer = settings.build(Place(WIDTH, order=order))
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        weights = mixer.sight(torch.randn(1, T, WIDTH), Context())[0]
    distance = torch.arange(T)[:, None] - torch.arange(T)
    for head, (window, gap) in enumerate([(1, 1), (3, 1), (2, 4), (9, 2)]):
        far = (window - 1) * gap
        seen = (distance.abs() <= far) & (distance % gap == 0)
        if not both_ways:
            seen &= distance >= 0
        assert torch.equal(weights[head] > 0, seen)


def test_a_stack_reaches_as_far_as_its_windows() -> None:
    """Locality-constrained attention: L layers of radius r reach L·r tokens back and no further."""
    layers: list[WindowAttention] = [WindowSettings(window=4).build(Place(WIDTH)) for _ in range(3)]
    for layer in layers:
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.4)
    x = torch.randn(1, T, WIDTH, dtype=torch.float64, requires_grad=True)
    y = x
    for layer in layers:
        y = layer.double()(y, Context())
    slope = torch.autograd.grad(y[0, 30].sum(), x)[0][0].abs().sum(1)
    assert (slope[: 30 - 9] == 0).all() and (slope[30 - 9 : 31] > 0).all() and (slope[31:] == 0).all()


def test_the_state_is_a_ring() -> None:
    mixer = WindowSettings(window=6).build(Place(WIDTH))
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.4)
    state = mixer.init_state(2, 1000, torch.float32, "cpu")
    size = state.nbytes
    with torch.no_grad():
        x = torch.randn(2, 300, WIDTH)
        whole = mixer(x, Context())
        pieces = [mixer.extend(x[:, at : at + 100], state, Context()) for at in range(0, 300, 100)]
    assert state.nbytes == size == 2 * 4 * 2 * 6 * 4 * 4  # rows, heads, k and v, window, head width, float32
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-5)


def test_packed_windows_through_the_blocks(agree: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of rows take only the keys that a window can reach, also under documents and padding."""
    from armillary.nn.ops import attend as module

    monkeypatch.setattr(module, "BLOCK", 8)
    narrow = WindowSettings(window=5, position=RopeSettings()).build(Place(WIDTH))
    for parameter in narrow.parameters():
        nn.init.normal_(parameter, std=0.4)
    x = torch.randn(2, T, WIDTH)
    documents = (torch.arange(T) >= 17).long().expand(2, -1)
    touched: list[int] = []
    whole = module._rows

    def watched(q: Tensor, k: Tensor, v: Tensor, start: int, stop: int, low: int, reach: int, *rest: Any) -> Any:
        touched.append(reach - low)
        return whole(q, k, v, start, stop, low, reach, *rest)

    monkeypatch.setattr(module, "_rows", watched)
    found = narrow(x, Context(documents=documents))
    assert max(touched) <= 8 + 4
    alone = torch.cat(
        [narrow(x[:, :17], Context()), narrow(x[:, 17:], Context(positions=torch.arange(17, T)[None]))], 1
    )
    agree(found, alone, 2e-5)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(SettingsError, match="window must be at least 1"):
        WindowSettings(window=0)
    with pytest.raises(SettingsError, match="window lists 3 heads, but there are 4"):
        WindowSettings(window=(1, 2, 3))
    with pytest.raises(SettingsError, match="dilation must be at least 1"):
        WindowSettings(dilation=(1, 0, 1, 1))
    with pytest.raises(UnsupportedError, match="cannot look at a memory"):
        WindowSettings().build(Place(WIDTH, cross=True))
    with pytest.raises(UnsupportedError, match="cannot be prefix"):
        WindowSettings().build(Place(WIDTH, order="prefix"))


def test_a_window_wider_than_the_sequence_is_dense(agree: Any) -> None:
    wide, dense = (each.build(Place(WIDTH)) for each in (WindowSettings(window=1000), AttentionSettings()))
    for parameter in wide.parameters():
        nn.init.normal_(parameter, std=0.4)
    dense.load_state_dict(wide.state_dict())
    for length in (1, 3, T):
        x = torch.randn(2, length, WIDTH)
        agree(wide(x, Context()), dense(x, Context()))
