"""GPT-2-shaped checkpoints (Radford et al. 2019, Language Models are Unsupervised Multitask Learners).

LayerNorm with bias before attention and a feed-forward of two products, learned positions. Its
products are stored as [inputs, outputs], queries, keys and values as one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from armillary.checkpoints.fields import ACTIVATIONS, Equal, Field, Fixed, Same, Word
from armillary.checkpoints.table import Entry, Family, Split, Transpose, families

_THEIRS, _OURS = "transformer.h.{i}", "blocks.{i}"
_IGNORED = """
attn_pdrop embd_pdrop resid_pdrop reorder_and_upcast_attn
summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout
"""
_QKV = tuple(f"{_OURS}.mixer.inner.{name}" for name in "qkv")


@families.register
class GPT2(Family):
    """GPT-2 in all sizes."""

    kind: ClassVar[str] = "gpt2"
    source: ClassVar[str] = "Radford et al. 2019, Language Models are Unsupervised Multitask Learners"
    architectures: ClassVar[tuple[str, ...]] = ("GPT2LMHeadModel", "GPT2Model")
    prefix: ClassVar[str] = "transformer."
    template: ClassVar[Mapping[str, Any]] = {
        "form": "decoder",
        "position": {"kind": "learned"},
        "norm": {"kind": "layernorm", "bias": True},
        "head": {"kind": "language_model"},
        "block": {
            "mixer": {"kind": "attention", "bias": True, "out_bias": True},
            "channel": {"kind": "ffn", "bias": True},
            "norm": {"kind": "layernorm", "bias": True},
        },
    }
    fields: ClassVar[tuple[Field, ...]] = (
        Same("vocab_size", "vocabulary", needed=True),
        Same("n_embd", "width", needed=True),
        Same("n_layer", "depth", needed=True),
        Same("n_positions", "context", default=1024),
        Equal("n_ctx", "n_positions"),
        Same("n_head", "block.mixer.heads", needed=True),
        Same("n_inner", "block.channel.hidden"),
        Word("activation_function", "block.channel.activation", ACTIVATIONS, default="gelu_new"),
        Same("layer_norm_epsilon", "norm.epsilon", "block.norm.epsilon", kind=float, default=1e-5),
        Same("tie_word_embeddings", "head.tied", kind=bool, default=True),
        Fixed("scale_attn_weights", True),
        Fixed("scale_attn_by_inverse_layer_idx", False),
    )
    ignored: ClassVar[frozenset[str]] = frozenset(_IGNORED.split())
    constants: ClassVar[Mapping[str, Any]] = {
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
    }
    leftovers: ClassVar[re.Pattern[str] | None] = re.compile(r"h\.\d+\.attn\.(masked_)?bias")
    entries: ClassVar[tuple[Entry, ...]] = (
        Entry("transformer.wte.weight", "embed.weight", sizes="vocab_size, n_embd"),
        Entry("transformer.wpe.weight", "position.table.weight", sizes="n_positions, n_embd"),
        Entry(f"{_THEIRS}.ln_1.weight", f"{_OURS}.mixer.norm.weight", sizes="n_embd"),
        Entry(f"{_THEIRS}.ln_1.bias", f"{_OURS}.mixer.norm.bias", sizes="n_embd"),
        Entry(
            f"{_THEIRS}.attn.c_attn.weight",
            tuple(f"{name}.weight" for name in _QKV),
            (Transpose(), Split()),
            sizes="n_embd, 3 × n_embd",
        ),
        Entry(f"{_THEIRS}.attn.c_attn.bias", tuple(f"{name}.bias" for name in _QKV), (Split(),), sizes="3 × n_embd"),
        Entry(f"{_THEIRS}.attn.c_proj.weight", f"{_OURS}.mixer.inner.o.weight", (Transpose(),), sizes="n_embd"),
        Entry(f"{_THEIRS}.attn.c_proj.bias", f"{_OURS}.mixer.inner.o.bias", sizes="n_embd"),
        Entry(f"{_THEIRS}.ln_2.weight", f"{_OURS}.channel.norm.weight", sizes="n_embd"),
        Entry(f"{_THEIRS}.ln_2.bias", f"{_OURS}.channel.norm.bias", sizes="n_embd"),
        Entry(f"{_THEIRS}.mlp.c_fc.weight", f"{_OURS}.channel.inner.up.weight", (Transpose(),), "n_embd, n_inner"),
        Entry(f"{_THEIRS}.mlp.c_fc.bias", f"{_OURS}.channel.inner.up.bias", sizes="n_inner"),
        Entry(f"{_THEIRS}.mlp.c_proj.weight", f"{_OURS}.channel.inner.down.weight", (Transpose(),), "n_inner, n_embd"),
        Entry(f"{_THEIRS}.mlp.c_proj.bias", f"{_OURS}.channel.inner.down.bias", sizes="n_embd"),
        Entry("transformer.ln_f.weight", "norm.weight", sizes="n_embd"),
        Entry("transformer.ln_f.bias", "norm.bias", sizes="n_embd"),
        Entry("lm_head.weight", "head.product.weight", sizes="vocab_size, n_embd"),
    )
