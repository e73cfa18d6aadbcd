"""From a dense network to experts and back, with the same weights: which features belong together is in them.

Qiu et al. 2023, Emergent Mixture-of-Experts. The rows that the hidden features of a feed-forward network
look for are clustered by direction into groups of one size; features are sorted by group, and the
network becomes one of `emergent` channels. Nothing is added and nothing is trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor

from armillary.base.errors import InputError, UnsupportedError
from armillary.compress.clusters import balanced_clusters
from armillary.nn.block import BlockSettings, BranchSettings
from armillary.nn.channels.emergent import Emergent, EmergentSettings
from armillary.nn.channels.ffn import FFNSettings
from armillary.nn.channels.gated import GatedSettings
from armillary.nn.linear import Linear
from armillary.nn.mechanism import ChannelSettings
from armillary.nn.network import ModelSettings, Network, build
from armillary.nn.stack import DEFAULT_BLOCK, StackSettings

DENSE = (FFNSettings, GatedSettings)


@dataclasses.dataclass(frozen=True)
class Splitting:
    """network: the one with experts; likeness: by channel, the mean cosine of the features' rows to the mean
    direction of their group (of groups at random it is about 0)."""

    network: Network
    likeness: dict[str, float]


def split_experts(
    network: Network, experts: int, *, top: int | None = None, layers: Collection[int] | None = None, seed: int = 0
) -> Splitting:
    """Group the hidden features of every dense feed-forward network into `experts` of one size.

    top: how many of them a token picks, by default all, which is the same function; layers: in which
    blocks (of encoder and decoder alike), by default all. The given network is left as it was. Raises InputError for
    numbers that do not divide or blocks that are not there, UnsupportedError where there is nothing to group.
    """
    if experts < 1 or not 1 <= (experts if top is None else top) <= experts:
        raise InputError(f"{top} of {experts} experts cannot be picked", hint="1 to as many as there are")
    _check_layers(network.settings, layers)

    def split(given: ChannelSettings) -> ChannelSettings:
        if not isinstance(given, DENSE):
            return given
        return EmergentSettings(experts=experts, top=top or experts, dense=given.derive(chunk=None))

    made = _rebuilt(network, split, layers)
    likeness: dict[str, float] = {}
    moved: dict[str, Tensor] = {}
    held = dict(network.named_modules())
    for name, channel in made.named_modules():
        if not isinstance(channel, Emergent) or isinstance(held.get(name), Emergent):
            continue
        dense: Any = held[name]
        rows = (dense.gate if channel.gated else dense.up).weight.detach().float()
        order, likeness[name] = balanced_clusters(rows, experts, seed)
        moved |= {f"{name}.{key}": value for key, value in _sorted(dense, order, "dense.").items()}
        moved[f"{name}.order"] = order
    if not likeness:
        raise UnsupportedError(
            "this network has no dense feed-forward network to split", hint="channels of kind ffn or gated"
        )
    return Splitting(_filled(made, network, moved), likeness)


def merge_experts(network: Network) -> Network:
    """The dense network again, its features where they were before they were split: with all experts picked
    it is the same function. Raises UnsupportedError where there are no experts."""
    found = {name: module for name, module in network.named_modules() if isinstance(module, Emergent)}
    if not found:
        raise UnsupportedError("this network has no experts to merge", hint="channels of kind emergent")
    made = _rebuilt(network, lambda given: given.dense if isinstance(given, EmergentSettings) else given, None)
    moved: dict[str, Tensor] = {}
    for name, channel in found.items():
        back = channel.order.argsort()
        moved |= {f"{name}.{key}": value for key, value in _sorted(channel.dense, back, "").items()}
    return _filled(made, network, moved)


def pick(network: Network, share: float) -> Network:
    """Let every token pick this share of the experts (at least one) in every emergent channel; returns the
    network itself, its settings as they were."""
    for module in network.modules():
        if isinstance(module, Emergent):
            module.top = max(1, round(share * module.settings.experts))
    return network


def _sorted(dense: Any, order: Tensor, prefix: str) -> dict[str, Tensor]:
    """The parameters of a feed-forward network with its hidden features in this order."""
    found: dict[str, Tensor] = {}
    for name, part in dense.named_children():
        assert isinstance(part, Linear)
        at = order.to(part.weight.device)
        into = name != "down"
        found[f"{prefix}{name}.weight"] = (part.weight[at] if into else part.weight[:, at]).detach()
        if part.bias is not None:
            found[f"{prefix}{name}.bias"] = (part.bias[at] if into else part.bias).detach()
    return found


def _filled(made: Network, given: Network, moved: dict[str, Tensor]) -> Network:
    """`made` with the tensors that moved, and all others as in `given`."""
    wanted = made.state_dict()
    tensors = {name: value for name, value in given.state_dict().items() if name in wanted}
    made = made.to(given.embed.weight.dtype)
    made.load_state_dict(tensors | moved)
    made.tie()
    made = made.to(given.device).compute(given.dtype)
    made.train(given.training)
    return made


def _check_layers(settings: ModelSettings, layers: Collection[int] | None) -> None:
    depth = max(settings.depth, 0 if settings.encoder is None else settings.encoder.depth)
    for index in layers or ():
        if not 0 <= index < depth:
            raise InputError(f"there is no block {index}", hint=f"blocks are 0 to {depth - 1}")


def _rebuilt(
    network: Network, change: Callable[[ChannelSettings], ChannelSettings], layers: Collection[int] | None
) -> Network:
    """A network of the same settings but for its channels."""
    settings = network.settings
    if settings.share:
        raise UnsupportedError("channels that share their parameters cannot be split or merged", hint="share: {}")
    changes: dict[str, Any] = _stack(settings, change, layers)
    if settings.encoder is not None:
        changes["encoder"] = settings.encoder.derive(**_stack(settings.encoder, change, layers))
    return build(settings.derive(**changes), device="cpu")


def _stack(
    settings: StackSettings, change: Callable[[ChannelSettings], ChannelSettings], layers: Collection[int] | None
) -> dict[str, Any]:
    """What is to change of a stack: whole kinds of block, or blocks one by one."""

    def channel(given: ChannelSettings | None) -> ChannelSettings | None:
        return None if given is None else change(given)

    def branch(given: BranchSettings) -> BranchSettings:
        return given.derive(channel=channel(given.channel))

    def block(given: BlockSettings) -> BlockSettings:
        if given.branches is None:
            return given.derive(channel=channel(given.channel))
        return given.derive(branches=tuple(branch(each) for each in given.branches))

    if layers is not None:
        each = {index: block(given) for index, given in enumerate(settings.layers()) if index in layers}
        return {"overrides": settings.overrides | each}
    changes: dict[str, Any] = {"overrides": {index: block(given) for index, given in settings.overrides.items()}}
    if settings.blocks is not None:
        changes["blocks"] = {name: block(given) for name, given in settings.blocks.items()}
    else:
        changes["block"] = block(settings.block or DEFAULT_BLOCK)
    return changes
