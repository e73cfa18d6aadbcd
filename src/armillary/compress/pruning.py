"""Data-informed pruning of attention: what a trained model hardly ever looks at is masked for good.

Rugina et al. 2020, Data-Informed Global Sparseness in Attention Mechanisms for Deep Neural Networks:
the softmax weights of every head are averaged over data by (query, key) position, and the share with
the smallest averages is removed. The result is a network of `pruned` mixers with the same weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from armillary.base.errors import InputError, UnsupportedError
from armillary.nn.block import BlockSettings
from armillary.nn.mixers.attention import Attention, AttentionSettings
from armillary.nn.mixers.pruned import PrunedSettings
from armillary.nn.network import ModelSettings, Network, build
from armillary.nn.stack import DEFAULT_BLOCK
from armillary.nn.taps import Taps

Scope = Literal["head", "layer", "model"]


@dataclass(frozen=True)
class Pruning:
    """network: the pruned one; removed: share of all pairs that is masked; kept_mass: by mixer, the share of
    its attention that fell on pairs that are kept."""

    network: Network
    removed: float
    kept_mass: Mapping[str, float]


def prune_attention(network: Network, rows: Iterable[Tensor], fraction: float, *, scope: Scope = "head") -> Pruning:
    """Mask the `fraction` of the pairs of positions that get least attention over `rows`.

    rows: batches of ids [B, T], all of one T, which is the calibrated length; better from training
    data. scope: over what pairs compete: each head keeps the same share, or heads of a layer, or of
    the model share. Every query keeps at least one key. The given network is left as it was. Raises
    InputError for a fraction outside [0, 1) or without rows, UnsupportedError where there is no
    dense self-attention.
    """
    if not 0 <= fraction < 1:
        raise InputError(f"a fraction of {fraction} cannot be pruned", hint="at least 0 and less than 1")
    if scope not in ("head", "layer", "model"):
        raise InputError(f"there is no scope '{scope}'", hint="head, layer or model")
    mass = attention_mass(network, rows)
    causal = network.settings.form == "decoder"
    size = next(iter(mass.values())).shape[-1]
    pairs = torch.ones(size, size, dtype=torch.bool)
    pairs = pairs.tril() if causal else pairs
    names = list(mass)
    groups = [[name] for name in names] if scope != "model" else [names]
    kept: dict[str, Tensor] = {}
    for group in groups:
        stacked = torch.cat([mass[name] for name in group])
        sizes = [len(mass[name]) for name in group]
        chosen = keep_largest(stacked, pairs, fraction, each=scope == "head")
        kept |= dict(zip(group, chosen.split(sizes), strict=True))
    made = build(_rewritten(network.settings, size), device="cpu")
    tensors = dict(network.state_dict())
    for name in names:
        tensors[f"{name}.kept"] = kept[name] | ~pairs  # a causal mask rules out what comes later
        tensors[f"{name}.distances"] = _distances(mass[name], causal, fraction)
    made = made.to(network.embed.weight.dtype)
    made.load_state_dict(tensors)
    made.tie()
    made = made.to(network.device).compute(network.dtype)
    made.train(network.training)
    total = sum(int(pairs.sum()) * len(kept[name]) for name in names)
    left = sum(int((kept[name] & pairs).sum()) for name in names)
    share = {name: float((mass[name] * kept[name]).sum() / mass[name].sum()) for name in names}
    return Pruning(made, 1 - left / total, share)


def attention_mass(network: Network, rows: Iterable[Tensor]) -> dict[str, Tensor]:
    """Mean softmax weights by mixer name, [H, T, T] float32 on the CPU, over batches of ids [B, T]."""
    paths = _paths(network)
    total: dict[str, Tensor] = {}
    count, length = 0, 0
    with torch.no_grad():
        for ids in rows:
            if count and ids.shape[1] != length:
                raise InputError(
                    f"rows of {ids.shape[1]} and of {length} tokens", hint="positions are compared: cut all rows alike"
                )
            length = ids.shape[1]
            taps = Taps([f"{path}.weights" for path in paths.values()])
            network.hidden(ids.to(network.device), taps=taps)
            for name, path in paths.items():
                weights = taps.seen.steps(f"{path}.weights").pop().float().sum(0).cpu()
                total[name] = total[name] + weights if name in total else weights
            count += len(ids)
    if not count:
        raise InputError("there are no rows to look at", hint="give at least one batch of ids [B, T]")
    return {name: value / count for name, value in total.items()}


def keep_largest(mass: Tensor, pairs: Tensor, fraction: float, *, each: bool = True) -> Tensor:
    """Bool [H, T, S]: the 1 − fraction of the `pairs` [T, S] with the largest mass [H, T, S].

    each: in every head, or over all heads together. The largest pair of every query is kept whatever
    its mass, so fewer others are where that takes up more than the share.
    """
    heads = mass.shape[0]
    held = mass.masked_fill(~pairs, -1.0)
    best = torch.zeros_like(held, dtype=torch.bool).scatter_(2, held.argmax(2, keepdim=True), True) & pairs
    order = held.masked_fill(best, torch.inf)  # those first
    flat = order.view(heads, -1) if each else order.view(1, -1)
    among = int(pairs.sum()) * (1 if each else heads)
    wanted = max(among - int(fraction * among), int(best.view(flat.shape).sum(1).max()))
    # A stable order, so that equal masses are cut in the same way everywhere.
    top = flat.argsort(dim=1, descending=True, stable=True)[:, :wanted]
    kept = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, top, True)
    return kept.view(mass.shape) & pairs


def _distances(mass: Tensor, causal: bool, fraction: float) -> Tensor:
    """Bool [H, 2T + 1] over query − key: the same share of the distances, by the mean mass at each; the
    ends stand for what is farther than anything seen, which only an unpruned mask keeps."""
    heads, length = mass.shape[0], mass.shape[1]
    apart = range(0 if causal else 1 - length, length)
    means = torch.stack([mass.diagonal(-d, 1, 2).mean(1) for d in apart], 1)
    kept = keep_largest(means[:, None], torch.ones(1, len(apart), dtype=torch.bool), fraction)[:, 0]
    found = torch.full((heads, 2 * length + 1), fraction == 0.0)
    found[:, length + apart.start : length + apart.stop] = kept
    found[:, length] = True  # a query always has itself
    return found


def _paths(network: Network) -> dict[str, str]:
    """Module name → tap path of every dense self-attention."""
    if network.settings.form not in ("decoder", "encoder"):
        raise UnsupportedError(f"attention of a {network.settings.form} model cannot be pruned by position")
    found = {
        name: module.path
        for name, module in network.named_modules()
        if type(module) is Attention and name.endswith(".inner")  # a block's own, not one inside a mixer
    }
    if not found:
        raise UnsupportedError("this network has no dense attention to prune")
    return found


def _rewritten(settings: ModelSettings, length: int) -> ModelSettings:
    """The same model with `pruned` in place of `attention`."""

    def mixer(given: Any) -> Any:
        if type(given) is not AttentionSettings:
            return given
        fields = {name: getattr(given, name) for name in AttentionSettings.model_fields}
        return PrunedSettings(**fields, length=length)

    def block(given: BlockSettings) -> BlockSettings:
        if given.branches is None:
            return given.derive(mixer=mixer(given.mixer))
        branches = [branch.derive(mixer=mixer(branch.mixer)) for branch in given.branches]
        return given.derive(branches=tuple(branches))

    changes: dict[str, Any] = {"overrides": {index: block(given) for index, given in settings.overrides.items()}}
    if settings.blocks is not None:
        changes["blocks"] = {name: block(given) for name, given in settings.blocks.items()}
    else:
        changes["block"] = block(settings.block or DEFAULT_BLOCK)
    return settings.derive(**changes)
