"""Mamba-2 against the layer of `transformers` with the same weights: outputs, gradients, chunks, single tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from armillary.base.errors import SettingsError, UnsupportedError
from armillary.base.settings import parse
from armillary.nn.context import Context
from armillary.nn.mechanism import MixerSettings, Place, initialise
from armillary.nn.mixers.mamba2 import Mamba2, Mamba2Settings
from armillary.nn.taps import Taps

WIDTH, STATE, P = 16, 12, 4
CONVS = ("conv_v", "conv_k", "conv_q")


def pair(groups: int, limits: tuple[float, float | None]) -> tuple[Mamba2, Mamba2Mixer]:
    """Ours with random weights, and theirs."""
    mixer = Mamba2Settings(head_width=P, state_width=STATE, groups=groups, step_limits=limits).build(Place(WIDTH))
    initialise(mixer, 1)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    config = Mamba2Config(
        num_heads=8,
        head_dim=P,
        hidden_size=WIDTH,
        state_size=STATE,
        n_groups=groups,
        expand=2,
        chunk_size=16,
        time_step_limit=(limits[0], limits[1] or float("inf")),
        num_hidden_layers=1,
    )
    return mixer, Mamba2Mixer(config, 0)


def theirs(mixer: Mamba2) -> dict[str, Tensor]:
    """Our parameters under the names and in the shapes of theirs."""
    taken: Any = {
        "in_proj.weight": torch.cat([getattr(mixer, name).weight for name in ("gate", "v", "k", "q", "step")]),
        "conv1d.weight": torch.cat([getattr(mixer, name).weight for name in CONVS])[:, None],
        "conv1d.bias": torch.cat([getattr(mixer, name).bias for name in CONVS]),
        "A_log": mixer.decay.log_rate,
        "dt_bias": mixer.decay.bias,
        "D": mixer.skip,
        "norm.weight": mixer.norm_weight,
        "out_proj.weight": mixer.o.weight,
    }
    return taken


@pytest.mark.parametrize(("groups", "limits"), [(1, (0.0, None)), (4, (0.01, 0.05))])
@pytest.mark.parametrize("cuts", [[90], [64, 1, 25], [1] * 20])
def test_it_is_the_peers_layer(cuts: list[int], groups: int, limits: tuple[float, float | None], agree: Any) -> None:
    mixer, peer = pair(groups, limits)
    length = sum(cuts)
    x = torch.randn(2, length, WIDTH, requires_grad=True)
    weights = torch.randn(2, length, WIDTH)
    expected = torch.func.functional_call(peer, theirs(mixer), (x,))
    if len(cuts) == 1:
        found = mixer(x, Context())
    else:
        state = mixer.init_state(2, 1, torch.float32, "cpu")
        found = torch.cat([mixer.extend(part, state, Context()) for part in x.split(cuts, 1)], 1)
    agree(found, expected, 2e-5)
    wanted = [x, *mixer.parameters()]
    ours = torch.autograd.grad((found * weights).sum(), wanted)
    slopes = torch.autograd.grad((expected * weights).sum(), wanted)
    for a, b in zip(ours, slopes, strict=True):
        agree(a, b, 1e-4)


def test_an_average(agree: Any) -> None:
    """With one feature of state, B = C = 1 and Δ = 1 a head is a moving average with the weight exp(A)."""
    mixer = Mamba2Settings(head_width=2, state_width=1, taps=1).build(Place(4))
    initialise(mixer, 1)
    x = torch.randn(1, 30, 4)
    with torch.no_grad():
        for conv in (mixer.conv_q, mixer.conv_k):
            conv.weight.zero_()
            conv.bias.fill_(1.2784645)  # silu gives 1
        mixer.skip.zero_()
        mixer.step.weight.zero_()
        mixer.decay.bias.fill_(0.5413248)  # softplus gives 1
        values = mixer.values(x, Context())
        found = mixer.mix(mixer.freeze(x, Context()), values)
        rate = torch.exp(-mixer.decay.log_rate.exp())[:, None]
        average, rows = torch.zeros(1, 4, 2), []
        for t in range(30):
            average = rate * average + values[:, t]
            rows.append(average)
    agree(found, torch.stack(rows, 1), 2e-5)


def test_steep_decays_in_bf16_neither_overflow_nor_blur(agree: Any) -> None:
    """exp(Δ A) down to exp(−1600): sums over a chunk stay finite, and what follows a steep token stays exact."""
    mixer = Mamba2Settings(head_width=P, state_width=STATE).build(Place(WIDTH))
    initialise(mixer, 2)
    with torch.no_grad():
        mixer.decay.log_rate.fill_(0.0)
        mixer.step.weight.mul_(0.1)
    x = torch.randn(1, 50, WIDTH)
    frozen, values = mixer.freeze(x, Context()).parts, mixer.values(x, Context())
    steep = torch.where((torch.arange(50) < 20)[None, :, None], -1600.0, frozen["decay"])
    found = mixer.mix(type(mixer.freeze(x, Context()))({**frozen, "decay": steep}), values)
    wide = {name: part.double() if part is not None else None for name, part in frozen.items()}
    exact = mixer.mix(type(mixer.freeze(x, Context()))({**wide, "decay": steep.double()}), values.double())
    agree(found, exact.float(), 3e-6)
    low = mixer.to(torch.bfloat16)
    y = low(100 * x.bfloat16(), Context())
    assert bool(y.isfinite().all())
    slopes = torch.autograd.grad(y.float().sum(), list(low.parameters()))
    assert all(bool(slope.isfinite().all()) for slope in slopes)


def test_a_state_of_another_shape_is_refused() -> None:
    mixer = Mamba2Settings(head_width=P, state_width=STATE).build(Place(WIDTH))
    initialise(mixer, 1)
    x = torch.randn(2, 3, WIDTH)
    other = Mamba2Settings(head_width=P, state_width=STATE + 1).build(Place(WIDTH))
    state = mixer.init_state(2, 1, torch.float32, "cpu")
    state.restore(other.init_state(2, 1, torch.float32, "cpu"))
    with pytest.raises(UnsupportedError, match=r"'matrix' should be \(8, 12, 4\).*\(8, 13, 4\)") as error:
        mixer.extend(x, state, Context())
    assert "state_width" in str(error.value.hint)
    with pytest.raises(UnsupportedError, match="a state of 3 rows was given 2"):
        mixer.extend(x, mixer.init_state(3, 1, torch.float32, "cpu"), Context())


@pytest.mark.parametrize("extending", [False, True])
def test_taps_show_nothing_of_tokens_that_are_not_there(extending: bool) -> None:
    """And no edit lets them in: real tokens get what they get alone."""
    mixer = Mamba2Settings(head_width=P, state_width=STATE).build(Place(WIDTH, path="m"))
    initialise(mixer, 1)
    real = torch.arange(6) < torch.tensor([[6], [4]])
    x = torch.where(real[..., None], torch.randn(2, 6, WIDTH), 50.0)

    def call(rows: slice, length: int, taps: Taps) -> torch.Tensor:
        if not extending:
            return mixer(x[rows, :length], Context(padding=real[rows, :length], taps=taps))
        state = mixer.init_state(len(x[rows]), 1, torch.float32, "cpu")
        y = mixer.extend(x[rows, :length], state, Context(lengths=real[rows, :length].sum(1), taps=taps))
        return torch.cat([y, mixer.extend(x[rows, :1], state, Context())], 1)

    watched = Taps(["m.q", "m.k", "m.v", "m.step"])
    call(slice(None), 6, watched)
    for name, shown in watched.seen.items():
        assert bool((shown[~real] == 0).all()), f"{name} shows tokens that are not there"
        assert bool((shown[real] != 0).any(-1).all())
    edited = Taps(edits=[("m.step", lambda step: step + 0.5)])
    found, alone = call(slice(None), 6, edited), call(slice(1, 2), 4, edited)
    torch.testing.assert_close(found[1:, :4], alone[:, :4])
    if extending:
        torch.testing.assert_close(found[1:, 6:], alone[:, 4:])


def test_a_row_without_tokens_is_finite() -> None:
    mixer = Mamba2Settings(head_width=P, state_width=STATE).build(Place(WIDTH))
    initialise(mixer, 1)
    padding = torch.tensor([[True] * 5, [False] * 5])
    y = mixer(torch.randn(2, 5, WIDTH), Context(padding=padding))
    assert bool(y.isfinite().all())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"head_width": 0}, "head_width"),
        ({"state_width": 0}, "state_width"),
        ({"taps": 0}, "taps"),
        ({"step_limits": [0.5, 0.1]}, "step_limits must be two numbers"),
        ({"step_limits": [-1, None]}, "step_limits must be two numbers ≥ 0 in order, not -1 and null"),
        ({"step_limits": [0.1]}, "step_limits: expected 2 items, found 1"),
        ({"step_limits": "0.1"}, "step_limits: should be a list"),
        ({"decays": [16, 1]}, "decays must be two positive numbers"),
    ],
)
def test_settings_that_cannot_be(data: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        parse(MixerSettings, {"kind": "mamba2", **data})


def test_sizes_that_do_not_divide() -> None:
    with pytest.raises(UnsupportedError, match="32 value features do not divide into heads of 5"):
        Mamba2Settings(head_width=5).build(Place(WIDTH))
    with pytest.raises(UnsupportedError, match="8 heads do not divide into 3 groups"):
        Mamba2Settings(head_width=4, groups=3).build(Place(WIDTH))


def test_steps_start_where_they_should() -> None:
    mixer = Mamba2Settings(head_width=1, steps=(0.01, 0.02)).build(Place(64))
    initialise(mixer, 1)
    start = F.softplus(mixer.decay.bias.detach())
    assert 0.01 <= float(start.min()) < 0.011 and 0.019 < float(start.max()) <= 0.0201
