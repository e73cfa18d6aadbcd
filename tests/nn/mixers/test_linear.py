"""Linear attention against the formulas of Katharopoulos et al. 2020, as loops over heads and tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from armillary.base.errors import SettingsError, UnsupportedError
from armillary.base.settings import parse
from armillary.nn.context import Context
from armillary.nn.mechanism import Mixer, MixerSettings, Order, Place, initialise
from armillary.nn.mixers.linear import LinearAttentionSettings

KINDS = ("linear", "taylor", "performer")


def built(order: Order = "causal", **changes: Any) -> Mixer:
    mixer = LinearAttentionSettings(**{"heads": 2, **changes}).build(Place(16, order=order))
    initialise(mixer, 3)
    return mixer


def phi(x: Tensor) -> Tensor:
    return F.elu(x) + 1


def published(mixer: Any, x: Tensor, form: str) -> Tensor:
    """Equation 9 as an explicit matrix (both ways or causal), and equations 16 to 20 as a recurrence."""
    heads = []
    for h in range(mixer.heads):
        part = slice(h * mixer.width, (h + 1) * mixer.width)
        q, k, v = (x @ product.weight[part].t() for product in (mixer.q, mixer.k, mixer.v))
        if form == "recurrent":
            s, z, rows = torch.zeros(len(x), mixer.width, mixer.width), torch.zeros(len(x), mixer.width), []
            for t in range(x.shape[1]):
                s = s + phi(k[:, t, :, None]) * v[:, t, None, :]
                z = z + phi(k[:, t])
                above = (phi(q[:, t, None]) @ s)[:, 0]
                rows.append(above / (phi(q[:, t]) * z).sum(-1, keepdim=True))
            heads.append(torch.stack(rows, 1))
            continue
        weights = phi(q) @ phi(k).transpose(1, 2)
        weights = weights.tril() if form == "causal" else weights
        heads.append(weights @ v / weights.sum(-1, keepdim=True))
    return torch.cat(heads, -1) @ mixer.o.weight.t()


@pytest.mark.parametrize("form", ["causal", "recurrent", "bidirectional"])
@pytest.mark.parametrize("length", [1, 33, 130])
def test_it_is_the_papers(length: int, form: str, agree: Any) -> None:
    mixer = built("bidirectional" if form == "bidirectional" else "causal")
    x = torch.randn(2, length, 16, requires_grad=True)
    found, expected = mixer(x, Context()), published(mixer, x, form)
    agree(found, expected, 1e-5)
    weights, wanted = torch.randn_like(expected), [x, *mixer.parameters()]
    ours = torch.autograd.grad((found * weights).sum(), wanted)
    theirs = torch.autograd.grad((expected * weights).sum(), wanted)
    for a, b in zip(ours, theirs, strict=True):
        assert float((a - b).abs().max()) <= 2e-5 * max(float(b.abs().max()), 0.1)  # one token: q and k do not matter


def test_weights_are_a_distribution() -> None:
    mixer = built()
    seen = mixer.sight(torch.randn(2, 40, 16) * 3, Context()).detach()
    assert float(seen.min()) >= 0
    torch.testing.assert_close(seen.sum(-1), torch.ones(2, 2, 40), rtol=1e-4, atol=1e-4)


def test_the_state_does_not_grow() -> None:
    mixer = built()
    state = mixer.init_state(3, 4, torch.bfloat16, "cpu")
    size = state.nbytes
    mixer.extend(torch.randn(3, 500, 16), state, Context())
    assert state.nbytes == size == 3 * 2 * 8 * 9 * 4  # float32, whatever the activations are


def test_tokens_fed_one_by_one_are_the_recurrence(agree: Any) -> None:
    mixer, x = built(), torch.randn(2, 12, 16)
    with torch.no_grad():
        state = mixer.init_state(2, 12, torch.float32, "cpu")
        rows = [mixer.extend(x[:, t : t + 1], state, Context(positions=torch.tensor([[t]]))) for t in range(12)]
        agree(torch.cat(rows, 1), published(mixer, x, "recurrent"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ["causal", "bidirectional"])
def test_a_row_of_nothing_but_padding_is_finite(order: Order, kind: str) -> None:
    mixer = parse(MixerSettings, {"kind": kind, "heads": 2}).build(Place(16, order=order))
    initialise(mixer, 1)
    x = torch.randn(2, 70, 16, requires_grad=True)
    padding = torch.ones(2, 70, dtype=torch.bool)
    padding[1] = False
    y = mixer(x, Context(padding=padding))
    assert bool(y.isfinite().all())
    (slope,) = torch.autograd.grad(y[0].square().sum(), x)
    assert bool(slope.isfinite().all()) and not slope[1].any()


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_built_says_why(kind: str) -> None:
    with pytest.raises(UnsupportedError, match="does not divide into 3 heads"):
        parse(MixerSettings, {"kind": kind, "heads": 3}).build(Place(16))
    with pytest.raises(SettingsError, match="heads"):
        parse(MixerSettings, {"kind": kind, "heads": 0})
    with pytest.raises(UnsupportedError, match="cannot be prefix"):
        parse(MixerSettings, {"kind": kind}).build(Place(16, order="prefix"))
    state_less = parse(MixerSettings, {"kind": kind}).build(Place(16, order="bidirectional"))
    with pytest.raises(UnsupportedError, match="cannot be extended"):
        state_less.init_state(1, 1, torch.float32, "cpu")
