"""Routing: which experts a token takes, by how much, and the losses that keep experts in use.

Choices are made on float32 scores whose bits do not depend on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

Balance = Literal["switch", "mutual_information", "concentration"]
Scores = Literal["softmax", "sigmoid"]
BALANCES: tuple[Balance, ...] = get_args(Balance)


def row_scores(product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """product(x) in float32 (float64 for float64), the same for a row whatever rows stand beside it.

    Matrix kernels add up in another order for another number of rows, so the sums are taken in
    float64 and rounded: what is left of the order lies far below float32.
    """
    scores = product(x.double())
    return scores if x.dtype == torch.float64 else scores.float()


def top_gates(
    scores: Tensor,
    k: int,
    *,
    normalise: bool,
    updating: bool = False,
    kind: Scores = "softmax",
    correction: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The k best of scores [..., E] → experts [..., k] int64, gates [..., k], probabilities [..., E].

    Gates are the softmax over all E, or the sigmoid of each; normalise: divided by their sum over the
    chosen, which for a softmax is the softmax over the chosen. While a model is updating no gradient
    flows through that sum (Zhang et al. 2022, Mixture of Attention Heads), so that a router learns even
    from a single pick; elsewhere derivatives are the true ones. correction [E]: added where experts
    are chosen and nowhere else (Wang et al. 2024, Auxiliary-Loss-Free Load Balancing). Probabilities of
    sigmoid gates are their shares.
    """
    every = torch.softmax(scores, -1) if kind == "softmax" else torch.sigmoid(scores)
    # a softmax keeps the order of scores, which do not round to ties where probabilities would
    chosen_by = scores if kind == "softmax" and correction is None else every
    experts = (chosen_by if correction is None else chosen_by + correction.to(every)).topk(k, -1).indices
    gates = every.gather(-1, experts)
    if normalise:
        total = gates.sum(-1, keepdim=True)
        gates = gates / (total.detach() if updating else total)
    probabilities = every if kind == "softmax" else every / every.sum(-1, keepdim=True)
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


def within_capacity(
    experts: Tensor, count: int, factor: float, documents: Tensor | None = None, real: Tensor | None = None
) -> Tensor:
    """Which picks [B, T, k] find room when an expert takes ⌈factor · k · n / E⌉ picks of a document of n tokens.

    Picks of an expert are ranked by position, those of a token by gate (Lepikhin et al. 2020, GShard), so
    that no later token takes an earlier one's room. documents [B, T]: without, a row is one document;
    real [B, T]: False for tokens that ask for nothing.
    """
    batch, length, chosen = experts.shape
    real = torch.ones(batch, length, dtype=torch.bool, device=experts.device) if real is None else real
    hot = torch.nn.functional.one_hot(experts, count) * real[..., None, None]  # [B, T, k, E]
    before = (hot.flatten(1, 2).cumsum(1) - hot.flatten(1, 2)).view_as(hot)
    if documents is None:
        tokens = real.sum(1, keepdim=True)
    else:
        new = torch.ones_like(documents, dtype=torch.bool)
        new[:, 1:] = documents[:, 1:] != documents[:, :-1]
        number = new.cumsum(1) - 1
        first = torch.where(new, torch.arange(length, device=new.device), 0).cummax(1).values
        start = before[:, :, 0].gather(1, first[..., None].expand(-1, -1, count))  # what stood before the document
        before = before - start[:, :, None]
        tokens = torch.zeros_like(number).scatter_add_(1, number, real.long()).gather(1, number)
    room = (tokens.double() * (factor * chosen / count)).ceil()
    return ((before * hot).sum(-1) < room[..., None]) & real[..., None]


def disparity(probabilities: Tensor, experts: Tensor, groups: Tensor, count: int, bound: float) -> Tensor:
    """Σ_e max(0, max_g s_ge − bound · min_g s_ge): the load by which groups differ beyond the bound, from 0 to 1.

    s_ge is the share of the picks of group g that go to expert e; its gradient is that of the group's mean
    probability, since picks have none. probabilities [N, E], experts [N, k], groups [N] int64 below
    `count`, negative for tokens of none. Groups without a token take no part; with fewer than two there
    is nothing to compare, and the loss is 0.
    """
    known = groups >= 0
    owner = groups.clamp(min=0)
    kind, width = probabilities.dtype, probabilities.shape[1]
    weight = known.to(kind)
    size = torch.zeros(count, dtype=kind, device=owner.device).index_add(0, owner, weight)
    there = (size > 0)[:, None]
    per = size.clamp(min=1)[:, None]
    hot = torch.zeros_like(probabilities).scatter_add(-1, experts, torch.ones_like(experts).to(kind))
    blank = torch.zeros(count, width, dtype=kind, device=owner.device)
    mean = blank.index_add(0, owner, probabilities * weight[:, None]) / per
    share = blank.index_add(0, owner, hot * weight[:, None]) / (per * experts.shape[1])
    share = share + mean - mean.detach()
    most = share.masked_fill(~there, -torch.inf).amax(0)
    least = share.masked_fill(~there, torch.inf).amin(0)
    beyond = torch.where(there.sum() > 1, most - bound * least, 0)
    return beyond.clamp(min=0).sum()
