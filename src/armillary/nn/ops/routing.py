"""Routing: which experts a token takes, by how much, and the losses that keep experts in use.

Choices are made on float32 scores whose bits do not depend on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

Balance = Literal["switch", "mutual_information", "concentration"]
BALANCES: tuple[Balance, ...] = get_args(Balance)


def row_scores(product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """product(x) in float32 (float64 for float64), the same for a row whatever rows stand beside it.

    Matrix kernels add up in another order for another number of rows, so the sums are taken in
    float64 and rounded: what is left of the order lies far below float32.
    """
    scores = product(x.double())
    return scores if x.dtype == torch.float64 else scores.float()


def top_gates(scores: Tensor, k: int, *, normalise: bool, updating: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The k best of scores [..., E] → experts [..., k] int64, gates [..., k], probabilities [..., E].

    Gates are the softmax over all E; normalise: divided by their sum over the chosen. While a model
    is updating no gradient flows through that sum (Zhang et al. 2022, Mixture of Attention Heads), so
    that a router learns even from a single pick; elsewhere derivatives are the true ones.
    """
    probabilities = torch.softmax(scores, -1)
    experts = scores.topk(k, -1).indices
    gates = probabilities.gather(-1, experts)
    if normalise:
        total = gates.sum(-1, keepdim=True)
        gates = gates / (total.detach() if updating else total)
    return experts, gates, probabilities


def spread(experts: Tensor, gates: Tensor, count: int) -> Tensor:
    """The gates of all experts, 0 where not chosen: [..., k] → [..., E]."""
    return torch.zeros(*gates.shape[:-1], count, dtype=gates.dtype, device=gates.device).scatter(-1, experts, gates)


def balance_loss(probabilities: Tensor, experts: Tensor, kind: Balance, real: Tensor | None = None) -> Tensor:
    """How unevenly experts are used, over the tokens that are real [...] (None = all).

    switch: E · Σ_e f_e P_e, f the share of the choices and P the mean probability; 1 when even (Fedus
    et al. 2021, Switch Transformers). mutual_information: H(e|x) − H(e), the negative information
    that a token gives about its expert; concentration: H(e), which keeps a domain to few experts
    (Shen et al. 2023, ModuleFormer).
    """
    count = probabilities.shape[-1]
    weight = _share(probabilities, real)
    mean = (probabilities * weight[..., None]).flatten(0, -2).sum(0)
    if kind == "switch":
        chosen = torch.zeros_like(probabilities).scatter_add(-1, experts, torch.ones_like(experts).to(probabilities))
        load = (chosen * weight[..., None]).flatten(0, -2).sum(0) / experts.shape[-1]
        return count * (load * mean).sum()
    marginal = _entropy(mean)
    if kind == "concentration":
        return marginal
    return (_entropy(probabilities) * weight).sum() - marginal


def z_loss(scores: Tensor, real: Tensor | None = None) -> Tensor:
    """The mean of logsumexp(scores)²: keeps scores small (Zoph et al. 2022, ST-MoE)."""
    return (scores.logsumexp(-1).square() * _share(scores, real)).sum()


def _share(x: Tensor, real: Tensor | None) -> Tensor:
    """Weights of the tokens of x [..., E] that average over the real ones."""
    if real is None:
        real = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
    weight = real.to(x.dtype)
    return weight / weight.sum().clamp(min=1)


def _entropy(p: Tensor) -> Tensor:
    """−Σ p log p over the last axis, with finite slopes at 0."""
    return -(p * (p + torch.finfo(p.dtype).tiny).log()).sum(-1)
