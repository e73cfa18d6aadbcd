"""The settings half of a family's table: keys of config.json beside the settings that they stand for.

Each field reads its keys into the plain data of a model and writes them back from facts, so both
directions come from one line. A key that no field reads, and that the family does not know to leave
the computation alone, is an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from armillary.base.errors import CheckpointError, UnsupportedError
from armillary.checkpoints.facts import Facts

Data = dict[str, Any]

# More than any model has; beyond, a wrong number would fill the memory before it is noticed.
LARGEST = 2**31 - 1
# By the end of a setting's path: the largest that is read, and what must be at least 1 for others to be read by it.
MOST = {"depth": 10_000, "width": 2**20, "mixer.heads": 2**16, "mixer.head_width": 2**16, "channel.experts": 2**12}
COUNTED = {"depth", "width", "mixer.heads"}

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}


class Config:
    """The keys of a config.json and which of them have been read.

    null is the same as not there, but for the few keys whose absence means something else: `nulls`
    has those that were given as null.
    """

    def __init__(self, data: Mapping[str, Any], where: str) -> None:
        self.data = {key: value for key, value in data.items() if value is not None}
        self.nulls = frozenset(data) - frozenset(self.data)
        self.where = where
        self.unread = set(self.data)

    def take(self, key: str, default: Any = None) -> Any:
        self.unread.discard(key)
        return self.data.get(key, default)

    def number(self, key: str, value: Any, kind: type) -> Any:
        """`value` as a whole number (kind int) or any number (float)."""
        if type(value) is int and abs(value) <= LARGEST:
            return kind(value)
        if kind is float and type(value) is float and math.isfinite(value):
            return value
        raise self.wrong(key, value, "a whole number" if kind is int else "a number")

    def wrong(self, key: str, value: Any, expected: str) -> CheckpointError:
        return CheckpointError(f"'{key}' is {value!r}, expected {expected}", where=self.where)

    def clash(self, first: str, second: str) -> CheckpointError:
        return CheckpointError(f"{first} and {second} contradict each other", where=self.where)


class Field:
    """One or more keys of config.json, and the settings (dotted; `block` is every block) they stand for."""

    keys: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()

    def read(self, config: Config, data: Data) -> None:
        raise NotImplementedError

    def write(self, facts: Facts, config: Data) -> None:
        """By default nothing: what the readers take for granted, or what other keys say."""


class Same(Field):
    """A number or flag with the same meaning on both sides.

    kind: int, float or bool; default: what a missing key means, None for our own default; null: what
    one that is null means, by default the same; needed: whether the key must be there; older: other
    names that the key has had.
    """

    def __init__(
        self,
        key: str,
        *paths: str,
        kind: type = int,
        default: Any = None,
        null: Any = ...,
        needed: bool = False,
        older: tuple[str, ...] = (),
    ) -> None:
        self.keys, self.paths = (key, *older), paths
        self.kind, self.default, self.needed = kind, default, needed
        self.null = default if null is ... else null

    def read(self, config: Config, data: Data) -> None:
        given = [(name, value) for name in self.keys if (value := config.take(name)) is not None]
        key, value = given[0] if given else (self.keys[0], None)
        for name, other in given[1:]:
            if other != value:
                raise config.clash(f"'{key}': {value!r}", f"'{name}': {other!r}")
        if value is None:
            if self.needed:
                raise CheckpointError(f"'{key}' is missing", where=config.where)
            value = self.null if key in config.nulls else self.default
        elif self.kind is bool:
            if type(value) is not bool:
                raise config.wrong(key, value, "true or false")
        else:
            value = config.number(key, value, self.kind)
            ends = {path.partition(".")[2] or path for path in self.paths}
            most = min((MOST.get(end, LARGEST) for end in ends), default=LARGEST)
            if value > most:
                raise config.wrong(key, value, f"at most {most}")
            if value < 1 and ends & COUNTED:
                raise config.wrong(key, value, "at least 1")
        if value is not None:
            for path in self.paths:
                put(data, path, value)

    def write(self, facts: Facts, config: Data) -> None:
        path = held(self.paths, facts)
        if path is None:
            return  # no block is of the kind that it is about
        value = facts[path]
        if self.kind is int and isinstance(value, float):
            if not value.is_integer():
                raise UnsupportedError(f"model.{path}: {value:g} is no whole number, as '{self.keys[0]}' has to be")
            value = int(value)
        config[self.keys[0]] = value


class Word(Field):
    """A name that is another name on our side; the first of several that mean the same is written."""

    def __init__(self, key: str, path: str | tuple[str, ...], names: Mapping[str, str], default: str) -> None:
        self.paths = (path,) if isinstance(path, str) else path
        self.keys, self.names, self.default = (key,), names, default

    def read(self, config: Config, data: Data) -> None:
        value = config.take(self.keys[0], self.default)
        if not isinstance(value, str) or value not in self.names:
            raise UnsupportedError(
                f"'{self.keys[0]}' is {value!r}, which is not known here",
                where=config.where,
                hint=f"known: {', '.join(self.names)}",
            )
        for path in self.paths:
            put(data, path, self.names[value])

    def write(self, facts: Facts, config: Data) -> None:
        path = held(self.paths, facts)
        if path is None:
            return
        name = next((name for name, meaning in self.names.items() if meaning == facts[path]), None)
        if name is None:
            raise UnsupportedError(f"model.{path}: {facts[path]!r} has no name for '{self.keys[0]}'")
        config[self.keys[0]] = name


class Fixed(Field):
    """A key that changes the computation and is understood at one value only."""

    def __init__(self, key: str, value: Any, why: str | None = None) -> None:
        self.keys, self.value, self.why = (key,), value, why

    def read(self, config: Config, data: Data) -> None:
        found = config.take(self.keys[0], self.value)
        if found != self.value or type(found) is not type(self.value):
            hint = self.why or f"only {self.value!r} can be represented"
            raise UnsupportedError(f"'{self.keys[0]}' is {found!r}", where=config.where, hint=hint)


class Equal(Field):
    """A key that only repeats another one and must not contradict it."""

    def __init__(self, key: str, other: str) -> None:
        self.keys, self.other = (key,), other

    def read(self, config: Config, data: Data) -> None:
        (key,) = self.keys
        value = config.take(key)
        if value is not None and value != config.data.get(self.other):
            raise config.clash(f"'{key}': {value!r}", f"'{self.other}': {config.data.get(self.other)!r}")


# Keys that change the computation wherever they stand.
COMMON: tuple[Field, ...] = (
    Fixed("is_encoder_decoder", False),
    Fixed("add_cross_attention", False),
    Fixed("pruned_heads", {}),
    Fixed("quantization_config", None, "quantised weights cannot be read; get the unquantised ones"),
    Fixed("auto_map", None, "the model is computed by code in its folder, and no code from a folder is ever run"),
)

# Keys that any model's config.json may have and that leave the computation alone: bookkeeping, token
# ids (the tokenizer's own count), training, and defaults of generation.
_IGNORED = """
architectures model_type _name_or_path transformers_version torch_dtype dtype use_cache initializer_range
bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id tokenizer_class prefix
is_decoder tie_encoder_decoder task_specific_params problem_type finetuning_task id2label label2id num_labels
return_dict output_attentions output_hidden_states torchscript use_bfloat16 gradient_checkpointing
chunk_size_feed_forward attn_implementation _attn_implementation _attn_implementation_autoset
max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k
top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
bad_words_ids num_return_sequences output_scores return_dict_in_generate forced_bos_token_id
forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
begin_suppress_tokens tf_legacy_loss unsloth_fixed unsloth_version
"""
IGNORED = frozenset(_IGNORED.split())


def put(data: Data, path: str, value: Any) -> None:
    *above, last = path.split(".")
    for key in above:
        data = data.setdefault(key, {})
    data[last] = value


def first(path: str) -> str:
    """The fact that a setting of every block is read from."""
    return re.sub(r"^(encoder\.)?block\.", r"\1blocks.0.", path)


def held(paths: tuple[str, ...], facts: Facts) -> str | None:
    """The first fact that there is of those that these settings are read from."""
    return next((name for name in map(first, paths) if name in facts), None)
