"""Rotary positions in config.json: `rope_theta` beside `rope_scaling`, or both in the newer `rope_parameters`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from armillary.base.errors import CheckpointError, UnsupportedError
from armillary.checkpoints.facts import Facts, yarn_temperature
from armillary.checkpoints.fields import Config, Data, Field, first, put

POSITION = "block.mixer.position"
SCALINGS = ("linear", "llama3", "yarn")

_NAMES = {
    "factor": "factor",
    "trained_length": "original_max_position_embeddings",
    "low": "low_freq_factor",
    "high": "high_freq_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "temperature": "attention_factor",
}


class Rope(Field):
    """The rotary positions of every block, or of those at `position`.

    theta, share: the older keys of the base and of the share of each head that turns; fraction: what
    that share is without a key, None where the readers turn whole heads whatever it says; scalings:
    those that the readers know by these names; base: what it is without a key.
    """

    def __init__(
        self,
        theta: str = "rope_theta",
        share: str = "partial_rotary_factor",
        fraction: float | None = None,
        scalings: tuple[str, ...] = SCALINGS,
        base: float = 10000.0,
        position: str = POSITION,
    ) -> None:
        self.keys = (theta, "rope_scaling", "rope_parameters", share)
        self.paths = (position,)
        self.theta, self.share, self.fraction, self.scalings = theta, share, fraction, scalings
        self.base = base

    def read(self, config: Config, data: Data) -> None:
        newer, older = config.take("rope_parameters"), config.take("rope_scaling")
        if newer and older and newer != older:
            raise config.clash("'rope_parameters'", "'rope_scaling'")
        name = "rope_parameters" if newer else "rope_scaling"
        position = turned(
            config,
            name,
            newer or older,
            theta=(self.theta, config.take(self.theta)),
            base=self.base,
            share=(self.share, config.take(self.share)),
            fraction=self.fraction,
            scalings=self.scalings,
        )
        for key, value in position.items():
            put(data, f"{self.paths[0]}.{key}", value)

    def write(self, facts: Facts, config: Data) -> None:
        # The older keys: old and new readers know them.
        position = first(self.paths[0])
        config[self.theta] = facts[f"{position}.base"]
        config["rope_scaling"] = scaled(facts, position)
        if self.fraction is not None:
            config[self.share] = facts[f"{position}.fraction"]


def turned(
    config: Config,
    name: str,
    given: Any,
    *,
    theta: tuple[str, Any],
    base: float = 10000.0,
    share: tuple[str, Any] = ("partial_rotary_factor", None),
    fraction: float | None = None,
    scalings: tuple[str, ...] = SCALINGS,
) -> Data:
    """Settings of a position from the mapping `given` at the key `name`.

    theta, share: older keys and what they said; base, fraction: what is meant when nothing says it.
    """
    if given is None:
        given = {}
    if not isinstance(given, Mapping):
        raise config.wrong(name, given, "a mapping")
    rope = Config(given, config.where)
    said = _single(config, theta, (f"{name}.rope_theta", rope.take("rope_theta")))
    data: Data = {"base": config.number(theta[0], base if said is None else said, float)}
    part = _single(config, share, (f"{name}.partial_rotary_factor", rope.take("partial_rotary_factor")))
    if fraction is not None:
        data["fraction"] = config.number(share[0], fraction if part is None else part, float)
    elif part is not None and (isinstance(part, bool) or part != 1):
        raise UnsupportedError(f"'{share[0]}' is {part!r}", where=config.where, hint="only 1 can be read")
    kind = _single(config, (f"{name}.rope_type", rope.take("rope_type")), (f"{name}.type", rope.take("type")))
    scaling = _scaling(config, name, "default" if kind is None else kind, rope, scalings)
    if scaling is not None:
        data["scaling"] = scaling
    if rope.unread:
        keys = ", ".join(f"'{name}.{key}'" for key in sorted(rope.unread))
        raise UnsupportedError(f"not understood: {keys}", where=config.where)
    return data


def scaled(facts: Facts, position: str) -> Data | None:
    """What `rope_scaling` says of the position at these facts."""
    kind = facts.get(f"{position}.scaling.kind")
    if kind not in SCALINGS:
        return None
    known = {theirs: facts.get(f"{position}.scaling.{ours}") for ours, theirs in _NAMES.items()}
    return {"rope_type": kind, **{key: value for key, value in known.items() if value is not None}}


def _single(config: Config, *places: tuple[str, Any]) -> Any:
    """What one or several places say, all of them the same."""
    found = [(place, value) for place, value in places if value is not None]
    for place, value in found[1:]:
        if value != found[0][1]:
            raise config.clash(f"'{found[0][0]}': {found[0][1]!r}", f"'{place}': {value!r}")
    return found[0][1] if found else None


def _scaling(config: Config, name: str, kind: Any, rope: Config, known: tuple[str, ...]) -> Data | None:
    if kind == "default":
        return None
    if not isinstance(kind, str) or kind not in known:
        why = "; its angles depend on the length of each input" if kind in ("dynamic", "longrope", "su") else ""
        raise UnsupportedError(
            f"'{name}.rope_type' is {kind!r}, which cannot be represented{why}",
            where=config.where,
            hint=f"known: {', '.join(('default', *known))}",
        )

    def number(key: str, of: type = float, default: float | None = None) -> Any:
        value = rope.take(key)
        if value is None:
            if default is None:
                raise CheckpointError(f"'{name}.{key}' is missing", where=config.where)
            return default
        return config.number(f"{name}.{key}", value, of)

    length = config.number("max_position_embeddings", config.data.get("max_position_embeddings", 2048), int)
    data: Data = {"kind": kind}
    if kind == "linear":
        return data | {"factor": number("factor")}
    data["trained_length"] = number("original_max_position_embeddings", int, length)
    if kind == "llama3":
        return data | {
            "factor": number("factor"),
            "low": number("low_freq_factor"),
            "high": number("high_freq_factor"),
        }
    if data["trained_length"] <= 0:
        raise config.wrong(f"{name}.original_max_position_embeddings", data["trained_length"], "more than 0")
    data["factor"] = number("factor", default=length / data["trained_length"])
    data["beta_fast"] = number("beta_fast", default=32.0)
    data["beta_slow"] = number("beta_slow", default=1.0)
    if rope.take("truncate", True) is not True:
        raise UnsupportedError(f"'{name}.truncate' is not true", where=config.where)
    above, below = number("mscale", default=0.0), number("mscale_all_dim", default=0.0)
    usual = yarn_temperature(data["factor"])
    if above and below:
        usual = yarn_temperature(data["factor"], above) / yarn_temperature(data["factor"], below)
    data["temperature"] = number("attention_factor", default=usual)
    return data
