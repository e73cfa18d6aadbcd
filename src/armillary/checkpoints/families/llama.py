"""LLaMA-shaped checkpoints (Touvron et al. 2023, LLaMA; Dubey et al. 2024, The Llama 3 Herd of Models).

RMSNorm before gated feed-forward and grouped-query attention with rotary positions in half pairing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from armillary.base.errors import CheckpointError, UnsupportedError
from armillary.checkpoints.facts import Facts, facts, yarn_temperature
from armillary.checkpoints.fields import ACTIVATIONS, Config, Data, Field, Fixed, Same, Word, first, put
from armillary.checkpoints.table import Entry, Family, PermuteHalfInterleaved, families
from armillary.nn.network import ModelSettings

_ROPE = "block.mixer.position"


class Rope(Field):
    """Rotary positions: `rope_theta` beside `rope_scaling`, or both in the newer `rope_parameters`."""

    keys = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")
    paths = (_ROPE,)

    def read(self, config: Config, data: Data) -> None:
        newer, older = config.take("rope_parameters"), config.take("rope_scaling")
        if newer and older and newer != older:
            raise config.clash("'rope_parameters'", "'rope_scaling'")
        name = "rope_parameters" if newer else "rope_scaling"
        given = newer or older or {}
        if not isinstance(given, Mapping):
            raise config.wrong(name, given, "a mapping")
        rope = Config(given, config.where)

        def single(key: str, *places: tuple[str, Any]) -> Any:
            found = [(place, value) for place, value in places if value is not None]
            for place, value in found[1:]:
                if value != found[0][1]:
                    raise config.clash(f"'{found[0][0]}': {found[0][1]!r}", f"'{place}': {value!r}")
            return found[0][1] if found else None

        base = single(
            "rope_theta",
            ("rope_theta", config.take("rope_theta")),
            (f"{name}.rope_theta", rope.take("rope_theta")),
        )
        put(data, f"{_ROPE}.base", config.number("rope_theta", 10000.0 if base is None else base, float))
        part = single(
            "partial_rotary_factor",
            ("partial_rotary_factor", config.take("partial_rotary_factor")),
            (f"{name}.partial_rotary_factor", rope.take("partial_rotary_factor")),
        )
        if part not in (None, 1):
            raise UnsupportedError(
                f"'partial_rotary_factor' is {part!r}", where=config.where, hint="only 1 can be read"
            )
        kind = single("type", (f"{name}.rope_type", rope.take("rope_type")), (f"{name}.type", rope.take("type")))
        scaling = self._scaling(name, kind or "default", rope, config)
        if scaling is not None:
            put(data, f"{_ROPE}.scaling", scaling)
        if rope.unread:
            keys = ", ".join(f"'{name}.{key}'" for key in sorted(rope.unread))
            raise UnsupportedError(f"not understood: {keys}", where=config.where)

    def _scaling(self, name: str, kind: Any, rope: Config, config: Config) -> Data | None:
        if kind == "default":
            return None
        if kind not in ("linear", "llama3", "yarn"):
            why = "; its angles depend on the length of each input" if kind in ("dynamic", "longrope") else ""
            raise UnsupportedError(
                f"'{name}.rope_type' is {kind!r}, which cannot be represented{why}",
                where=config.where,
                hint="known: default, linear, llama3, yarn",
            )

        def number(key: str, of: type = float, default: float | None = None) -> Any:
            value = rope.take(key)
            if value is None:
                if default is None:
                    raise CheckpointError(f"'{name}.{key}' is missing", where=config.where)
                return default
            return config.number(f"{name}.{key}", value, of)

        length = config.data.get("max_position_embeddings", 2048)
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

    def write(self, facts: Facts, config: Data) -> None:
        # The older keys: old and new readers know them.
        rope = {
            name.removeprefix(f"{first(_ROPE)}."): value
            for name, value in facts.items()
            if name.startswith(first(_ROPE))
        }
        config["rope_theta"] = rope["base"]
        kind = rope.get("scaling.kind")
        config["rope_scaling"] = None
        if kind not in ("linear", "llama3", "yarn"):
            return
        names = {
            "factor": "factor",
            "trained_length": "original_max_position_embeddings",
            "low": "low_freq_factor",
            "high": "high_freq_factor",
            "beta_fast": "beta_fast",
            "beta_slow": "beta_slow",
            "temperature": "attention_factor",
        }
        given = {theirs: rope[f"scaling.{ours}"] for ours, theirs in names.items() if f"scaling.{ours}" in rope}
        config["rope_scaling"] = {"rope_type": kind, **given}


@families.register
class Llama(Family):
    """LLaMA 1 to 3 and everything that is stored as they are."""

    kind: ClassVar[str] = "llama"
    architectures: ClassVar[tuple[str, ...]] = ("LlamaForCausalLM", "LLaMAForCausalLM", "LlamaModel")
    prefix: ClassVar[str] = "model."
    template: ClassVar[Mapping[str, Any]] = {
        "form": "decoder",
        "norm": {"kind": "rmsnorm"},
        "head": {"kind": "language_model"},
        "block": {
            "mixer": {"kind": "attention", "position": {"kind": "rope"}},
            "channel": {"kind": "gated"},
            "norm": {"kind": "rmsnorm"},
        },
    }
    fields: ClassVar[tuple[Field, ...]] = (
        Same("vocab_size", "vocabulary", needed=True),
        Same("hidden_size", "width", needed=True),
        Same("num_hidden_layers", "depth", needed=True),
        Same("max_position_embeddings", "context", default=2048),
        Same("num_attention_heads", "block.mixer.heads", needed=True),
        Same("num_key_value_heads", "block.mixer.kv_heads"),
        Same("head_dim", "block.mixer.head_width"),
        Same("attention_bias", "block.mixer.bias", "block.mixer.out_bias", kind=bool, default=False),
        Rope(),
        Same("intermediate_size", "block.channel.hidden", needed=True),
        Word("hidden_act", "block.channel.activation", ACTIVATIONS, default="silu"),
        Same("mlp_bias", "block.channel.bias", kind=bool, default=False),
        Same("rms_norm_eps", "norm.epsilon", "block.norm.epsilon", kind=float, default=1e-6),
        Same("tie_word_embeddings", "head.tied", kind=bool, default=False),
        Fixed("sliding_window", None),
    )
    ignored: ClassVar[frozenset[str]] = frozenset({"pretraining_tp", "attention_dropout", "max_sequence_length"})
    constants: ClassVar[Mapping[str, Any]] = {"attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True}
    leftovers: ClassVar[re.Pattern[str] | None] = re.compile(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq")

    def equivalent(self, wanted: Facts) -> Facts:
        """Interleaved pairs become half ones (the rows of q and k are permuted), and a larger base stands for ntk."""
        wanted = dict(wanted)
        for name in [name for name in wanted if name.endswith(".position.pairing")]:
            rope = name.removesuffix(".pairing")
            width = wanted.get(f"{rope.removesuffix('.position')}.head_width", 0)
            if wanted.get(f"{rope}.fraction") != 1 or width < 4:
                continue
            wanted[name] = "half"
            if wanted.get(f"{rope}.scaling.kind") == "ntk":
                factor = wanted.pop(f"{rope}.scaling.factor")
                del wanted[f"{rope}.scaling.kind"]
                wanted[f"{rope}.scaling"] = None
                wanted[f"{rope}.base"] *= factor ** (width / (width - 2))
        return wanted

    def check(self, wanted: Facts) -> None:
        width, heads = wanted["width"], wanted["blocks.0.mixer.heads"]
        if width % heads:
            raise UnsupportedError(
                f"model.width: {width} is not a multiple of {heads} heads, which readers of the 'llama' layout refuse"
            )

    def table(self, settings: ModelSettings) -> Sequence[Entry]:
        known = facts(settings)
        heads, groups = known["blocks.0.mixer.heads"], known["blocks.0.mixer.kv_heads"]
        interleaved = known["blocks.0.mixer.position.pairing"] == "interleaved"
        q = (PermuteHalfInterleaved(heads),) if interleaved else ()
        k = (PermuteHalfInterleaved(groups),) if interleaved else ()
        theirs, ours = "model.layers.{i}", "blocks.{i}"
        of_q = "num_attention_heads × head_dim, hidden_size"
        of_k = "num_key_value_heads × head_dim, hidden_size"
        q_rows, k_rows = of_q.split(", ")[0], of_k.split(", ")[0]
        of_up = "intermediate_size, hidden_size"
        return (
            Entry("model.embed_tokens.weight", "embed.weight", sizes="vocab_size, hidden_size"),
            Entry(f"{theirs}.input_layernorm.weight", f"{ours}.mixer.norm.weight", sizes="hidden_size"),
            Entry(f"{theirs}.self_attn.q_proj.weight", f"{ours}.mixer.inner.q.weight", q, of_q),
            Entry(f"{theirs}.self_attn.q_proj.bias", f"{ours}.mixer.inner.q.bias", q, q_rows),
            Entry(f"{theirs}.self_attn.k_proj.weight", f"{ours}.mixer.inner.k.weight", k, of_k),
            Entry(f"{theirs}.self_attn.k_proj.bias", f"{ours}.mixer.inner.k.bias", k, k_rows),
            Entry(f"{theirs}.self_attn.v_proj.weight", f"{ours}.mixer.inner.v.weight", sizes=of_k),
            Entry(f"{theirs}.self_attn.v_proj.bias", f"{ours}.mixer.inner.v.bias", sizes=k_rows),
            Entry(f"{theirs}.self_attn.o_proj.weight", f"{ours}.mixer.inner.o.weight", sizes=of_q),
            Entry(f"{theirs}.self_attn.o_proj.bias", f"{ours}.mixer.inner.o.bias", sizes="hidden_size"),
            Entry(f"{theirs}.post_attention_layernorm.weight", f"{ours}.channel.norm.weight", sizes="hidden_size"),
            Entry(f"{theirs}.mlp.gate_proj.weight", f"{ours}.channel.inner.gate.weight", sizes=of_up),
            Entry(f"{theirs}.mlp.gate_proj.bias", f"{ours}.channel.inner.gate.bias", sizes="intermediate_size"),
            Entry(f"{theirs}.mlp.up_proj.weight", f"{ours}.channel.inner.up.weight", sizes=of_up),
            Entry(f"{theirs}.mlp.up_proj.bias", f"{ours}.channel.inner.up.bias", sizes="intermediate_size"),
            Entry(f"{theirs}.mlp.down_proj.weight", f"{ours}.channel.inner.down.weight", sizes=of_up),
            Entry(f"{theirs}.mlp.down_proj.bias", f"{ours}.channel.inner.down.bias", sizes="hidden_size"),
            Entry("model.norm.weight", "norm.weight", sizes="hidden_size"),
            Entry("lm_head.weight", "head.product.weight", sizes="vocab_size, hidden_size"),
        )
