"""LLaMA-shaped checkpoints (Touvron et al. 2023, LLaMA; Dubey et al. 2024, The Llama 3 Herd of Models).

RMSNorm before gated feed-forward and grouped-query attention with rotary positions in half pairing.
"""

from __future__ import annotations

from typing import ClassVar

from armillary.checkpoints.decoder import ACTIVATION, BIASES, TIED, Decoder, epsilon, sizes
from armillary.checkpoints.fields import Field, Fixed, Same
from armillary.checkpoints.rope import Rope
from armillary.checkpoints.table import families


@families.register
class Llama(Decoder):
    """LLaMA 1 to 3 and everything that is stored as they are."""

    kind: ClassVar[str] = "llama"
    source: ClassVar[str] = "Touvron et al. 2023, LLaMA; Dubey et al. 2024, The Llama 3 Herd of Models"
    architectures: ClassVar[tuple[str, ...]] = ("LlamaForCausalLM", "LLaMAForCausalLM", "LlamaModel")
    whole: ClassVar[bool] = True
    fields: ClassVar[tuple[Field, ...]] = (
        *sizes(2048),
        BIASES,
        Rope(),
        ACTIVATION,
        Same("mlp_bias", "block.channel.bias", kind=bool, default=False),
        epsilon(1e-6),
        TIED,
        Fixed("sliding_window", None),
    )
    ignored: ClassVar[frozenset[str]] = Decoder.ignored | {"max_sequence_length"}
