"""Retention against the formulas of Sun et al. 2023, written out as loops over heads and tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armillary.base.errors import UnsupportedError
from armillary.nn.context import Context
from armillary.nn.mechanism import Place
from armillary.nn.mixers.retention import Retention, RetentionSettings
from armillary.nn.ops import decay
from armillary.nn.positions.alibi import AlibiSettings
from armillary.nn.positions.rope import RopeSettings
from armillary.nn.taps import Taps


@pytest.fixture
def mixer() -> Retention:
    made = RetentionSettings(heads=2, position=RopeSettings(pairing="interleaved")).build(Place(16))
    generator = torch.Generator().manual_seed(3)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return made


def turned(x: Tensor, start: int = 0) -> Tensor:
    """Feature pairs as complex numbers times e^(i·n·θ), the paper's own way to write the rotation."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    theta = 10000 ** (-torch.arange(0, x.shape[-1], 2) / x.shape[-1])
    angle = (torch.arange(x.shape[1]) + start)[:, None] * theta
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


def published(mixer: Retention, x: Tensor, form: str) -> Tensor:
    """Equations 5 (parallel), 6 (recurrent), and 8 (decays, norm and gate of multi-scale retention)."""
    heads = []
    for h in range(2):
        keys, values = slice(8 * h, 8 * h + 8), slice(16 * h, 16 * h + 16)
        q = turned(x @ mixer.q.weight[keys].t())
        k = turned(x @ mixer.k.weight[keys].t()) / 8**0.5
        v = x @ mixer.v.weight[values].t()
        gamma = 1 - 2.0 ** (-5 - h)
        steps = x.shape[1]
        if form == "parallel":
            distance = torch.arange(steps)[:, None] - torch.arange(steps)
            heads.append((q @ k.transpose(1, 2) * (gamma**distance).tril()) @ v)
            continue
        state, rows = torch.zeros(x.shape[0], 8, 16), []
        for n in range(steps):
            state = gamma * state + k[:, n, :, None] * v[:, n, None, :]
            rows.append((q[:, n, None] @ state)[:, 0])
        heads.append(torch.stack(rows, 1))
    normed = torch.stack([y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() for y in heads], 2) * mixer.norm.weight
    return (F.silu(x @ mixer.gate.weight.t()) * normed.flatten(2)) @ mixer.o.weight.t()


@pytest.mark.parametrize("form", ["parallel", "recurrent"])
@pytest.mark.parametrize("chunk", [64, 5])
def test_forward_is_the_papers(
    form: str, chunk: int, mixer: Retention, agree: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decay, "CHUNK", chunk)
    x = torch.randn(2, 33, 16, requires_grad=True)
    weights = torch.randn(2, 33, 16)
    found, expected = mixer(x, Context()), published(mixer, x, form)
    agree(found, expected, 2e-5)
    wanted = [x, *mixer.parameters()]
    ours = torch.autograd.grad((found * weights).sum(), wanted)
    theirs = torch.autograd.grad((expected * weights).sum(), wanted)
    for a, b in zip(ours, theirs, strict=True):
        agree(a, b, 1e-4)


def test_steps_are_the_papers(mixer: Retention, agree: Any) -> None:
    x = torch.randn(2, 12, 16)
    with torch.no_grad():
        state = mixer.init_state(2, 12, torch.float32, "cpu")
        rows = [mixer.extend(x[:, t : t + 1], state, Context(positions=torch.tensor([[t]]))) for t in range(12)]
        agree(torch.cat(rows, 1), published(mixer, x, "recurrent"), 2e-5)


def test_the_state_does_not_grow(mixer: Retention) -> None:
    state = mixer.init_state(3, 4, torch.bfloat16, "cpu")
    size = state.nbytes
    mixer.extend(torch.randn(3, 50, 16), state, Context())
    assert state.nbytes == size == 3 * 2 * 8 * 16 * 4  # float32, whatever the activations are


def test_weights_of_tokens_that_are_gone_are_refused(mixer: Retention) -> None:
    state = mixer.init_state(1, 4, torch.float32, "cpu")
    taps = Taps(["*.weights"])
    mixer.extend(torch.randn(1, 3, 16), state, Context(taps=taps))
    with pytest.raises(UnsupportedError, match="only live in the state do not exist"):
        taps.seen[".weights"]
    edit = Taps(edits=[("*.weights", torch.clone)])
    with pytest.raises(UnsupportedError, match="cannot be edited"):
        mixer.extend(torch.randn(1, 3, 16), state, Context(taps=edit))


def test_what_cannot_be_built_says_why() -> None:
    with pytest.raises(UnsupportedError, match="takes rotations only"):
        RetentionSettings(position=AlibiSettings()).build(Place(16))
    with pytest.raises(UnsupportedError, match="does not divide into 4 heads"):
        RetentionSettings(heads=4).build(Place(18))
    with pytest.raises(UnsupportedError, match="cannot be bidirectional"):
        RetentionSettings().build(Place(16, order="bidirectional"))
