"""Blocks of several kinds in config.json, above all how far they look: near and far ones that alternate."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from armillary.base.errors import CheckpointError, UnsupportedError
from armillary.checkpoints.facts import Facts
from armillary.checkpoints.fields import Config, Data, Field

NEAR, FAR = "sliding_attention", "full_attention"


class Window(Field):
    """`sliding_window`: every block looks so many tokens back, or all of them at everything.

    Reads last of a family's fields, since it moves the block. default: the window without the key;
    null is none.
    """

    keys: tuple[str, ...] = ("sliding_window",)
    paths: tuple[str, ...] = ("block.mixer.window",)

    def __init__(self, default: int | None = None) -> None:
        self.default = default

    def read(self, config: Config, data: Data) -> None:
        size = self.size(config)
        arrange(data, [size is not None] * data["depth"], size)

    def write(self, facts: Facts, config: Data) -> None:
        config["sliding_window"] = facts.get("blocks.0.mixer.window")

    def size(self, config: Config) -> int | None:
        value = config.take("sliding_window", None if "sliding_window" in config.nulls else self.default)
        return None if value is None else int(config.number("sliding_window", value, int))


class Layers(Window):
    """`layer_types`, or the family's rule where it is not given, says which blocks look at a window."""

    keys: tuple[str, ...] = ("sliding_window", "layer_types")

    def read(self, config: Config, data: Data) -> None:
        depth = data["depth"]
        rule = self.rule(config, depth)
        given = config.take("layer_types")
        near = rule if given is None else self.listed(config, given, depth)
        size = self.size(config)
        if any(near) and size is None:
            raise config.clash(f"'layer_types' with '{NEAR}'", "'sliding_window' that is not in use")
        arrange(data, near, size, self.nearby(config))

    def write(self, facts: Facts, config: Data) -> None:
        config["sliding_window"] = widest(facts)
        config["layer_types"] = [NEAR if near else FAR for near in windowed(facts)]

    def rule(self, config: Config, depth: int) -> list[bool]:
        """Whether each block looks at a window only, when `layer_types` does not say it."""
        raise NotImplementedError

    def nearby(self, config: Config) -> Data:
        """What else is different in blocks with a window: settings of the mixer by name."""
        return {}

    def listed(self, config: Config, given: Any, depth: int) -> list[bool]:
        if not isinstance(given, list) or any(one not in (NEAR, FAR) for one in given):
            raise UnsupportedError(
                f"'layer_types' is {given!r}", where=config.where, hint=f"a list of {FAR} and {NEAR} can be read"
            )
        if len(given) != depth:
            raise CheckpointError(
                f"'layer_types' lists {len(given)} blocks, but 'num_hidden_layers' is {depth}", where=config.where
            )
        return [one == NEAR for one in given]


class UseWindow(Layers):
    """As the Qwen families say it: from the block `max_window_layers` on, if `use_sliding_window` is true."""

    keys = ("sliding_window", "layer_types", "use_sliding_window", "max_window_layers")

    def __init__(self) -> None:
        super().__init__(default=4096)

    def size(self, config: Config) -> int | None:
        size = super().size(config)
        use = config.take("use_sliding_window", False)
        if type(use) is not bool:
            raise config.wrong("use_sliding_window", use, "true or false")
        return size if use else None

    def rule(self, config: Config, depth: int) -> list[bool]:
        start = config.number("max_window_layers", config.take("max_window_layers", 28), int)
        return [self.size(config) is not None and index >= start for index in range(depth)]

    def write(self, facts: Facts, config: Data) -> None:
        super().write(facts, config)
        near = windowed(facts)
        config["use_sliding_window"] = any(near)
        config["max_window_layers"] = near.index(True) if any(near) else len(near)


def arrange(data: Data, near: list[bool], size: int | None, nearby: Data | None = None) -> None:
    """Give the blocks that look at a window theirs; blocks of two kinds become a pattern."""
    close = {"mixer": {"kind": "window", "window": size, **(nearby or {})}}
    vary(data, ["near" if one else "far" for one in near], {"near": close, "far": {}})


def vary(data: Data, kinds: Sequence[str], besides: Mapping[str, Data]) -> None:
    """Make the block of every index one of the kind named for it, with these settings of its mixer and channel besides.

    It may be called again, for what differs in another way. Blocks that differ become a pattern.
    """
    if not kinds:
        return  # a depth of 0 or less, which is refused when all is read
    if "block" in data:
        before, held = [""] * len(kinds), {"": data.pop("block")}
    else:
        held, pattern = data.pop("blocks"), data.pop("pattern")
        before = [pattern[index % len(pattern)] for index in range(len(kinds))]
    one = len(set(kinds)) == 1
    names = [had if one and had else f"{had}_{kind}".strip("_") for had, kind in zip(before, kinds, strict=True)]
    blocks: Data = {}
    for name, had, kind in zip(names, before, kinds, strict=True):
        if name not in blocks:
            blocks[name] = copy.deepcopy(held[had])
            for part, settings in besides[kind].items():
                blocks[name].setdefault(part, {}).update(copy.deepcopy(settings))
    if len(blocks) == 1:
        (data["block"],) = blocks.values()
        return
    period = next(n for n in range(1, len(names) + 1) if all(a == b for a, b in zip(names, names[n:], strict=False)))
    data["blocks"], data["pattern"] = blocks, names[:period]


def windowed(facts: Facts) -> list[bool]:
    """Whether each block looks at a window only."""
    return [facts.get(f"blocks.{index}.mixer.window") is not None for index in range(facts["depth"])]


def widest(facts: Facts) -> int | None:
    """The window of the blocks that have one."""
    sizes = (facts.get(f"blocks.{index}.mixer.window") for index in range(facts["depth"]))
    return max((size for size in sizes if size is not None), default=None)
