"""Gated DeltaNet against `transformers`' Qwen3-Next layer with the same weights, and DeltaNet against its formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from armillary.base.errors import SettingsError, UnsupportedError
from armillary.base.settings import parse
from armillary.nn.context import Context
from armillary.nn.mechanism import MixerSettings, Place, initialise
from armillary.nn.mixers.gated_delta import GatedDelta, GatedDeltaSettings
from armillary.nn.norms.rmsnorm import RMSNormSettings

WIDTH, KEYS, HEADS, K, V = 16, 2, 4, 4, 6


def made(**settings: Any) -> GatedDelta:
    mixer = GatedDeltaSettings(heads=HEADS, head_width=K, norm=RMSNormSettings(epsilon=1e-6), **settings)
    built = mixer.build(Place(WIDTH))
    initialise(built, 1)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return built


def theirs(mixer: GatedDelta) -> dict[str, Tensor]:
    """Our parameters under the names of theirs, whose products hold all of a key head's rows together."""
    assert mixer.gate is not None and mixer.step is not None and mixer.decay is not None
    each = [mixer.q, mixer.k, mixer.v, mixer.gate]
    rows = torch.cat([product.weight.view(KEYS, -1, WIDTH) for product in each], 1).flatten(0, 1)
    rates = torch.cat([product.weight.view(KEYS, -1, WIDTH) for product in (mixer.write, mixer.step)], 1)
    taken: Any = {
        "in_proj_qkvz.weight": rows,
        "in_proj_ba.weight": rates.flatten(0, 1),
        "conv1d.weight": torch.cat([mixer.conv_q.weight, mixer.conv_k.weight, mixer.conv_v.weight])[:, None],
        "dt_bias": mixer.decay.bias,
        "A_log": mixer.decay.log_rate,
        "norm.weight": mixer.norm.weight,
        "out_proj.weight": mixer.o.weight,
    }
    return taken


@pytest.mark.parametrize("cuts", [[90], [64, 1, 25], [1] * 20])
def test_it_is_the_peers_layer(cuts: list[int], agree: Any) -> None:
    mixer = made(key_heads=KEYS, expand=V / K)
    config = Qwen3NextConfig(
        hidden_size=WIDTH,
        linear_num_value_heads=HEADS,
        linear_num_key_heads=KEYS,
        linear_key_head_dim=K,
        linear_value_head_dim=V,
        num_hidden_layers=1,
        rms_norm_eps=1e-6,
    )
    peer = Qwen3NextGatedDeltaNet(config, 0)
    x = torch.randn(2, sum(cuts), WIDTH, requires_grad=True)
    weights = torch.randn_like(x)
    expected = torch.func.functional_call(peer, theirs(mixer), (x,))
    state = mixer.init_state(2, 1, torch.float32, "cpu")
    whole = len(cuts) == 1
    found = (
        mixer(x, Context()) if whole else torch.cat([mixer.extend(c, state, Context()) for c in x.split(cuts, 1)], 1)
    )
    agree(found, expected, 2e-5)
    wanted = [x, *mixer.parameters()]
    ours = torch.autograd.grad((found * weights).sum(), wanted)
    slopes = torch.autograd.grad((expected * weights).sum(), wanted)
    for a, b in zip(ours, slopes, strict=True):
        agree(a, b, 1e-4)


def test_without_fading_and_gate_it_is_deltanet(agree: Any) -> None:
    """S_t = S_{t−1} + β_t (v_t − S_{t−1} k_t) k_tᵀ, y_t = S_t q_t, over convolved, normalised q and k."""
    mixer = made(expand=1.0, fading=False, gated=False)
    x = torch.randn(2, 30, WIDTH)
    with torch.no_grad():
        found = mixer(x, Context())
        conved = []
        for product, conv in ((mixer.q, mixer.conv_q), (mixer.k, mixer.conv_k), (mixer.v, mixer.conv_v)):
            line = F.pad(x @ product.weight.t(), (0, 0, 3, 0))
            y = torch.stack([(line[:, t : t + 4] * conv.weight.t()).sum(1) for t in range(30)], 1)
            conved.append((y * torch.sigmoid(y)).view(2, 30, HEADS, K))
        q, k, v = F.normalize(conved[0], dim=-1) / K**0.5, F.normalize(conved[1], dim=-1), conved[2]
        beta = torch.sigmoid(x @ mixer.write.weight.t())
        state, rows = torch.zeros(2, HEADS, K, K), []
        for t in range(30):
            wrong = v[:, t] - torch.einsum("bhvk,bhk->bhv", state, k[:, t])
            state = state + torch.einsum("bh,bhv,bhk->bhvk", beta[:, t], wrong, k[:, t])
            rows.append(torch.einsum("bhvk,bhk->bhv", state, q[:, t]))
        y = torch.stack(rows, 1)
        normed = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * mixer.norm.weight
        agree(found, normed.flatten(2) @ mixer.o.weight.t(), 5e-5)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"heads": 0}, "heads"),
        ({"heads": 4, "key_heads": 3}, "4 heads do not divide among 3 key_heads"),
        ({"steps": [0, 1]}, "steps must be two positive numbers"),
    ],
)
def test_settings_that_cannot_be(data: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        parse(MixerSettings, {"kind": "gated_delta", **data})


def test_what_cannot_be_says_why() -> None:
    mixer = made()
    other = GatedDeltaSettings(heads=2, head_width=K).build(Place(WIDTH)).init_state(1, 1, torch.float32, "cpu")
    with pytest.raises(UnsupportedError, match=r"'matrix' should be \(4, 4, 8\).*\(2, 4, 8\)"):
        mixer.extend(torch.randn(1, 1, WIDTH), other, Context())
    with pytest.raises(UnsupportedError, match="no value features"):
        GatedDeltaSettings(head_width=1, expand=0.5).build(Place(WIDTH))
    y = mixer(torch.randn(2, 5, WIDTH), Context(padding=torch.tensor([[True] * 5, [False] * 5])))
    assert bool(y.isfinite().all())
