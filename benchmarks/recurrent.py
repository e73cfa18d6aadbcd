"""Recurrent mixers against PyTorch's own layers: forward and backward of one layer, 16 rows of 256 tokens, width 384.

The peer is torch.nn's RNN, LSTM and GRU from the same weights with an output product behind it; outputs
and gradients are compared in the run. `documents`: rows that hold several documents, which PyTorch's layers
do not know, against our LSTM without them.
"""

from __future__ import annotations

import statistics

import torch
from torch import nn

from armillary.nn.context import Context
from armillary.nn.mechanism import Place, initialise
from armillary.nn.mixers.gru import GRUSettings
from armillary.nn.mixers.lstm import LSTMSettings
from armillary.nn.mixers.recurrent import Recurrent
from armillary.nn.mixers.rnn import RNNSettings
from common import forward_backward, interleaved, largest_difference, ratio, report

ROWS, LENGTH, WIDTH = 16, 256, 384
# The LSTM is the same library's; the others save most of a backward pass that adds up a slope per token.
GOALS = {"rnn": 1.0, "lstm": 0.9, "gru": 1.0}


def pair(name: str) -> tuple[Recurrent, nn.Module]:
    """Ours and theirs with the same weights."""
    settings = {"rnn": RNNSettings(), "lstm": LSTMSettings(forget=0.0), "gru": GRUSettings()}[name]
    mixer = settings.build(Place(WIDTH))
    initialise(mixer, 0)
    peer = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}[name](WIDTH, WIDTH, batch_first=True)
    held = mixer.ahead.held.bias
    biases = {
        "bias_ih_l0": mixer.ahead.bias,
        "bias_hh_l0": torch.zeros_like(mixer.ahead.bias) if held is None else held,
    }
    weights = {"weight_ih_l0": mixer.ahead.inputs.weight, "weight_hh_l0": mixer.ahead.held.weight}
    peer.load_state_dict({key: value.detach() for key, value in {**weights, **biases}.items()})
    return mixer, peer


def main() -> None:
    figures: dict[str, float] = {}
    reach: dict[str, tuple[float, str]] = {}
    x = torch.randn(ROWS, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0)).requires_grad_()
    documents = (torch.arange(LENGTH) * 3 // LENGTH).expand(ROWS, -1)
    for name, goal in GOALS.items():
        mixer, peer = pair(name)
        o = mixer.o.weight.detach().clone().requires_grad_()
        ours = [x, mixer.ahead.inputs.weight, mixer.ahead.held.weight, mixer.o.weight]
        theirs = [x, peer.weight_ih_l0, peer.weight_hh_l0, o]

        def call(x: torch.Tensor, *_: torch.Tensor, mixer: Recurrent = mixer) -> torch.Tensor:
            return mixer(x, Context())

        def known(x: torch.Tensor, *_: torch.Tensor, peer: nn.Module = peer, o: torch.Tensor = o) -> torch.Tensor:
            return peer(x)[0] @ o.t()

        def packed(x: torch.Tensor, *_: torch.Tensor, mixer: Recurrent = mixer) -> torch.Tensor:
            return mixer(x, Context(documents=documents))

        error = largest_difference(call(*ours), ours, known(*theirs), theirs)
        assert error <= 1e-4, f"{name}: off by {error}"
        calls = {"ours": forward_backward(call, ours), "PyTorch": forward_backward(known, theirs)}
        if name == "lstm":
            calls["documents"] = forward_backward(packed, ours)
        found = interleaved(calls)
        for each in calls:
            figures[f"{name}: {each}, ms"] = 1e3 * statistics.median(found[each])
        figures[f"{name}: faster than PyTorch's, ×"] = ratio(found, "PyTorch", "ours")
        reach[f"{name}: faster than PyTorch's, ×"] = (goal, "min")
    report("recurrent", figures, reach)


if __name__ == "__main__":
    main()
