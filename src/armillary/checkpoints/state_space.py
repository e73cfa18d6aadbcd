"""Mamba and Mamba-2 in config.json and on disk, by themselves and as blocks of a hybrid."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from armillary.base.errors import UnsupportedError
from armillary.checkpoints.facts import Facts
from armillary.checkpoints.fields import Config, Data, Field, first, put
from armillary.checkpoints.table import Entry, Split, Squeeze

# How steps and weights start, how they are computed, and what is kept in float32 meanwhile.
_IGNORED = """
time_step_scale time_step_min time_step_max time_step_init_scheme time_step_floor rescale_prenorm_residual
residual_in_fp32 fused_add_norm pad_vocab_size_multiple use_mambapy use_associative_scan chunk_size
"""
IGNORED = frozenset(_IGNORED.split())


class Product(Field):
    """A key that only repeats `expand` times `hidden_size` and must not contradict it."""

    def __init__(self, key: str, expand: int = 2) -> None:
        self.keys, self.expand = (key,), expand

    def read(self, config: Config, data: Data) -> None:
        (key,) = self.keys
        value, width = config.take(key), data["width"]
        expand = config.data.get("expand", self.expand)
        if value is not None and value != expand * width:
            raise config.clash(f"'{key}': {value!r}", f"'expand': {expand!r} times 'hidden_size': {width!r}")


class StepRank(Field):
    """`time_step_rank`: a number, or auto."""

    keys = ("time_step_rank",)
    paths = ("block.mixer.rank",)

    def read(self, config: Config, data: Data) -> None:
        value = config.take("time_step_rank", "auto")
        if value != "auto":
            put(data, self.paths[0], config.number("time_step_rank", value, int))

    def write(self, facts: Facts, config: Data) -> None:
        config["time_step_rank"] = facts[first(self.paths[0])]


class StepLimits(Field):
    """`time_step_limit`: the smallest and largest step, infinity spelled in either of two ways."""

    keys = ("time_step_limit",)

    def __init__(self, path: str = "block.mixer.step_limits") -> None:
        self.paths = (path,)

    def read(self, config: Config, data: Data) -> None:
        given = config.take("time_step_limit", [0.0, math.inf])
        if not isinstance(given, (list, tuple)) or len(given) != 2:
            raise config.wrong("time_step_limit", given, "two numbers")
        low = config.number("time_step_limit", given[0], float)
        endless = given[1] in (math.inf, {"__float__": "Infinity"})
        high = None if endless else config.number("time_step_limit", given[1], float)
        put(data, self.paths[0], [low, high])

    def write(self, facts: Facts, config: Data) -> None:
        low, high = (facts[f"{first(self.paths[0])}.{end}"] for end in "01")
        if high is not None or low > 0:  # infinity is no number of JSON, and their default besides
            config["time_step_limit"] = [low, math.inf if high is None else high]


class Heads(Field):
    """The two keys of Mamba-2's heads: their width, and how many, which `expand` decides too.

    number, width: the keys; expand: that of the expansion; path: of the mixer.
    """

    def __init__(self, number: str, width: str, expand: str, path: str = "block.mixer", defaults: Any = None) -> None:
        self.keys = (number, width)
        self.expand, self.path = expand, path
        self.paths = (f"{path}.head_width",)
        self.defaults: tuple[int, int | None] = defaults

    def read(self, config: Config, data: Data) -> None:
        number, width = self.keys
        count = config.number(number, config.take(number, self.defaults[0]), int)
        value = config.take(width, self.defaults[1])
        expand = config.number(self.expand, config.data.get(self.expand, 2), int)
        whole = expand * config.number("hidden_size", config.data.get("hidden_size"), int)
        if count < 1 or whole % count:
            raise config.clash(f"'{number}': {count}", f"'{self.expand}' times 'hidden_size': {whole}")
        if value is None or value == "auto":
            value = whole // count
        if config.number(width, value, int) * count != whole:
            raise config.clash(f"'{number}': {count} times '{width}': {value}", f"'{self.expand}' times 'hidden_size'")
        put(data, self.paths[0], value)

    def write(self, facts: Facts, config: Data) -> None:
        number, width = self.keys
        config[width] = facts[first(self.paths[0])]
        config[number] = int(facts["width"] * facts[first(f"{self.path}.expand")]) // config[width]


class Empty(Field):
    """A key that published folders have with nothing in it."""

    def __init__(self, key: str) -> None:
        self.keys = (key,)

    def read(self, config: Config, data: Data) -> None:
        found = config.take(self.keys[0], {})
        if not isinstance(found, Mapping) or found:
            raise UnsupportedError(f"'{self.keys[0]}' is {found!r}", where=config.where, hint="only {} can be read")


def body_entries() -> list[Entry]:
    """All but the mixers of a stack of nothing else."""
    return [
        Entry("backbone.embeddings.weight", "embed.weight", sizes="vocab_size, hidden_size"),
        Entry("backbone.embedding.weight", "embed.weight", other=True),
        Entry("backbone.layers.{i}.norm.weight", "blocks.{i}.mixer.norm.weight", sizes="hidden_size"),
        Entry("backbone.norm_f.weight", "norm.weight", sizes="hidden_size"),
        Entry("lm_head.weight", "head.product.weight", sizes="vocab_size, hidden_size"),
    ]


def mamba_entries(theirs: str, ours: str) -> list[Entry]:
    """A mixer of every block: values and gate are one product, and the convolution has an axis of size 1."""
    wide = "expand × hidden_size"
    entries = [
        Entry(f"{theirs}.conv1d.weight", f"{ours}.conv", (Squeeze(1),), f"{wide}, 1, conv_kernel"),
        Entry(f"{theirs}.conv1d.bias", f"{ours}.conv_bias", sizes=wide),
        Entry(f"{theirs}.x_proj.weight", f"{ours}.choose.weight", sizes=f"time_step_rank + 2 × state_size, {wide}"),
        Entry(f"{theirs}.dt_proj.weight", f"{ours}.step.weight", sizes=f"{wide}, time_step_rank"),
        Entry(f"{theirs}.dt_proj.bias", f"{ours}.step_bias", sizes=wide),
        Entry(f"{theirs}.A_log", f"{ours}.log_decay", sizes=f"{wide}, state_size"),
        Entry(f"{theirs}.D", f"{ours}.skip", sizes=wide),
    ]
    for leaf in ("weight", "bias"):
        entries += [
            Entry(f"{theirs}.in_proj.{leaf}", (f"{ours}.v.{leaf}", f"{ours}.gate.{leaf}"), (Split(),), f"2 × {wide}"),
            Entry(f"{theirs}.out_proj.{leaf}", f"{ours}.o.{leaf}", sizes="hidden_size"),
        ]
    return entries


def mamba2_entries(
    theirs: str,
    ours: str,
    keys: tuple[str, str, str, str, str] = ("expand", "n_groups", "state_size", "num_heads", "conv_kernel"),
) -> list[Entry]:
    """A mixer: one product for gate, values, keys, queries and steps, one convolution for three. keys: that decide
    the shapes."""
    expand, groups, states, heads, taps = keys
    wide = f"{expand} × hidden_size"
    both = f"{wide} + 2 × {groups} × {states}"
    through = tuple(f"{ours}.conv_{name}" for name in "vkq")
    return [
        Entry(
            f"{theirs}.in_proj.weight",
            tuple(f"{ours}.{name}.weight" for name in ("gate", "v", "k", "q", "step")),
            (Split(),),
            f"2 × {wide} + 2 × {groups} × {states} + {heads}, hidden_size",
        ),
        Entry(
            f"{theirs}.conv1d.weight",
            tuple(f"{name}.weight" for name in through),
            (Squeeze(1), Split()),
            f"{both}, 1, {taps}",
        ),
        Entry(f"{theirs}.conv1d.bias", tuple(f"{name}.bias" for name in through), (Split(),), both),
        Entry(f"{theirs}.dt_bias", f"{ours}.decay.bias", sizes=heads),
        Entry(f"{theirs}.A_log", f"{ours}.decay.log_rate", sizes=heads),
        Entry(f"{theirs}.D", f"{ours}.skip", sizes=heads),
        Entry(f"{theirs}.norm.weight", f"{ours}.norm_weight", sizes=wide),
        Entry(f"{theirs}.out_proj.weight", f"{ours}.o.weight", sizes=f"hidden_size, {wide}"),
    ]
