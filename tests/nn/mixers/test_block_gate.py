"""Block gates against loops over tokens, PyTorch's attention, and the frequencies that the penalty predicts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from armillary.base.errors import SettingsError, UnsupportedError
from armillary.base.settings import parse
from armillary.nn.context import Context
from armillary.nn.cost import Counter
from armillary.nn.mechanism import MixerSettings, Place, initialise
from armillary.nn.mixers.block_gate import BlockGate, BlockGateSettings
from armillary.nn.positions.alibi import AlibiSettings
from armillary.nn.taps import Taps
from armillary.nn.training import Training

WIDTH = 16


def made(**settings: Any) -> BlockGate:
    mixer = BlockGateSettings(**({"heads": 2, "block": 4, "position": None} | settings)).build(Place(WIDTH))
    initialise(mixer, 1)
    with torch.no_grad():
        mixer.q.weight.mul_(2)
        mixer.gain.mul_(torch.tensor([3.0, 5.0])[: mixer.heads])  # both are kept divided by 10
    return mixer


def published(mixer: BlockGate, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The formulas of the module's docstring, token by token; also how many gates are open."""
    block, each = mixer.block, mixer.width
    outputs, opened = [], torch.zeros(())
    for b in range(x.shape[0]):
        q, k, v = (x[b] @ product.weight.t() for product in (mixer.q, mixer.k, mixer.v))
        rows = []
        for t in range(x.shape[1]):
            heads = []
            for h in range(mixer.heads):
                part = slice(h * each, h * each + each)
                scores, values = [], []
                for n in range(t // block + 1):
                    span = range(n * block, min(n * block + block, t + 1))
                    gate = torch.ones((), dtype=x.dtype)
                    if n < t // block:
                        mean = torch.stack([k[s, part] for s in span]).mean(0)
                        logit = 10 * (mixer.gain[h] * (q[t, part] @ mean) / math.sqrt(each) + mixer.bias[h])
                        if noise is not None:
                            u = noise[b, h, t // 4, n]
                            logit = (u.log() - (1 - u).log() + logit) / 0.33
                        gate = (1.2 / (1 + torch.exp(-logit)) - 0.1).clamp(0, 1)
                        opened = opened + (gate > 0)
                    if gate > 0:
                        scores += [gate * torch.exp(q[t, part] @ k[s, part] / math.sqrt(each)) for s in span]
                        values += [v[s, part] for s in span]
                share = torch.stack(scores) / torch.stack(scores).sum()
                heads.append(share @ torch.stack(values))
            rows.append(torch.cat(heads))
        outputs.append(torch.stack(rows) @ mixer.o.weight.t())
    return torch.stack(outputs), opened


def slopes(y: Tensor, weights: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad((y * weights).sum(), wanted))


@pytest.mark.parametrize("relaxed", [False, True])
def test_forward_is_the_formula(relaxed: bool, agree: Any) -> None:
    mixer = made(start=-2.0).double()
    x = torch.randn(2, 15, WIDTH, dtype=torch.float64, requires_grad=True)
    ctx, noise = Context(), None
    if relaxed:
        ctx = Context(training=Training.of(3))
        noise = _noise(mixer, ctx, (2, 2, 4, 3))  # one for the 4 queries of a tile
    expected, opened = published(mixer, x, noise)
    assert 30 < opened < 2 * 2 * (4 + 8 + 9) - 10  # some gates are shut and some are not
    found = mixer(x, ctx)
    agree(found, expected, 1e-10)
    weights, wanted = torch.randn_like(found), [x, *mixer.parameters()]
    for a, b in zip(slopes(found, weights, wanted), slopes(expected, weights, wanted), strict=True):
        agree(a, b, 1e-8)


def _noise(mixer: BlockGate, ctx: Context, shape: tuple[int, ...]) -> Tensor:
    from armillary.nn.training import uniform

    noise = uniform(ctx, mixer.path, "gate", shape, torch.zeros(()))
    assert noise is not None
    return noise.double()


def test_open_gates_are_attention(agree: Any) -> None:
    mixer = made(start=100.0, kv_heads=1)
    x = torch.randn(2, 21, WIDTH, requires_grad=True)
    q = (x @ mixer.q.weight.t()).view(2, 21, 2, 8).transpose(1, 2)
    k, v = ((x @ part.weight.t()).view(2, 21, 1, 8).transpose(1, 2) for part in (mixer.k, mixer.v))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    expected = expected.transpose(1, 2).flatten(2) @ mixer.o.weight.t()
    weights, wanted = torch.randn(2, 21, WIDTH), [x, mixer.q.weight, mixer.k.weight, mixer.v.weight]
    for ctx in (Context(), Context(training=Training.of(1))):
        found = mixer(x, ctx)
        agree(found, expected, 1e-5)
        ours, theirs = (
            slopes(found, weights, wanted),
            torch.autograd.grad((expected * weights).sum(), wanted, None, True),
        )
        for a, b in zip(ours, theirs, strict=True):
            agree(a, b, 1e-4)


def test_a_shut_block_gives_nothing() -> None:
    mixer = made(start=-100.0)
    x = torch.randn(1, 12, WIDTH, requires_grad=True)
    (slope,) = torch.autograd.grad(mixer(x, Context())[:, 8:].sum(), x)
    assert not slope[:, :8].any() and slope[:, 8:].any()
    state = mixer.init_state(1, 16, torch.float32, "cpu")
    with torch.no_grad():
        mixer.extend(x[:, :8], state, Context())
        state.tensors["k"][:, :, :8] = torch.nan  # decoding reads open blocks alone
        state.tensors["v"][:, :, :8] = torch.nan
        assert mixer.extend(x[:, 8:9], state, Context(positions=torch.tensor([[8]]))).isfinite().all()
        assert mixer.extend(x[:, 9:], state, Context(positions=torch.tensor([[9, 10, 11]]))).isfinite().all()


def test_counted_scores_are_the_kept_fraction() -> None:
    """With a tile of one query per block, FLOPs of the scores in proportion to the gates that are open."""
    mixer = made(block=1, start=-2.0)
    x = torch.randn(1, 40, WIDTH)
    taps = Taps(["*.gate"])
    mixer(x, Context(taps=taps))
    gates = taps.seen[".gate"] > 0
    earlier = torch.arange(39) < torch.arange(40)[:, None]
    opened = int((gates & earlier).sum()) + 2 * 40  # and the own block of each query and head

    def flops() -> float:
        frozen, values = mixer.freeze(x, Context()), mixer.values(x, Context())
        with Counter() as counter:
            mixer.mix(frozen, values)
        return counter.flops

    with torch.no_grad():
        assert flops() == 4 * 8 * opened
        mixer.bias.fill_(100.0)
        assert flops() == 4 * 8 * 2 * 40 * 41 / 2


def test_relaxed_gates_have_the_right_gradient() -> None:
    mixer = made(start=-1.0).double()
    x = torch.randn(1, 10, WIDTH, dtype=torch.float64, requires_grad=True)
    parameters = [mixer.gain, mixer.bias]

    def call(x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
        inputs = (x, Context(training=Training.of(5)))
        return torch.func.functional_call(mixer, {"gain": gain, "bias": bias}, inputs)

    assert torch.autograd.gradcheck(call, [x, *parameters], fast_mode=True)


def test_the_penalty_is_the_frequency_of_open_gates() -> None:
    mixer = made(start=-1.0, penalty=1.0, block=2)
    x = torch.randn(1, 12, WIDTH)
    earlier = (torch.arange(5) < torch.arange(12)[:, None] // 2).expand(1, 2, -1, -1)
    share = torch.zeros(())
    for seed in range(400):
        taps = Taps(["*.gate"])
        mixer(x, Context(training=Training.of(seed), taps=taps))
        share = share + (taps.seen[".gate"][earlier] > 0).float().mean() / 400
    base, both = _slope(made(start=-1.0, block=2), x), _slope(mixer, x)
    # The penalty's gradient by the biases is that of the mean chance, itself measured by differences.
    assert share == pytest.approx(float(_chance(mixer, x, 0.0)), abs=0.02)
    difference = (_chance(mixer, x, 1e-3) - _chance(mixer, x, -1e-3)) / 2e-3
    assert float((both - base).sum()) == pytest.approx(float(difference), rel=1e-2)
    mixer.target = float(share) + 0.05  # fewer are open than may be for nothing
    assert torch.equal(_slope(mixer, x), base)


def _slope(mixer: BlockGate, x: Tensor) -> Tensor:
    y = mixer(x, Context(training=Training.of(1)))
    return torch.autograd.grad(y.sum(), mixer.bias)[0]


def _chance(mixer: BlockGate, x: Tensor, moved: float) -> Tensor:
    """Mean probability that a hard-concrete gate is not 0, by Louizos et al.'s equation (12)."""
    total, count = torch.zeros(()), 0
    q, k = x[0] @ mixer.q.weight.t(), x[0] @ mixer.k.weight.t()
    for h in range(2):
        part = slice(8 * h, 8 * h + 8)
        for t in range(x.shape[1]):
            for n in range(t // mixer.block):
                mean = k[n * mixer.block : (n + 1) * mixer.block, part].mean(0)
                logit = 10 * (mixer.gain[h] * (q[t, part] @ mean) / 8**0.5 + mixer.bias[h] + moved)
                total = total + torch.sigmoid(logit - 0.33 * math.log(0.1 / 1.1))
                count += 1
    return total.detach() / count


def test_rows_of_padding_only_are_harmless() -> None:
    mixer = made(start=-1.0, penalty=0.1)
    x = torch.randn(2, 9, WIDTH, requires_grad=True)
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[0, 3:] = True
    y = mixer(x, Context(padding=padding, training=Training.of(1)))
    assert y.isfinite().all()
    for slope in torch.autograd.grad(y.sum(), [x, *mixer.parameters()]):
        assert slope.isfinite().all()


def test_the_state_is_keys_values_and_means() -> None:
    mixer = made(block=8)
    state = mixer.init_state(3, 32, torch.bfloat16, "cpu")
    assert state.nbytes == 3 * (2 * 32 * 16 * 2 + 4 * 16 * 4)
    x = torch.randn(3, 32, WIDTH)
    mixer.extend(x, state, Context())
    derived = state.tensors["k"].float().unflatten(2, (4, 8)).mean(3)
    assert torch.allclose(state.tensors["means"], derived, atol=1e-6)


def test_what_cannot_be_built_says_why() -> None:
    with pytest.raises(SettingsError, match="heads"):
        parse(MixerSettings, {"kind": "block_gate", "heads": 0})
    with pytest.raises(SettingsError, match="must divide heads"):
        parse(MixerSettings, {"kind": "block_gate", "heads": 4, "kv_heads": 3})
    with pytest.raises(SettingsError, match="block"):
        parse(MixerSettings, {"kind": "block_gate", "block": 0})
    with pytest.raises(UnsupportedError, match="does not divide into 3 heads"):
        BlockGateSettings(heads=3).build(Place(WIDTH))
    with pytest.raises(UnsupportedError, match="take rotations only"):
        BlockGateSettings(position=AlibiSettings()).build(Place(WIDTH))
    with pytest.raises(UnsupportedError, match="cannot be bidirectional"):
        BlockGateSettings().build(Place(WIDTH, order="bidirectional"))
