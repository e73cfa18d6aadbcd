"""OLMo-shaped checkpoints (Groeneveld et al. 2024, OLMo): LLaMA's arrangement with LayerNorm that has neither
gain nor bias, and with queries, keys and values cut to a range."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from armillary.checkpoints.decoder import ACTIVATION, BIASES, TIED, Decoder, arrangement, sizes
from armillary.checkpoints.fields import Field, Same
from armillary.checkpoints.rope import Rope
from armillary.checkpoints.table import families

_NORM = {"kind": "layernorm", "weight": False, "bias": False, "epsilon": 1e-5}


@families.register
class Olmo(Decoder):
    """OLMo 1B and 7B."""

    kind: ClassVar[str] = "olmo"
    source: ClassVar[str] = "Groeneveld et al. 2024, OLMo: Accelerating the Science of Language Models"
    architectures: ClassVar[tuple[str, ...]] = ("OlmoForCausalLM", "OlmoModel")
    template: ClassVar[Mapping[str, Any]] = arrangement(norm=_NORM)
    fields: ClassVar[tuple[Field, ...]] = (
        *sizes(2048),
        BIASES,
        Same("clip_qkv", "block.mixer.clip", kind=float),
        Rope(),
        ACTIVATION,
        TIED,
    )
