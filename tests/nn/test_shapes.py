"""Whole shapes from every registered mixer: decoder, encoder, prefix model and both halves of an encoder–decoder.

What a mixer declares must build and run in that shape, and an update of it must have a finite gradient that
is not 0 for every parameter; what it does not declare must be refused when the network is built.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from armillary.base.errors import ArmillaryError
from armillary.nn.mechanism import mixers
from armillary.nn.network import ModelSettings, build
from armillary.nn.training import Training

LENGTH, VOCABULARY = 16, 20  # as long as the context: heads of regions see all of them
LOOK = {"kind": "attention", "heads": 2}


def example(settings, order: str):
    for one in settings.examples():
        if one.place.get("order", "causal") == order and not one.place.get("cross"):
            return one
    return settings.examples()[0]


def network(form: str, **blocks):
    settings = {"form": form, "width": 16, "vocabulary": VOCABULARY, "context": LENGTH, "depth": 1, **blocks}
    return build(ModelSettings(**settings), seed=1)


def runs(made, one=None, **inputs) -> None:
    """one: the example inside; side tensors are its own, since blank ones have no slopes."""
    ids = torch.arange(LENGTH)[None] % VOCABULARY
    side = {} if one is None or one.side is None else one.side(1, LENGTH)
    side = made.blank_side(1, LENGTH) | side | inputs.pop("side", {})
    # in an adverse update all learn, those that hide pairs from the others too
    out = made(ids, side=side, training=dataclasses.replace(Training.of(1), adverse=True), **inputs)
    assert out.shape == (1, LENGTH, VOCABULARY)
    assert bool(torch.isfinite(out).all())
    out.square().sum().backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None, f"{name} gets no gradient"
        assert bool(parameter.grad.isfinite().all()), f"the gradient of {name} is not finite"
        assert bool(parameter.grad.any()), f"the gradient of {name} is 0"


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
        one = example(settings, order)
        block = {"block": {"mixer": one.settings, "channel": "ffn"}}
        if declared:
            runs(network(form, **block), one, **inputs)
        else:
            with pytest.raises(ArmillaryError):
                network(form, **block)
    source = {"source": torch.arange(LENGTH)[None]}
    if can.bidirectional:
        inside = {"depth": 1, "block": {"mixer": example(settings, "bidirectional").settings, "channel": "ffn"}}
        whole = {"encoder": inside, "block": {"mixer": LOOK, "cross": LOOK, "channel": "ffn"}}
        if any(one.capabilities.side for one in network("encoder", block=inside["block"]).mixers()):
            with pytest.raises(ArmillaryError, match="side tensors"):
                network("encoder_decoder", **whole)
        else:
            runs(network("encoder_decoder", **whole), **source)
    if can.causal:
        encoder = {"depth": 1, "block": {"mixer": LOOK, "channel": "ffn"}}
        one = example(settings, "causal")
        block = {"mixer": one.settings, "cross": LOOK, "channel": "ffn"}
        runs(network("encoder_decoder", encoder=encoder, block=block), one, **source)
