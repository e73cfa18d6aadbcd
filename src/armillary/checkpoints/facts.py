"""What a network computes, as flat facts, however its settings were spelled.

Two settings with equal facts compute the same function of the same parameters: defaults that depend
on other settings are worked out, every block stands for itself, and what only matters in training
(dropout, first weights) is left out. Families compare facts to know what they can express.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from armillary.base.settings import Choice, Settings
from armillary.nn.block import BlockSettings, BranchSettings
from armillary.nn.channels.ffn import FFNSettings
from armillary.nn.channels.gated import GatedSettings
from armillary.nn.channels.moe import ExpertSettings, MoESettings
from armillary.nn.mixers.attention import AttentionSettings
from armillary.nn.mixers.mamba import MambaSettings
from armillary.nn.mixers.mamba2 import Mamba2Settings
from armillary.nn.network import ModelSettings
from armillary.nn.positions.rope import RopeScaling
from armillary.nn.stack import StackSettings

Facts = dict[str, Any]

_STACK = ("block", "blocks", "pattern", "overrides")  # replaced by the block of every index
_TRAINING = ("dropout", "deviation")
_ROUTER_TRAINING = ("balance", "balance_weight", "z_weight", "capacity", "jitter")
_FIRST_WEIGHTS = ("decays", "steps")
_SCALING = {
    "llama3": ("trained_length", "low", "high"),
    "yarn": ("trained_length", "beta_fast", "beta_slow", "temperature"),
}


def facts(settings: ModelSettings) -> Facts:
    """Dotted names to scalars, for example `blocks.3.mixer.heads`."""
    data = _stack(settings, settings.width)
    data["linear"] = {role: item for role, item in data["linear"].items() if item != {"kind": "dense"}}
    if settings.encoder is not None:
        data["encoder"] = _stack(settings.encoder, settings.width)
    return flat(data)


def flat(data: Mapping[str, Any], above: str = "") -> Facts:
    """A nested mapping with dotted names; an empty mapping or list inside has no entry."""
    found: Facts = {}
    for key, value in data.items():
        name = f"{above}{key}"
        if isinstance(value, (list, tuple)):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, Mapping):
            found |= flat(value, f"{name}.")
        else:
            found[name] = value
    return found


def _stack(settings: StackSettings, width: int) -> dict[str, Any]:
    """Everything but the blocks as it is said, and every block."""
    data = {name: _plain(value, width) for name, value in _fields(settings) if name not in (*_STACK, "encoder")}
    return data | {"blocks": {str(index): _block(block, width) for index, block in enumerate(settings.layers())}}


def _block(block: BlockSettings, width: int) -> dict[str, Any]:
    """The short form where the branches have one, else the branches by their names."""
    branches = block.all()
    first = branches[0]
    short = (
        BlockSettings(
            mixer=next((one.mixer for one in branches if one.name == "mixer"), None),
            cross=next((one.mixer for one in branches if one.name == "cross"), None),
            channel=next((one.channel for one in branches if one.name == "channel"), None),
            norm=first.norm,
            norm_at=first.norm_at,
            dropout=first.dropout,
        )
        if {one.name for one in branches} <= {"mixer", "cross", "channel"}
        else None
    )
    data: dict[str, Any] = {"parallel": block.parallel}
    if short is not None and _even(short.all()) == _even(branches):
        data |= {"norm": _plain(first.norm, width), "norm_at": first.norm_at}
        data |= {branch.name: _plain(branch.mixer or branch.channel, width) for branch in branches}
    else:
        data["branches"] = ", ".join(branch.name for branch in branches)
        data["branch"] = {branch.name: _plain(branch, width) for branch in branches}
    return data


def _even(branches: tuple[BranchSettings, ...]) -> list[BranchSettings]:
    return [branch.derive(dropout=0.0) for branch in branches]


def _plain(value: Any, width: int) -> Any:
    if not isinstance(value, Settings):
        if isinstance(value, Mapping):
            return {key: _plain(item, width) for key, item in value.items()}
        return [_plain(item, width) for item in value] if isinstance(value, (list, tuple)) else value
    if isinstance(value, Choice) and value.kind == "none":
        return None
    data: dict[str, Any] = {"kind": value.kind} if isinstance(value, Choice) else {}
    data |= {name: _plain(item, width) for name, item in _fields(value) if name not in _TRAINING}
    if isinstance(value, AttentionSettings):
        features = value.features(width)
        data |= {"kv_heads": value.groups, "head_width": features, "scale": value.scale or features**-0.5}
        data["out_bias"] = value.bias if value.out_bias is None else value.out_bias
        if value.norm is None:
            del data["norm_over"]
    elif isinstance(value, (FFNSettings, GatedSettings, ExpertSettings)):
        data["hidden"] = value.features(width)
        if isinstance(value, MoESettings):
            data = {name: item for name, item in data.items() if name not in _ROUTER_TRAINING}
    elif isinstance(value, MambaSettings):
        data["rank"] = value.features(width)
    elif isinstance(value, Mamba2Settings):
        data = {name: item for name, item in data.items() if name not in _FIRST_WEIGHTS}
    elif isinstance(value, RopeScaling):
        data["temperature"] = value.temperature or yarn_temperature(value.factor)
        data = {name: data[name] for name in ("kind", "factor", *_SCALING.get(value.kind, ()))}
    return data


def yarn_temperature(factor: float, weight: float = 1.0) -> float:
    """The factor on q and k that goes with a stretch (Peng et al. 2023, YaRN)."""
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0


def _fields(settings: Settings) -> list[tuple[str, Any]]:
    return [(name, getattr(settings, name)) for name in type(settings).model_fields]
