"""Mamba-shaped checkpoints (Gu & Dao 2023, Mamba): a stack of selective state spaces and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from armillary.checkpoints.fields import Field, Fixed, Same
from armillary.checkpoints.state_space import IGNORED, Empty, Product, StepRank, body_entries, mamba_entries
from armillary.checkpoints.table import Entry, Family, families


@families.register
class MambaFamily(Family):
    """Mamba in all sizes."""

    kind: ClassVar[str] = "mamba"
    source: ClassVar[str] = "Gu & Dao 2023, Mamba: Linear-Time Sequence Modeling with Selective State Spaces"
    architectures: ClassVar[tuple[str, ...]] = ("MambaForCausalLM", "MambaModel")
    prefix: ClassVar[str] = "backbone."
    template: ClassVar[Mapping[str, Any]] = {
        "form": "decoder",
        "norm": {"kind": "rmsnorm"},
        "head": {"kind": "language_model"},
        "block": {"mixer": {"kind": "mamba"}, "norm": {"kind": "rmsnorm"}},
    }
    fields: ClassVar[tuple[Field, ...]] = (
        Same("vocab_size", "vocabulary", needed=True),
        Same("hidden_size", "width", needed=True, older=("d_model",)),
        Same("num_hidden_layers", "depth", needed=True, older=("n_layer",)),
        Same("max_position_embeddings", "context", default=2048),  # ours; their readers have no use for it
        Same("state_size", "block.mixer.states", default=16),
        Same("expand", "block.mixer.expand", default=2),
        Same("conv_kernel", "block.mixer.kernel", default=4),
        Same("use_bias", "block.mixer.bias", kind=bool, default=False),
        Same("use_conv_bias", "block.mixer.conv_bias", kind=bool, default=True),
        Fixed("hidden_act", "silu"),
        StepRank(),
        Same("layer_norm_epsilon", "norm.epsilon", "block.norm.epsilon", kind=float, default=1e-5),
        Same("tie_word_embeddings", "head.tied", kind=bool, default=True),
        Product("intermediate_size"),
        Product("d_inner"),
        Fixed("rms_norm", True),
        Empty("ssm_cfg"),
    )
    entries: ClassVar[tuple[Entry, ...]] = (
        *body_entries(),
        *mamba_entries("backbone.layers.{i}.mixer", "blocks.{i}.mixer.inner"),
    )
    ignored: ClassVar[frozenset[str]] = IGNORED
    constants: ClassVar[Mapping[str, Any]] = {"use_cache": True}
