"""OLMo 2-shaped checkpoints (OLMo Team 2025, 2 OLMo 2 Furious): RMSNorm after attention and feed-forward, before
the sum, and over the queries and keys of all heads together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from armillary.checkpoints.decoder import ACTIVATION, BIASES, RMSNORM, TIED, Decoder, arrangement, epsilon, sizes
from armillary.checkpoints.fields import Field
from armillary.checkpoints.rope import Rope
from armillary.checkpoints.table import families


@families.register
class Olmo2(Decoder):
    """OLMo 2 in all sizes."""

    kind: ClassVar[str] = "olmo2"
    source: ClassVar[str] = "OLMo Team 2025, 2 OLMo 2 Furious"
    architectures: ClassVar[tuple[str, ...]] = ("Olmo2ForCausalLM", "Olmo2Model")
    norms: ClassVar[tuple[tuple[str, str], ...]] = (
        ("post_attention_layernorm", "mixer.norm"),
        ("post_feedforward_layernorm", "channel.norm"),
    )
    template: ClassVar[Mapping[str, Any]] = arrangement({"norm": RMSNORM, "norm_over": "all"}, norm_at="after")
    fields: ClassVar[tuple[Field, ...]] = (
        *sizes(2048),
        BIASES,
        Rope(),
        ACTIVATION,
        epsilon(1e-5, "block.mixer.norm.epsilon"),
        TIED,
    )
