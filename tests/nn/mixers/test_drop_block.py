"""Drop-block by attention: dense attention outside of updates, and the spans found by a loop within."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from armillary.base.errors import SettingsError, UnsupportedError
from armillary.base.settings import parse
from armillary.nn.context import Context
from armillary.nn.mechanism import MixerSettings, Place
from armillary.nn.mixers.attention import AttentionSettings
from armillary.nn.mixers.drop_block import DropBlockAttention, DropBlockSettings
from armillary.nn.ops import attend
from armillary.nn.positions.alibi import AlibiSettings
from armillary.nn.training import Training

T = 12


def built(order: Any = "causal", **settings: Any) -> DropBlockAttention:
    made = DropBlockSettings(**{"heads": 2, "size": 3, "rate": 1.0, **settings}).build(Place(16, order=order))
    generator = torch.Generator().manual_seed(3)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return made


def update(seed: int = 1) -> Context:
    return Context(training=Training.of(seed))


def lost(weights: Tensor, spans: int, size: int) -> Tensor:
    """[B, T, S], query by query, from the weights [B, H, T, S] before anything is dropped."""
    found = torch.zeros(weights.shape[0], T, T, dtype=torch.bool)
    for row, each in enumerate(weights.mean(1)):
        for t, line in enumerate(each):
            peaks = []
            for start in range(0, T, size):
                others = [line[j].item() for j in range(start, min(T, start + size)) if j != t]
                peaks.append((max(others, default=0.0), start))
            for _, start in sorted(peaks, key=lambda peak: -peak[0])[:spans]:
                found[row, t, start : start + size] = True
            found[row, t, t] = False
    return found


@pytest.mark.parametrize("order", ["causal", "bidirectional"])
def test_outside_of_updates_and_at_rate_0_it_is_dense_attention_bit_for_bit(order: str) -> None:
    x = torch.randn(2, T, 16)
    for rate, ctx in ((1.0, Context()), (0.0, update())):
        mixer = built(order, rate=rate, channels=2)
        dense = AttentionSettings(heads=2).build(Place(16, order=order))
        dense.load_state_dict(mixer.state_dict())
        assert torch.equal(mixer(x, ctx), dense(x, Context()))


@pytest.mark.parametrize("block", [512, 5])
@pytest.mark.parametrize("position", [None, AlibiSettings()])
@pytest.mark.parametrize(("spans", "size"), [(1, 3), (2, 1), (1, 5)])
@pytest.mark.parametrize("order", ["causal", "bidirectional"])
def test_every_query_loses_its_strongest_spans(
    order: str, spans: int, size: int, position: Any, block: int, agree: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attend, "BLOCK", block)
    mixer = built(order, spans=spans, size=size, position=position)
    x = torch.randn(2, T, 16, requires_grad=True)
    weights = mixer.sight(x, Context())
    gone = lost(weights, spans, size)
    for row in range(2):
        for t in range(1 if order == "causal" else 0, T):
            others = weights[row].mean(0)[t].clone()
            others[t] = -1
            assert gone[row, t, others.argmax()], "the strongest of the others is not among the lost"
    left = weights.masked_fill(gone[:, None], 0)
    left = left / left.sum(-1, keepdim=True)
    expected = (left @ mixer.values(x, Context()).transpose(1, 2)).transpose(1, 2).flatten(2) @ mixer.o.weight.t()
    found = mixer(x, update())
    agree(found, expected)
    agree(mixer.sight(x, update()), left)
    ours, theirs = (torch.autograd.grad(y.square().sum(), [x, *mixer.parameters()]) for y in (found, expected))
    for a, b in zip(ours, theirs, strict=True):
        agree(a, b, 1e-4)


def test_the_share_that_is_kept_is_the_declared_one() -> None:
    """1 − rate · size / T both ways, but for a query whose own span is the strongest: it keeps itself."""
    mixer, x = built("bidirectional", rate=0.3, size=3), torch.randn(500, T, 16)
    kept = mixer.sight(x, update()) > 0
    taken = ~kept.all(-1).all(-1).all(-1)
    assert float(taken.float().mean()) == pytest.approx(0.3, abs=0.06)
    lost_keys = (~kept[taken][:, 0]).sum(-1)
    assert set(lost_keys.unique().tolist()) <= {2, 3}
    assert float(kept.float().mean()) == pytest.approx(1 - 0.3 * 3 / T, abs=0.03)


def test_tokens_lose_their_most_active_features(agree: Any) -> None:
    mixer, x = built(spans=0, channels=3), torch.randn(2, T, 16)
    frozen, values = mixer.freeze(x, Context()), mixer.values(x, Context())
    mixed = mixer.mix(frozen, values).flatten(2)
    least = mixed.abs().sort(-1, descending=True).values[..., 2:3]
    agree(mixer(x, update()), mixed.masked_fill(mixed.abs() >= least, 0) @ mixer.o.weight.t())


def test_an_update_sees_nothing_of_what_comes_later() -> None:
    mixer, x = built(channels=2), torch.randn(1, T, 16)
    moved = x.clone()
    moved[:, 6:] = torch.randn(1, 6, 16) * 5
    a, b = mixer(x, update()), mixer(moved, update())
    assert float((a[:, :6] - b[:, :6]).detach().abs().max()) <= 1e-6
    assert not torch.equal(a[:, 6:], b[:, 6:])


def test_noise_follows_from_the_seed() -> None:
    mixer, x = built(rate=0.5), torch.randn(8, T, 16)
    assert torch.equal(mixer(x, update(1)), mixer(x, update(1)))
    assert not torch.equal(mixer(x, update(1)), mixer(x, update(2)))


def test_packed_and_padded_rows_in_an_update(agree: Any) -> None:
    """Documents and padding stay out of it, whatever is dropped; a row of padding alone gives zeros."""
    mixer, x = built(size=1), torch.randn(1, T, 16)
    documents = (torch.arange(T) >= 6).long()[None]
    y = mixer(x, Context(documents=documents, training=Training.of(1)))
    agree(y[:, 6:], mixer(x[:, 6:], update()))
    padding = torch.tensor([[False] * 4 + [True] * 8])
    y = mixer(x, Context(padding=padding, training=Training.of(1)))
    agree(y[:, 4:], mixer(x[:, 4:], update()))
    nothing = mixer(x, Context(padding=torch.zeros(1, T, dtype=torch.bool), training=Training.of(1)))
    assert bool((nothing == 0).all())


def test_an_update_compiles_into_one_graph(agree: Any) -> None:
    mixer, x = built(rate=0.5, channels=2), torch.randn(4, T, 16)
    torch._dynamo.reset()
    compiled = torch.compile(mixer, backend="aot_eager", fullgraph=True, dynamic=False)
    agree(compiled(x, update()), mixer(x, update()))
    torch._dynamo.reset()


def test_what_cannot_be_built_says_why() -> None:
    for key, value in (("rate", 1.5), ("size", 0), ("spans", -1)):
        with pytest.raises(SettingsError, match=key):
            parse(MixerSettings, {"kind": "drop_block", key: value})
    with pytest.raises(SettingsError, match="nothing is dropped"):
        parse(MixerSettings, {"kind": "drop_block", "spans": 0})
    with pytest.raises(UnsupportedError, match="cannot look at a memory"):
        DropBlockSettings().build(Place(16, cross=True))
