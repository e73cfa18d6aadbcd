"""Whole shapes from every registered mixer: decoder, encoder, prefix model and both halves of an encoder–decoder.

What a mixer declares must build and run in that shape, with a gradient for every parameter that takes
part; what it does not declare must be refused when the network is built.
"""

from __future__ import annotations

import pytest
import torch

from armillary.base.errors import ArmillaryError
from armillary.nn.mechanism import mixers
from armillary.nn.network import ModelSettings, build

LENGTH, VOCABULARY = 9, 20
LOOK = {"kind": "attention", "heads": 2}


def example(settings, order: str):
    for one in settings.examples():
        if one.place.get("order", "causal") == order and not one.place.get("cross"):
            return one.settings
    return settings.examples()[0].settings


def network(form: str, **blocks):
    settings = {"form": form, "width": 16, "vocabulary": VOCABULARY, "context": 32, "depth": 1, **blocks}
    return build(ModelSettings(**settings), seed=1)


def runs(made, **inputs) -> None:
    ids = torch.arange(LENGTH)[None] % VOCABULARY
    side = made.blank_side(1, LENGTH) | inputs.pop("side", {})
    out = made(ids, side=side, **inputs)
    assert out.shape == (1, LENGTH, VOCABULARY)
    assert bool(torch.isfinite(out).all())
    out.square().sum().backward()
    assert any(parameter.grad is not None for parameter in made.parameters())


@pytest.mark.parametrize("kind, settings", sorted(dict(mixers).items()))
def test_shapes(kind, settings) -> None:
    can = settings.capabilities
    shapes = {
        "decoder": (can.causal, "causal", {}),
        "encoder": (can.bidirectional, "bidirectional", {}),
        "prefix": (can.prefix, "prefix", {"side": {"prefix": torch.tensor([4])}}),
    }
    assert any(declared for declared, _, _ in shapes.values())
    for form, (declared, order, inputs) in shapes.items():
        block = {"block": {"mixer": example(settings, order), "channel": "ffn"}}
        if declared:
            runs(network(form, **block), **inputs)
        else:
            with pytest.raises(ArmillaryError):
                network(form, **block)
    source = {"source": torch.arange(7)[None]}
    if can.bidirectional:
        inside = {"depth": 1, "block": {"mixer": example(settings, "bidirectional"), "channel": "ffn"}}
        whole = {"encoder": inside, "block": {"mixer": LOOK, "cross": LOOK, "channel": "ffn"}}
        if any(one.capabilities.side for one in network("encoder", block=inside["block"]).mixers()):
            with pytest.raises(ArmillaryError, match="side tensors"):
                network("encoder_decoder", **whole)
        else:
            runs(network("encoder_decoder", **whole), **source)
    if can.causal:
        encoder = {"depth": 1, "block": {"mixer": LOOK, "channel": "ffn"}}
        block = {"mixer": example(settings, "causal"), "cross": LOOK, "channel": "ffn"}
        runs(network("encoder_decoder", encoder=encoder, block=block), **source)
