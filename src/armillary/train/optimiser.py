"""Which parameters are decayed, at what rate each group learns, and the fused AdamW that moves them.

Weight decay pulls at matrices that multiply activations. It leaves out embeddings and position
tables (a row that no batch holds would shrink for nothing), norms, biases and other vectors.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from armillary.base.errors import InputError
from armillary.nn.linear import Embedding
from armillary.nn.mechanism import Position
from armillary.recipe.training import OptimiserSettings


def parameter_groups(
    network: nn.Module, settings: OptimiserSettings, scales: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """AdamW's groups: every trained parameter once, under its first name, however often it is tied.

    scales: factor on the learning rate by shell-style name pattern (`blocks.*.mixer.*`); the first
    that matches counts. A module may list names of its own parameters in `undecayed`. Each group
    holds `params`, `names`, `weight_decay` and `scale`. What the network's `rates` (model.scaling) take
    from a learning rate does not slow its decay. Raises InputError for a pattern that
    matches nothing, and when no parameter is trained.
    """
    scales = dict(scales or {})
    rates: Mapping[str, float] = getattr(network, "rates", {})
    found: dict[tuple[float, float], dict[str, Any]] = {}
    used: set[str] = set()
    for name, parameter, decayed in _parameters(network):
        pattern = next((each for each in scales if fnmatch.fnmatchcase(name, each)), None)
        scale = 1.0 if pattern is None else scales[pattern]
        if pattern is not None:
            used.add(pattern)
        rate = rates.get(name, 1.0)
        scale, decay = scale * rate, settings.weight_decay / rate if decayed else 0.0
        group = found.setdefault((decay, scale), {"params": [], "names": [], "weight_decay": decay, "scale": scale})
        group["params"].append(parameter)
        group["names"].append(name)
    for pattern in scales:
        if pattern not in used:
            raise InputError(f"no trained parameter matches '{pattern}'")
    if not found:
        raise InputError("no parameter is trained", hint="set requires_grad on some of them")
    return list(found.values())


def build_optimiser(groups: list[dict[str, Any]], settings: OptimiserSettings) -> torch.optim.AdamW:
    """AdamW over the groups (Loshchilov and Hutter 2019, Decoupled Weight Decay Regularization)."""
    first: Tensor = groups[0]["params"][0]
    return torch.optim.AdamW(
        groups,
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.epsilon,
        fused=first.device.type in ("cpu", "cuda", "xpu", "mps"),
    )


def set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its share of the learning rate."""
    for group in optimiser.param_groups:
        group["lr"] = rate * group["scale"]


def _parameters(network: nn.Module) -> Iterator[tuple[str, nn.Parameter, bool]]:
    """(name, parameter, decayed) of every trained parameter; a tied one is decayed only if every
    module that holds it would have it so."""
    barred: set[int] = set()
    for module in network.modules():
        kept = getattr(module, "undecayed", ())
        whole = isinstance(module, (Embedding, Position))
        for name, parameter in module.named_parameters(recurse=isinstance(module, Position)):
            if whole or name in kept or parameter.dim() < 2:
                barred.add(id(parameter))
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            yield name, parameter, id(parameter) not in barred
