"""GPT-NeoX-shaped checkpoints (Black et al. 2022, GPT-NeoX-20B; Biderman et al. 2023, Pythia).

LayerNorm with bias, attention and feed-forward side by side, rotary positions on a part of each head.
Queries, keys and values are stored as one tensor, head after head.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from armillary.checkpoints.facts import facts
from armillary.checkpoints.fields import ACTIVATIONS, Field, Same, Word
from armillary.checkpoints.rope import Rope
from armillary.checkpoints.table import Entry, Family, SplitByHead, families
from armillary.nn.network import ModelSettings

_THEIRS, _OURS = "gpt_neox.layers.{i}", "blocks.{i}"
_NORM = {"kind": "layernorm", "weight": True, "bias": True}


@families.register
class GPTNeoX(Family):
    """GPT-NeoX, Pythia and others that are stored as they are."""

    kind: ClassVar[str] = "gpt_neox"
    source: ClassVar[str] = "Black et al. 2022, GPT-NeoX-20B; Biderman et al. 2023, Pythia"
    architectures: ClassVar[tuple[str, ...]] = ("GPTNeoXForCausalLM", "GPTNeoXModel")
    prefix: ClassVar[str] = "gpt_neox."
    head: ClassVar[str] = "embed_out."
    template: ClassVar[Mapping[str, Any]] = {
        "form": "decoder",
        "norm": _NORM,
        "head": {"kind": "language_model"},
        "block": {
            "mixer": {"kind": "attention", "position": {"kind": "rope"}},
            "channel": {"kind": "ffn", "bias": True},
            "norm": _NORM,
        },
    }
    fields: ClassVar[tuple[Field, ...]] = (
        Same("vocab_size", "vocabulary", needed=True),
        Same("hidden_size", "width", needed=True),
        Same("num_hidden_layers", "depth", needed=True),
        Same("num_attention_heads", "block.mixer.heads", needed=True),
        Same("intermediate_size", "block.channel.hidden", needed=True),
        Same("max_position_embeddings", "context", default=2048),
        Same("attention_bias", "block.mixer.bias", "block.mixer.out_bias", kind=bool, default=True),
        Rope("rotary_emb_base", "rotary_pct", fraction=0.25),
        Word("hidden_act", "block.channel.activation", ACTIVATIONS, default="gelu"),
        Same("layer_norm_eps", "norm.epsilon", "block.norm.epsilon", kind=float, default=1e-5),
        Same("use_parallel_residual", "block.parallel", kind=bool, default=True),
        Same("tie_word_embeddings", "head.tied", kind=bool, default=False),
    )
    ignored: ClassVar[frozenset[str]] = frozenset({"attention_dropout", "hidden_dropout", "classifier_dropout"})
    constants: ClassVar[Mapping[str, Any]] = {
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
    }
    leftovers: ClassVar[re.Pattern[str] | None] = re.compile(
        r"layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)"
    )

    def table(self, settings: ModelSettings) -> Sequence[Entry]:
        heads = facts(settings)["blocks.0.mixer.heads"]
        qkv = f"{_THEIRS}.attention.query_key_value"
        entries = [
            Entry("gpt_neox.embed_in.weight", "embed.weight", sizes="vocab_size, hidden_size"),
            Entry("embed_out.weight", "head.product.weight", sizes="vocab_size, hidden_size"),
        ]
        for leaf, of_hidden in (("weight", ", hidden_size"), ("bias", "")):
            ours = tuple(f"{_OURS}.mixer.inner.{name}.{leaf}" for name in "qkv")
            entries += [
                Entry(f"{qkv}.{leaf}", ours, (SplitByHead(heads),), f"3 × hidden_size{of_hidden}"),
                *(
                    Entry(f"{theirs}.{leaf}", f"{ours}.{leaf}", sizes=sizes + also * (leaf == "weight"))
                    for theirs, ours, sizes, also in (
                        (f"{_THEIRS}.attention.dense", f"{_OURS}.mixer.inner.o", "hidden_size", ""),
                        (f"{_THEIRS}.mlp.dense_h_to_4h", f"{_OURS}.channel.inner.up", "intermediate_size", of_hidden),
                        (
                            f"{_THEIRS}.mlp.dense_4h_to_h",
                            f"{_OURS}.channel.inner.down",
                            "hidden_size",
                            ", intermediate_size",
                        ),
                        (f"{_THEIRS}.input_layernorm", f"{_OURS}.mixer.norm", "hidden_size", ""),
                        (f"{_THEIRS}.post_attention_layernorm", f"{_OURS}.channel.norm", "hidden_size", ""),
                        ("gpt_neox.final_layer_norm", "norm", "hidden_size", ""),
                    )
                ),
            ]
        return entries
