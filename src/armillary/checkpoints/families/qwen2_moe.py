"""Qwen2-MoE-shaped checkpoints (Yang et al. 2024, Qwen2 Technical Report; Qwen1.5-MoE): Qwen2's arrangement with
experts, and one besides that every token goes through, in all blocks or some."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from armillary.base.errors import UnsupportedError
from armillary.checkpoints.decoder import TIED, Decoder, arrangement, epsilon, sizes
from armillary.checkpoints.experts import DENSE, IGNORED, KINDS, Sparse, expert_entries
from armillary.checkpoints.facts import Facts, facts
from armillary.checkpoints.fields import ACTIVATIONS, Config, Data, Field, Fixed, Same, Word
from armillary.checkpoints.layers import UseWindow
from armillary.checkpoints.rope import Rope
from armillary.checkpoints.table import Entry, families
from armillary.nn.network import ModelSettings


class ListedWindow(UseWindow):
    """Windows only where `layer_types` lists them: by what rule blocks have one without, readers disagree."""

    def rule(self, config: Config, depth: int) -> list[bool]:
        config.take("max_window_layers")
        if self.size(config) is not None and config.data.get("layer_types") is None:
            raise UnsupportedError(
                "'use_sliding_window' is true, but no 'layer_types' says in which blocks",
                where=config.where,
                hint="list them: readers of these folders have had several rules",
            )
        return [False] * depth

    def write(self, facts: Facts, config: Data) -> None:
        super().write(facts, config)
        del config["max_window_layers"]


@families.register
class Qwen2MoE(Decoder):
    """Qwen2 and Qwen1.5 with experts."""

    kind: ClassVar[str] = "qwen2_moe"
    source: ClassVar[str] = "Yang et al. 2024, Qwen2 Technical Report"
    architectures: ClassVar[tuple[str, ...]] = ("Qwen2MoeForCausalLM", "Qwen2MoeModel")
    template: ClassVar[Mapping[str, Any]] = {
        **arrangement({"out_bias": False}, channel=None),
        "sparse": {"channel": {"kind": "moe", "shared_gate": True}},
        "dense": {"channel": {"kind": "gated"}},
    }
    kinds: ClassVar[Mapping[str, tuple[str, Any]]] = KINDS
    optional: ClassVar[frozenset[str]] = frozenset({DENSE})
    fields: ClassVar[tuple[Field, ...]] = (
        *sizes(32768, kv_heads=16)[:-1],
        Same("intermediate_size", "dense.channel.hidden", default=5632),
        Same("moe_intermediate_size", "sparse.channel.hidden", default=1408),
        Same("shared_expert_intermediate_size", "sparse.channel.shared", default=5632),
        Same("num_experts", "sparse.channel.experts", default=60),
        Same("num_experts_per_tok", "sparse.channel.top", default=4),
        Same("norm_topk_prob", "sparse.channel.normalise", kind=bool, default=False),
        Same("qkv_bias", "block.mixer.bias", kind=bool, default=True),
        Rope(),
        Word("hidden_act", ("sparse.channel.activation", "dense.channel.activation"), ACTIVATIONS, default="silu"),
        epsilon(1e-6),
        TIED,
        Fixed("use_mrope", False),
        ListedWindow(),
        Sparse(),
    )
    ignored: ClassVar[frozenset[str]] = Decoder.ignored | IGNORED

    def table(self, settings: ModelSettings) -> Sequence[Entry]:
        known = self.equivalent(facts(settings))
        theirs, ours = "model.layers.{i}.mlp", "blocks.{i}.channel.inner"
        of_shared = "shared_expert_intermediate_size, hidden_size"
        return [
            *super().table(settings),
            *expert_entries(theirs, ours, known["sparse.channel.experts"]),
            *(
                Entry(f"{theirs}.shared_expert.{name}_proj.weight", f"{ours}.shared.{name}.weight", sizes=of_shared)
                for name in ("gate", "up", "down")
            ),
            Entry(f"{theirs}.shared_expert_gate.weight", f"{ours}.shared_gate.weight", sizes="hidden_size"),
        ]
