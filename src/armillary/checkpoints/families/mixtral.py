"""Mixtral-shaped checkpoints (Jiang et al. 2024, Mixtral of Experts): Mistral's arrangement with a mixture of experts
in place of the feed-forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from armillary.checkpoints.decoder import ACTIVATION, TIED, Decoder, arrangement, epsilon, sizes
from armillary.checkpoints.experts import IGNORED, expert_entries
from armillary.checkpoints.facts import facts
from armillary.checkpoints.fields import Field, Fixed, Same
from armillary.checkpoints.layers import Window
from armillary.checkpoints.rope import Rope
from armillary.checkpoints.table import Entry, families
from armillary.nn.network import ModelSettings


@families.register
class Mixtral(Decoder):
    """Mixtral 8×7B and 8×22B."""

    kind: ClassVar[str] = "mixtral"
    source: ClassVar[str] = "Jiang et al. 2024, Mixtral of Experts"
    architectures: ClassVar[tuple[str, ...]] = ("MixtralForCausalLM", "MixtralModel")
    template: ClassVar[Mapping[str, Any]] = arrangement(channel="moe")
    fields: ClassVar[tuple[Field, ...]] = (
        *sizes(131072, kv_heads=8),
        Same("num_local_experts", "block.channel.experts", default=8, older=("num_experts",)),
        Same("num_experts_per_tok", "block.channel.top", default=2),
        Fixed("attention_bias", False),
        Rope(base=1e6),
        ACTIVATION,
        epsilon(1e-5),
        TIED,
        Window(),
    )
    ignored: ClassVar[frozenset[str]] = Decoder.ignored | IGNORED

    def table(self, settings: ModelSettings) -> Sequence[Entry]:
        count = facts(settings)["blocks.0.channel.experts"]
        layer = "model.layers.{i}"
        return [
            *super().table(settings),
            *expert_entries(
                f"{layer}.block_sparse_moe",
                "blocks.{i}.channel.inner",
                count,
                names=("w1", "w3", "w2"),
                fused=f"{layer}.mlp",
                keys=("num_local_experts", "intermediate_size"),
            ),
        ]
