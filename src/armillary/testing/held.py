"""The oracle of steps whose products hold their weights in other numbers than the network does."""

from __future__ import annotations

import copy

import torch
from torch import nn

from armillary.native.tape import Weights, as_held
from armillary.nn.linear import ExpertLinear, Linear
from armillary.nn.network import Network


@torch.no_grad()
def with_held(network: Network, weights: Weights) -> Network:
    """The network in float64 with exactly the numbers that products hold in such weights.

    A table of embeddings is no product, also where the head shares it; what experts' routers hold stays float32.
    """
    made = copy.deepcopy(network).double()
    for name, product in made.named_modules():
        own = network.get_submodule(name)
        if isinstance(product, Linear) and isinstance(own, Linear):
            kind: Weights = "float32" if name.rpartition(".")[2] == "router" else weights
            product.weight = nn.Parameter(as_held(own.weight, kind))
        elif isinstance(product, ExpertLinear) and isinstance(own, ExpertLinear):
            product.weight.copy_(torch.stack([as_held(weight, weights) for weight in own.weight]))
    return made.compute(torch.float64)
