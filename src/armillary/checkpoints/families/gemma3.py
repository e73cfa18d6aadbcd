"""Gemma 3-shaped checkpoints of text (Gemma Team 2025, Gemma 3): Gemma 2's arrangement with norms of queries and
keys instead of soft caps, and five blocks with a window, whose rotary base is smaller, to one without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from armillary.checkpoints.decoder import BIASES, SIZES, Decoder, arrangement, epsilon
from armillary.checkpoints.facts import Facts
from armillary.checkpoints.families.gemma2 import NORM, NORMS, EmbedScale, Scalar
from armillary.checkpoints.fields import ACTIVATIONS, Config, Data, Field, Fixed, Same, Word, put
from armillary.checkpoints.layers import FAR, NEAR, Layers, windowed
from armillary.checkpoints.rope import POSITION, scaled, turned
from armillary.checkpoints.table import families

_BASES = {FAR: 1e6, NEAR: 1e4}


class NearAndFar(Layers):
    """Windows and rotary positions: five blocks of six have a window, and a rotary base of their own."""

    keys = (
        "sliding_window",
        "layer_types",
        "sliding_window_pattern",
        "_sliding_window_pattern",
        "rope_theta",
        "rope_local_base_freq",
        "rope_scaling",
        "rope_parameters",
    )
    paths = ("block.mixer.window", POSITION)

    def read(self, config: Config, data: Data) -> None:
        for key, value in self._position(config, FAR, "rope_theta", config.take("rope_scaling")).items():
            put(data, f"{POSITION}.{key}", value)
        newer = config.data.get("rope_parameters") or {}
        strange = sorted(str(key) for key in newer if key not in _BASES)
        if strange:
            raise config.wrong(f"rope_parameters.{strange[0]}", newer[strange[0]], f"only {FAR} and {NEAR}")
        super().read(config, data)

    def _position(self, config: Config, kind: str, theta: str, older: Any) -> Data:
        newer = config.take("rope_parameters") or {}
        if not isinstance(newer, Mapping):
            raise config.wrong("rope_parameters", newer, "a mapping")
        if older and newer:
            raise config.clash("'rope_parameters'", "'rope_scaling'")
        name = "rope_scaling" if older else f"rope_parameters.{kind}"
        return turned(config, name, older or newer.get(kind), theta=(theta, config.take(theta)), base=_BASES[kind])

    def nearby(self, config: Config) -> Data:
        return {"position": {"kind": "rope", **self._position(config, NEAR, "rope_local_base_freq", None)}}

    def rule(self, config: Config, depth: int) -> list[bool]:
        older, newer = (config.take(key) for key in ("sliding_window_pattern", "_sliding_window_pattern"))
        if older is not None and newer is not None and older != newer:
            raise config.clash(f"'sliding_window_pattern': {older!r}", f"'_sliding_window_pattern': {newer!r}")
        period = config.number("sliding_window_pattern", older or newer or 6, int)
        if period < 1:
            raise config.wrong("sliding_window_pattern", period, "at least 1")
        return [(index + 1) % period > 0 for index in range(depth)]

    def write(self, facts: Facts, config: Data) -> None:
        super().write(facts, config)
        config["sliding_window"] = config["sliding_window"] or facts["context"]  # their readers need a number
        config["rope_scaling"] = None
        for near, kind, theta in ((False, FAR, "rope_theta"), (True, NEAR, "rope_local_base_freq")):
            if near not in windowed(facts):
                config[theta] = _BASES[kind]
                continue
            position = f"blocks.{windowed(facts).index(near)}.mixer.position"
            config[theta] = facts[f"{position}.base"]
            if not near:
                config["rope_scaling"] = scaled(facts, position)


@families.register
class Gemma3(Decoder):
    """Gemma 3, the models that read text only."""

    kind: ClassVar[str] = "gemma3_text"
    source: ClassVar[str] = "Gemma Team 2025, Gemma 3 Technical Report"
    architectures: ClassVar[tuple[str, ...]] = ("Gemma3ForCausalLM", "Gemma3TextModel")
    whole: ClassVar[bool] = True
    norms: ClassVar[tuple[tuple[str, str], ...]] = NORMS
    template: ClassVar[Mapping[str, Any]] = arrangement(
        {"norm": NORM, "norm_over": "head"}, norm=NORM, norm_at="sandwich"
    )
    fields: ClassVar[tuple[Field, ...]] = (
        *SIZES,
        Same("max_position_embeddings", "context", default=131072),
        Same("num_key_value_heads", "block.mixer.kv_heads", default=4),
        Same("head_dim", "block.mixer.head_width", default=256),
        BIASES,
        Scalar(),
        Fixed("attn_logit_softcapping", None),  # their own readers leave it out
        Same("final_logit_softcapping", "head.softcap", kind=float),
        Word("hidden_activation", "block.channel.activation", ACTIVATIONS, default="gelu_pytorch_tanh"),
        epsilon(1e-6, "block.mixer.norm.epsilon"),
        Same("tie_word_embeddings", "head.tied", kind=bool, default=True),
        Fixed("use_bidirectional_attention", False),
        EmbedScale(),
        NearAndFar(default=4096),
    )
    ignored: ClassVar[frozenset[str]] = Decoder.ignored | {"cache_implementation"}
