"""Attention with an adversary: dense attention outside of its calls, the masked pass written out within."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from armillary.base.errors import SettingsError, UnsupportedError
from armillary.base.settings import parse
from armillary.nn.context import Context
from armillary.nn.mechanism import MixerSettings, Place
from armillary.nn.mixers import adversarial
from armillary.nn.mixers.adversarial import AdversarialAttention, AdversarialSettings
from armillary.nn.mixers.attention import Attention, AttentionSettings
from armillary.nn.training import Training

T = 9
ADVERSE = Training(torch.tensor(1), torch.tensor(1.0), adverse=True)


def built(order: Any = "causal", **settings: Any) -> AdversarialAttention:
    made = AdversarialSettings(**{"heads": 2, "adversary": 3, **settings}).build(Place(16, order=order))
    generator = torch.Generator().manual_seed(3)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return made


def dense(mixer: AdversarialAttention) -> Attention:
    made = AttentionSettings(heads=2).build(Place(16, order=mixer.order))
    made.load_state_dict({n: value for n, value in mixer.state_dict().items() if "adverse" not in n})
    return made


def scored(mixer: AdversarialAttention, x: Tensor) -> Tensor:
    """The adversary's scores [B, T, T]."""
    q, k = x.detach() @ mixer.adverse_q.weight.t(), x.detach() @ mixer.adverse_k.weight.t()
    return q @ k.transpose(1, 2) / 3**0.5


def hidden_from(mixer: AdversarialAttention, x: Tensor, kept: Tensor) -> Tensor:
    """Attention of both heads with −10⁴ (1 − M), its slope by M set to 1."""
    q, k, v = ((x @ p.weight.t()).unflatten(-1, (2, 8)).transpose(1, 2) for p in (mixer.q, mixer.k, mixer.v))
    penalty = 1e4 * (kept.detach() - 1) + kept - kept.detach()
    scores = q @ k.transpose(2, 3) / 8**0.5 + penalty[:, None]
    if mixer.order == "causal":
        scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf)
    return (torch.softmax(scores, -1) @ v).transpose(1, 2).flatten(2) @ mixer.o.weight.t()


def straight(mixer: AdversarialAttention, x: Tensor) -> Tensor:
    """M = 1[S' > 0] with the slope of σ(S'), not reversed; the diagonal is kept."""
    scores = scored(mixer, x)
    soft = torch.sigmoid(scores)
    return ((scores > 0).float() + (soft - soft.detach())).masked_fill(torch.eye(T, dtype=torch.bool), 1.0)


@pytest.mark.parametrize("order", ["causal", "bidirectional"])
def test_outside_its_calls_it_is_dense_attention_bit_for_bit(order: str) -> None:
    mixer, x = built(order), torch.randn(2, T, 16)
    base = dense(mixer)
    for training in (None, Training.of(1)):
        assert torch.equal(mixer(x, Context(training=training)), base(x, Context()))
    if order == "causal":
        states = [m.init_state(2, 4, torch.float32, "cpu") for m in (mixer, base)]
        with torch.no_grad():
            assert torch.equal(mixer.extend(x, states[0], Context()), base.extend(x, states[1], Context()))


@pytest.mark.parametrize("block", [512, 4])
@pytest.mark.parametrize("order", ["causal", "bidirectional"])
def test_the_masked_pass_and_its_slopes(order: str, block: int, agree: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's own slopes are those of a fixed mask, the adversary's those of the straight-through mask,
    turned round; the price is paid for the share of the visible pairs that is hidden."""
    monkeypatch.setattr(adversarial, "BLOCK", block)
    mixer = built(order, keep=0.4)
    x = torch.randn(2, T, 16, requires_grad=True)
    weights = torch.randn(2, T, 16)
    found = mixer(x, Context(training=ADVERSE))
    kept = straight(mixer, x)
    expected = hidden_from(mixer, x, kept)
    assert 0 < float((kept == 0).float().mean()) < 1
    agree(found, expected)
    own = [x, *(p.weight for p in (mixer.q, mixer.k, mixer.v, mixer.o))]
    adversary = [mixer.adverse_q.weight, mixer.adverse_k.weight]
    ours = torch.autograd.grad((found * weights).sum(), [*own, *adversary])
    seen = torch.ones(T, T).tril() if order == "causal" else torch.ones(T, T)
    density = (kept * seen).sum() / (2 * seen.sum())
    theirs = [
        *torch.autograd.grad((expected * weights).sum(), own, retain_graph=True),
        *(-slope for slope in torch.autograd.grad((expected * weights).sum() + 0.4 * density, adversary)),
    ]
    for a, b in zip(ours, theirs, strict=True):
        assert float(b.abs().max()) > 0
        agree(a, b, 1e-4)


def test_an_adversary_that_hides_nothing_changes_nothing(agree: Any) -> None:
    mixer, x = built(), torch.randn(2, T, 16).abs()
    for product in (mixer.adverse_q, mixer.adverse_k):
        nn.init.ones_(product.weight)
    assert bool((straight(mixer, x) == 1).all())
    agree(mixer(x, Context(training=ADVERSE)), mixer(x, Context()))


def test_the_masked_pass_compiles_into_one_graph(agree: Any) -> None:
    mixer, x = built(), torch.randn(2, T, 16)
    torch._dynamo.reset()
    compiled = torch.compile(mixer, backend="aot_eager", fullgraph=True, dynamic=False)
    agree(compiled(x, Context(training=ADVERSE)), mixer(x, Context(training=ADVERSE)))
    torch._dynamo.reset()


def test_what_cannot_be_built_says_why() -> None:
    with pytest.raises(SettingsError, match="adversary"):
        parse(MixerSettings, {"kind": "adversarial", "adversary": 0})
    with pytest.raises(UnsupportedError, match="cannot look at a memory"):
        AdversarialSettings().build(Place(16, cross=True))
