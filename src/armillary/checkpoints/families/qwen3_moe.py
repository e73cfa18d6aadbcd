"""Qwen3-MoE-shaped checkpoints (Yang et al. 2025, Qwen3 Technical Report): Qwen3's arrangement with experts in all
blocks or some, and a window in every block or in none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from armillary.base.errors import UnsupportedError
from armillary.checkpoints.decoder import BIASES, RMSNORM, TIED, Decoder, arrangement, epsilon, sizes
from armillary.checkpoints.experts import DENSE, IGNORED, KINDS, Sparse, expert_entries
from armillary.checkpoints.facts import Facts, facts
from armillary.checkpoints.fields import ACTIVATIONS, Config, Data, Field, Fixed, Same, Word
from armillary.checkpoints.layers import Window
from armillary.checkpoints.rope import Rope
from armillary.checkpoints.table import Entry, families
from armillary.nn.network import ModelSettings


class OneWindow(Window):
    """In every block, if `use_sliding_window` is true."""

    keys = ("sliding_window", "use_sliding_window", "max_window_layers")

    def size(self, config: Config) -> int | None:
        size = super().size(config)
        use, start = config.take("use_sliding_window", False), config.take("max_window_layers", 0)
        if type(use) is not bool:
            raise config.wrong("use_sliding_window", use, "true or false")
        if use and size is not None and start != 0:
            raise UnsupportedError(
                f"'max_window_layers' is {start!r} beside a window in use",
                where=config.where,
                hint="newer readers leave it out of account and older ones do not: only 0 can be read",
            )
        return size if use else None

    def write(self, facts: Facts, config: Data) -> None:
        super().write(facts, config)
        config["use_sliding_window"] = config["sliding_window"] is not None


@families.register
class Qwen3MoE(Decoder):
    """Qwen3 with experts."""

    kind: ClassVar[str] = "qwen3_moe"
    source: ClassVar[str] = "Yang et al. 2025, Qwen3 Technical Report"
    architectures: ClassVar[tuple[str, ...]] = ("Qwen3MoeForCausalLM", "Qwen3MoeModel")
    template: ClassVar[Mapping[str, Any]] = {
        **arrangement({"norm": RMSNORM, "norm_over": "head"}, channel=None),
        "sparse": {"channel": {"kind": "moe"}},
        "dense": {"channel": {"kind": "gated"}},
    }
    kinds: ClassVar[Mapping[str, tuple[str, Any]]] = KINDS
    optional: ClassVar[frozenset[str]] = frozenset({DENSE})
    fields: ClassVar[tuple[Field, ...]] = (
        *sizes(32768, kv_heads=4)[:-1],
        Same("intermediate_size", "dense.channel.hidden", default=6144),
        Same("moe_intermediate_size", "sparse.channel.hidden", default=768),
        Same("num_experts", "sparse.channel.experts", default=128, older=("num_local_experts",)),
        Same("num_experts_per_tok", "sparse.channel.top", default=8),
        Same("norm_topk_prob", "sparse.channel.normalise", kind=bool, default=False),
        BIASES,
        Rope(),
        Word("hidden_act", ("sparse.channel.activation", "dense.channel.activation"), ACTIVATIONS, default="silu"),
        epsilon(1e-6, "block.mixer.norm.epsilon"),
        TIED,
        Fixed("qkv_bias", False),
        Fixed("use_qk_norm", True),
        Fixed("shared_expert_intermediate_size", 0),
        OneWindow(default=4096),
        Sparse(),
    )
    ignored: ClassVar[frozenset[str]] = Decoder.ignored | IGNORED

    def table(self, settings: ModelSettings) -> Sequence[Entry]:
        known = self.equivalent(facts(settings))
        return [
            *super().table(settings),
            *expert_entries("model.layers.{i}.mlp", "blocks.{i}.channel.inner", known["sparse.channel.experts"]),
        ]
