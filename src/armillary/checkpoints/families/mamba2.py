"""Mamba-2-shaped checkpoints (Dao & Gu 2024, Transformers are SSMs): a stack of Mamba-2 mixers and nothing else.

Published folders say `norm_before_gate: true`; the readers gate first and norm then, whatever it says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from armillary.checkpoints.fields import Field, Fixed, Same
from armillary.checkpoints.state_space import IGNORED, Heads, Product, StepLimits, body_entries, mamba2_entries
from armillary.checkpoints.table import Entry, Family, families


@families.register
class Mamba2Family(Family):
    """Mamba-2 in all sizes, and Codestral Mamba."""

    kind: ClassVar[str] = "mamba2"
    source: ClassVar[str] = (
        "Dao & Gu 2024, Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State "
        "Space Duality"
    )
    architectures: ClassVar[tuple[str, ...]] = ("Mamba2ForCausalLM", "Mamba2Model")
    prefix: ClassVar[str] = "backbone."
    template: ClassVar[Mapping[str, Any]] = {
        "form": "decoder",
        "norm": {"kind": "rmsnorm"},
        "head": {"kind": "language_model"},
        "block": {"mixer": {"kind": "mamba2"}, "norm": {"kind": "rmsnorm"}},
    }
    fields: ClassVar[tuple[Field, ...]] = (
        Same("vocab_size", "vocabulary", needed=True),
        Same("hidden_size", "width", needed=True),
        Same("num_hidden_layers", "depth", needed=True),
        Same("max_position_embeddings", "context", default=2048),  # ours; their readers have no use for it
        Same("state_size", "block.mixer.state_width", default=128),
        Same("expand", "block.mixer.expand", default=2),
        Heads("num_heads", "head_dim", "expand", defaults=(128, 64)),
        Same("n_groups", "block.mixer.groups", default=8),
        Same("conv_kernel", "block.mixer.taps", default=4),
        Fixed("use_bias", False),
        Fixed("use_conv_bias", True),
        Fixed("hidden_act", "silu"),
        StepLimits(),
        Same(
            "layer_norm_epsilon",
            "norm.epsilon",
            "block.norm.epsilon",
            "block.mixer.epsilon",
            kind=float,
            default=1e-5,
        ),
        Same("tie_word_embeddings", "head.tied", kind=bool, default=False),
        Product("intermediate_size"),
        Fixed("rms_norm", True),
    )
    entries: ClassVar[tuple[Entry, ...]] = (
        *body_entries(),
        *mamba2_entries("backbone.layers.{i}.mixer", "blocks.{i}.mixer.inner"),
    )
    ignored: ClassVar[frozenset[str]] = IGNORED | {"norm_before_gate", "time_step_rank"}
    constants: ClassVar[Mapping[str, Any]] = {"use_cache": True}
