"""The simple network, the LSTM and the GRU against PyTorch's own from the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from armillary.base.errors import SettingsError, UnsupportedError
from armillary.base.settings import parse
from armillary.nn.context import Context
from armillary.nn.mechanism import MixerSettings, Place
from armillary.nn.mixers.gru import GRUSettings
from armillary.nn.mixers.lstm import LSTMSettings
from armillary.nn.mixers.recurrent import Recurrent, RecurrentSettings, Scan
from armillary.nn.mixers.rnn import RNNSettings
from armillary.nn.ops import recurrent

R = 7
KINDS: dict[str, RecurrentSettings] = {
    "rnn": RNNSettings(hidden=R),
    "relu": RNNSettings(hidden=R, activation="relu"),
    "lstm": LSTMSettings(hidden=R),
    "gru": GRUSettings(hidden=R),
}


def built(name: str, order: Any = "causal") -> Recurrent:
    made = KINDS[name].build(Place(16, order=order, path="m"))
    generator = torch.Generator().manual_seed(3)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.4, generator=generator)
    return made


def weights(scan: Scan) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """In PyTorch's order; 1 is added to the forget gate of an LSTM."""
    bias = scan.bias
    if scan.cell == "lstm":
        bias = bias + torch.cat([torch.zeros(R), torch.ones(R), torch.zeros(2 * R)])
    held = scan.held.bias if scan.held.bias is not None else torch.zeros_like(bias)
    return scan.inputs.weight, scan.held.weight, bias, held


def theirs(name: str, mixer: Recurrent, x: Tensor) -> Tensor:
    kind = {"lstm": nn.LSTM, "gru": nn.GRU}.get(name, nn.RNN)
    words = {"nonlinearity": "relu"} if name == "relu" else {}
    made = kind(16, R, batch_first=True, bidirectional=mixer.back is not None, **words)
    given = {}
    for suffix, scan in (("", mixer.ahead), ("_reverse", mixer.back)):
        if scan is not None:
            names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            given |= {f"{n}_l0{suffix}": w for n, w in zip(names, weights(scan), strict=True)}
    y = torch.func.functional_call(made, given, (x,))[0]
    return y @ mixer.o.weight.t()


@pytest.mark.parametrize("order", ["causal", "bidirectional"])
@pytest.mark.parametrize("name, fused", [("lstm", True), *((name, False) for name in KINDS)])
def test_it_is_pytorchs(name: str, order: str, fused: bool, agree: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if not fused:
        monkeypatch.setattr(Scan, "_fuses", lambda *_: False)
    mixer = built(name, order)
    x = torch.randn(3, 13, 16, requires_grad=True)
    found, expected = mixer(x, Context()), theirs(name, mixer, x)
    agree(found, expected)
    pull = torch.randn_like(found)
    parts = [x, *mixer.parameters()]
    ours = torch.autograd.grad((found * pull).sum(), parts)
    wanted = torch.autograd.grad((expected * pull).sum(), parts)
    for a, b in zip(ours, wanted, strict=True):
        agree(a, b, 1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_the_written_out_backward_pass_is_that_of_the_loop(name: str, agree: Any) -> None:
    """With documents, tokens that are not there and a state to begin with; float64."""
    generator = torch.Generator().manual_seed(1)
    cell = KINDS[name].cell
    gates = recurrent.GATES[cell] * R

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    found, weight, bias = noise(3, 11, gates), noise(gates, R), noise(gates)
    state = tuple(noise(3, R) for _ in range(2 if cell == "lstm" else 1))
    start = torch.zeros(3, 11, dtype=torch.bool)
    start[0, 0] = start[1, 4] = start[2, 10] = True
    valid = torch.ones(3, 11, dtype=torch.bool)
    valid[0, :3] = valid[1, 4] = valid[2, 6:9] = False
    for masks in ((None, None), (start, None), (None, valid), (start, valid)):
        y, last = recurrent.recur(cell, found, weight, bias, state, *masks)
        z, end = recurrent.recur_plain(cell, found, lambda h: h @ weight.t() + bias, state, *masks)
        pulls = [torch.randn_like(part) for part in (y, *last)]
        parts = [found, weight, bias, *state]
        slopes = []
        for outputs in ((y, *last), (z, *end)):
            total = sum(((part * pull).sum() for part, pull in zip(outputs, pulls, strict=True)), torch.zeros(()))
            slopes.append(torch.autograd.grad(total, parts))
        for a, b in zip((y, *last, *slopes[0]), (z, *end, *slopes[1]), strict=True):
            agree(a, b, 1e-10)


def test_an_lstm_starts_by_holding_what_it_reads() -> None:
    """Of a network just made the forget gate stands at σ(1) where nothing comes in."""
    mixer = LSTMSettings(hidden=4).build(Place(16))
    for part in mixer.modules():
        if hasattr(part, "reset"):
            part.reset(None)
    nn.init.zeros_(mixer.ahead.inputs.weight)
    nn.init.zeros_(mixer.ahead.held.weight)
    state = mixer.init_state(1, 1, torch.float32, "cpu")
    state.put("c", torch.ones(1, 4))
    with torch.no_grad():
        mixer.extend(torch.randn(1, 3, 16), state, Context())
    assert state.tensors["c"] == pytest.approx(torch.sigmoid(torch.tensor(1.0)).item() ** 3, rel=1e-5)


@pytest.mark.parametrize("order", ["causal", "bidirectional"])
def test_a_document_that_begins_with_padding_begins_anew(order: str, agree: Any) -> None:
    mixer, x = built("lstm", order), torch.randn(1, 7, 16)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    padding = torch.tensor([[True, True, True, False, True, True, True]])
    y = mixer(x, Context(documents=documents, padding=padding))
    agree(y[:, :3], mixer(x[:, :3], Context()))
    agree(y[:, 4:], mixer(x[:, 4:], Context()))
    nothing = mixer(x, Context(padding=torch.zeros(1, 7, dtype=torch.bool)))
    assert (nothing == 0).all()  # the state stays at 0


def test_the_state_does_not_grow() -> None:
    for name, parts in (("rnn", 1), ("lstm", 2), ("gru", 1)):
        mixer = built(name)
        state = mixer.init_state(3, 4, torch.bfloat16, "cpu")
        mixer.extend(torch.randn(3, 20, 16), state, Context())
        assert state.nbytes == 3 * R * parts * 4


def test_what_cannot_be_built_says_why() -> None:
    with pytest.raises(UnsupportedError, match="cannot be prefix"):
        KINDS["lstm"].build(Place(16, order="prefix"))
    with pytest.raises(UnsupportedError, match="cannot be extended"):
        built("gru", "bidirectional").init_state(1, 1, torch.float32, "cpu")
    for data in ({"kind": "lstm", "hidden": 0}, {"kind": "rnn", "activation": "gelu"}):
        with pytest.raises(SettingsError):
            parse(MixerSettings, data)
