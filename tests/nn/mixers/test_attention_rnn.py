"""AttentionRNN against a loop over PyTorch's LSTM cell."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from armillary.base.errors import SettingsError, UnsupportedError
from armillary.base.settings import parse
from armillary.nn.context import Context
from armillary.nn.mechanism import MixerSettings, Place
from armillary.nn.mixers.attention_rnn import AttentionRNN, AttentionRNNSettings, Scan
from armillary.nn.taps import Taps


def built(order: Any = "causal") -> AttentionRNN:
    made = AttentionRNNSettings(heads=2, hidden=5).build(Place(16, order=order, path="m"))
    generator = torch.Generator().manual_seed(3)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.7, generator=generator)
    return made


def naive(scan: Scan, x: Tensor) -> Tensor:
    """[T, 2] for one row x [T, D]: predict a value, feed it to the LSTM, predict the next."""
    cell = nn.LSTMCell(2, 5)
    h, c, a, rows = torch.zeros(1, 5), torch.zeros(1, 5), torch.zeros(1, 2), []
    weights = {
        "weight_ih": scan.cell.weight[:, :2],
        "weight_hh": scan.cell.weight[:, 2:],
        "bias_ih": scan.cell.bias,
        "bias_hh": torch.zeros(20),
    }
    for row in x:
        h, c = torch.func.functional_call(cell, weights, (a, (h, c)))
        a = torch.sigmoid(row @ scan.local.weight.t() + scan.local.bias + h @ scan.read.weight.t())
        rows.append(a)
    return torch.cat(rows)


def expected(mixer: AttentionRNN, x: Tensor) -> Tensor:
    mask = torch.stack([naive(mixer.ahead, row) for row in x])
    if mixer.back is not None:
        mask = (mask + torch.stack([naive(mixer.back, row.flip(0)).flip(0) for row in x])) / 2
    v = (x @ mixer.v.weight.t()).unflatten(-1, (2, 8))
    return (mask[..., None] * v).flatten(2) @ mixer.o.weight.t()


@pytest.mark.parametrize("order", ["causal", "bidirectional"])
def test_it_is_the_loop(order: str, agree: Any) -> None:
    mixer = built(order)
    x = torch.randn(2, 11, 16, requires_grad=True)
    found, wanted = mixer(x, Context()), expected(mixer, x)
    agree(found, wanted)
    weights = torch.randn_like(found)
    parts = [x, *mixer.parameters()]
    ours = torch.autograd.grad((found * weights).sum(), parts)
    theirs = torch.autograd.grad((wanted * weights).sum(), parts)
    for a, b in zip(ours, theirs, strict=True):
        agree(a, b, 1e-4)


def test_without_an_lstm_every_token_decides_alone(agree: Any) -> None:
    mixer, taps = built(), Taps(["m.mask"])
    nn.init.zeros_(mixer.ahead.cell.weight)
    nn.init.zeros_(mixer.ahead.cell.bias)
    x = torch.randn(2, 7, 16)
    mixer(x, Context(taps=taps))
    agree(taps.seen["m.mask"], torch.sigmoid(x @ mixer.ahead.local.weight.t() + mixer.ahead.local.bias))


def test_the_mask_ignores_what_comes_later_and_hears_what_came_before() -> None:
    x = torch.randn(1, 9, 16)
    moved = x.clone()
    moved[:, 4] += 3
    for order in ("causal", "bidirectional"):
        masks = []
        for each in (x, moved):
            taps = Taps(["m.mask"])
            built(order)(each, Context(taps=taps))
            masks.append(taps.seen["m.mask"])
        changed = (masks[0] != masks[1]).any(-1)[0].tolist()
        assert changed == [order == "bidirectional" or t >= 4 for t in range(9)]


@pytest.mark.parametrize("order", ["causal", "bidirectional"])
def test_a_document_that_begins_with_padding_begins_anew(order: str, agree: Any) -> None:
    mixer, x = built(order), torch.randn(1, 7, 16)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    padding = torch.tensor([[True, True, True, False, True, True, True]])
    y = mixer(x, Context(documents=documents, padding=padding))
    agree(y[:, :3], mixer(x[:, :3], Context()))
    agree(y[:, 4:], mixer(x[:, 4:], Context()))


def test_the_state_does_not_grow() -> None:
    mixer = built()
    state = mixer.init_state(3, 4, torch.bfloat16, "cpu")
    size = state.nbytes
    mixer.extend(torch.randn(3, 20, 16), state, Context())
    assert state.nbytes == size == 3 * (5 + 5 + 2) * 4


def test_what_cannot_be_built_says_why() -> None:
    with pytest.raises(UnsupportedError, match="does not divide into 4 heads"):
        AttentionRNNSettings(heads=4).build(Place(18))
    for key in ("heads", "hidden"):
        with pytest.raises(SettingsError, match=key):
            parse(MixerSettings, {"kind": "attention_rnn", key: 0})
