"""Linear Log-Normal attention against the equations of Nahshan et al. 2024, and its moments against softmax's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from armillary.base.errors import SettingsError, UnsupportedError
from armillary.base.settings import parse
from armillary.nn.context import Context
from armillary.nn.mechanism import MixerSettings, Order, Place, initialise
from armillary.nn.mixers.lln import PUBLISHED, LLNSettings, LogNormal, fitted
from armillary.nn.training import Training


def built(order: Order = "causal", **changes: Any) -> LogNormal:
    mixer = LLNSettings(**{"heads": 2, **changes}).build(Place(16, order=order))
    initialise(mixer, 3)
    mixer.deviations.copy_(torch.tensor([1.3, 0.8]))
    return mixer


def published(mixer: LogNormal, x: Tensor, causal: bool, block: int | None) -> Tensor:
    """Equations of the paper with every pair written out, given σ; the diagonal as a loop over blocks."""
    sigma_q, sigma_k = mixer.deviations.tolist()
    matched = ((sigma_q**2 * sigma_k**2 - mixer.intercept) / (2 * mixer.slope)) ** 0.5
    alpha, beta = matched / sigma_q, matched / sigma_k
    heads = []
    for h in range(2):
        q, k, v = (x @ product.weight[8 * h : 8 * h + 8].t() for product in (mixer.q, mixer.k, mixer.v))
        weights = (alpha * q).exp() @ (beta * k).exp().transpose(1, 2)
        weights = weights.tril() if causal else weights
        y = weights / weights.sum(-1, keepdim=True) @ v
        if block is not None:
            pieces = []
            for start in range(0, x.shape[1], block):
                part = slice(start, start + block)
                scores = q[:, part] @ k[:, part].transpose(1, 2) / 8**0.5
                if causal:
                    later = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
                    scores = scores.masked_fill(later, -torch.inf)
                pieces.append(torch.softmax(scores, -1) @ v[:, part])
            y = (y + torch.cat(pieces, 1)) / 2
        heads.append(y)
    return torch.cat(heads, -1) @ mixer.o.weight.t()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("block", [None, 8, 6])
@pytest.mark.parametrize("length", [1, 5, 70])
def test_it_is_the_papers(length: int, block: int | None, causal: bool, agree: Any) -> None:
    mixer = built("causal" if causal else "bidirectional", diagonal=block is not None, block=block)
    x = torch.randn(2, length, 16, requires_grad=True)
    found, expected = mixer(x, Context()), published(mixer, x, causal, block)
    agree(found, expected, 2e-5)
    weights, wanted = torch.randn_like(expected), [x, *mixer.parameters()]
    ours = torch.autograd.grad((found * weights).sum(), wanted)
    theirs = torch.autograd.grad((expected * weights).sum(), wanted)
    for a, b in zip(ours, theirs, strict=True):
        assert float((a - b).abs().max()) <= 1e-4 * max(float(b.abs().max()), 0.1)  # one token: q and k do not matter


def test_blocks_are_as_long_as_a_head_is_wide_unless_told() -> None:
    assert built().block == 8 and built(block=3).block == 3 and built(diagonal=False).block is None


def test_rows_of_chunks_start_where_their_blocks_stand(agree: Any) -> None:
    """Ragged rows, over several borders of blocks, against the whole."""
    mixer, x = built(block=4), torch.randn(2, 23, 16)
    with torch.no_grad():
        expected = mixer(x, Context())
        state = mixer.init_state(2, 1, torch.float32, "cpu")
        done = torch.zeros(2, dtype=torch.int64)
        for lengths in ([3, 0], [1, 9], [11, 1], [0, 7], [8, 6]):
            take = torch.tensor(lengths)
            places = (done[:, None] + torch.arange(12)).clamp(max=22)
            y = mixer.extend(x.gather(1, places[..., None].expand(-1, -1, 16)), state, Context(lengths=take))
            for row in range(2):
                n = lengths[row]
                if n:
                    agree(y[row, :n], expected[row, int(done[row]) : int(done[row]) + n], 2e-5)
            done = done + take
    assert done.tolist() == [23, 23]


@pytest.mark.parametrize("width", [16, 32, 64, 128])
def test_log_weights_spread_like_those_of_softmax(width: int) -> None:
    """With the fitted constants, at σ = 1, the variance over all pairs is within 5 %."""
    a, b = fitted(width)
    q, k = torch.randn(2, 700, width, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    ours, softmax = log_variance(q, k, a, b), float((q @ k.t() / width**0.5).var())
    assert ours == pytest.approx(softmax, rel=0.05)


def log_variance(q: Tensor, k: Tensor, a: float, b: float) -> float:
    """Of Σ_f exp(αq_f + βk_f) over all pairs, at σ_q = σ_k = 1."""
    matched = ((1 - b) / (2 * a)) ** 0.5
    return float(((matched * q).exp() @ (matched * k).exp().t()).log().var())


def test_the_published_constants_belong_to_heads_of_64() -> None:
    generator = torch.Generator().manual_seed(4)
    spread = {}
    for width in (32, 64):
        q, k = torch.randn(2, 700, width, generator=generator, dtype=torch.float64)
        spread[width] = log_variance(q, k, *PUBLISHED)
    assert spread[64] == pytest.approx(1.0, rel=0.07) and spread[32] > 1.25
    assert fitted(1) == pytest.approx((1.0, 0.0), abs=0.03)  # one feature: the log of its exponential is itself


def test_deviations_are_averages_over_updates_and_stand_still_otherwise() -> None:
    mixer, x = built(), 2 * torch.randn(2, 50, 16)
    mixer.reset(None)
    with torch.no_grad():
        before = mixer(x, Context())
        mixer.after_step(1, 10)
        assert torch.equal(mixer.deviations, torch.ones(2)), "outside an update nothing was seen"
        padding = torch.ones(2, 50, dtype=torch.bool)
        padding[1, 20:] = False
        assert torch.equal(mixer(x, Context(training=Training.of(1))), before)
        mixer.after_step(1, 10)
        first = torch.stack([(x @ product.weight.t()).std(correction=0) for product in (mixer.q, mixer.k)])
        torch.testing.assert_close(mixer.deviations, first)
        mixer(x, Context(padding=padding, training=Training.of(2)))
        mixer.after_step(2, 10)
        kept = x[padding]
        second = torch.stack([(kept @ product.weight.t()).std(correction=0) for product in (mixer.q, mixer.k)])
        torch.testing.assert_close(mixer.deviations, (first + second) / 2)
        assert not torch.equal(mixer(x, Context()), before)
        still = mixer.deviations.clone()
        for _ in range(3):
            mixer(x, Context())
        assert torch.equal(mixer.deviations, still)


def test_weights_are_a_distribution() -> None:
    for diagonal in (False, True):
        seen = built(diagonal=diagonal).sight(torch.randn(2, 40, 16), Context()).detach()
        assert float(seen.min()) >= 0
        torch.testing.assert_close(seen.sum(-1), torch.ones(2, 2, 40), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", ["causal", "bidirectional"])
def test_a_row_of_nothing_but_padding_is_finite(order: Order) -> None:
    mixer, x = built(order), torch.randn(2, 70, 16, requires_grad=True)
    padding = torch.ones(2, 70, dtype=torch.bool)
    padding[1] = False
    y = mixer(x, Context(padding=padding))
    (slope,) = torch.autograd.grad(y[0].square().sum(), x)
    assert bool(y.isfinite().all()) and bool(slope.isfinite().all()) and not slope[1].any()


def test_what_cannot_be_built_says_why() -> None:
    with pytest.raises(UnsupportedError, match="does not divide into 3 heads"):
        LLNSettings(heads=3).build(Place(16))
    with pytest.raises(SettingsError, match="block"):
        parse(MixerSettings, {"kind": "lln", "block": 0})
    with pytest.raises(SettingsError, match="constants"):
        parse(MixerSettings, {"kind": "lln", "constants": "guessed"})
