"""Decoders that are stored as LLaMA is: products with names of their own, `model.layers.N.self_attn.…`.

Most open families differ from LLaMA in their settings only, in where their norms stand and in a norm
of queries and keys; each says so in its file in `families/`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from armillary.base.errors import UnsupportedError
from armillary.checkpoints.facts import Facts, facts
from armillary.checkpoints.fields import ACTIVATIONS, Field, Same, Word
from armillary.checkpoints.table import Entry, Family, PermuteHalfInterleaved, Step
from armillary.nn.network import ModelSettings

RMSNORM = {"kind": "rmsnorm"}
BIASES = Same("attention_bias", "block.mixer.bias", "block.mixer.out_bias", kind=bool, default=False)
ACTIVATION = Word("hidden_act", "block.channel.activation", ACTIVATIONS, default="silu")
TIED = Same("tie_word_embeddings", "head.tied", kind=bool, default=False)
SIZES: tuple[Field, ...] = (
    Same("vocab_size", "vocabulary", needed=True),
    Same("hidden_size", "width", needed=True),
    Same("num_hidden_layers", "depth", needed=True),
    Same("num_attention_heads", "block.mixer.heads", needed=True),
    Same("intermediate_size", "block.channel.hidden", needed=True),
)


def sizes(context: int, kv_heads: int | None = None, head_width: int | None = None) -> tuple[Field, ...]:
    """The sizes of a model, with the readers' defaults for keys that may be missing; the feed-forward's is the last."""
    return (
        *SIZES[:-1],
        Same("max_position_embeddings", "context", default=context),
        Same("num_key_value_heads", "block.mixer.kv_heads", default=kv_heads, null=None),
        Same("head_dim", "block.mixer.head_width", default=head_width),
        SIZES[-1],
    )


def epsilon(default: float, *also: str) -> Field:
    """That of every norm, and of those at these settings."""
    return Same("rms_norm_eps", "norm.epsilon", "block.norm.epsilon", *also, kind=float, default=default)


def arrangement(
    mixer: Mapping[str, Any] | None = None,
    channel: str | None = "gated",
    norm: Mapping[str, Any] = RMSNORM,
    **block: Any,
) -> dict[str, Any]:
    """A template: rotary attention with these settings besides, and a channel mixer, of this kind in all blocks (None:
    not in all). norm: every norm; block: what else a block has."""
    parts = {"mixer": {"kind": "attention", "position": {"kind": "rope"}, **(mixer or {})}}
    if channel is not None:
        parts["channel"] = {"kind": channel}
    return {
        "form": "decoder",
        "norm": norm,
        "head": {"kind": "language_model"},
        "block": {**parts, "norm": norm, **block},
    }


class Decoder(Family):
    """norms: their norms of a block beside ours; channel, last: their names of the feed-forward and the last norm;
    whole: whether readers need a width that the heads divide."""

    prefix: ClassVar[str] = "model."
    norms: ClassVar[tuple[tuple[str, str], ...]] = (
        ("input_layernorm", "mixer.norm"),
        ("post_attention_layernorm", "channel.norm"),
    )
    channel: ClassVar[str] = "mlp"
    last: ClassVar[str] = "model.norm"
    whole: ClassVar[bool] = False
    template: ClassVar[Mapping[str, Any]] = arrangement()
    ignored: ClassVar[frozenset[str]] = frozenset({"pretraining_tp", "attention_dropout"})
    constants: ClassVar[Mapping[str, Any]] = {"attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True}
    leftovers: ClassVar[re.Pattern[str] | None] = re.compile(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq")

    def equivalent(self, wanted: Facts) -> Facts:
        """Interleaved pairs become half ones (the rows of q and k are permuted), and a larger base stands for ntk."""
        wanted = super().equivalent(wanted)
        for name in [name for name in wanted if name.endswith(".position.pairing")]:
            rope = name.removesuffix(".pairing")
            width = wanted.get(f"{rope.removesuffix('.position')}.head_width", 0)
            if wanted.get(f"{rope}.fraction") != 1 or width < 4:
                continue
            wanted[name] = "half"
            if wanted.get(f"{rope}.scaling.kind") == "ntk":
                factor = wanted.pop(f"{rope}.scaling.factor")
                del wanted[f"{rope}.scaling.kind"]
                wanted[f"{rope}.scaling"] = None
                wanted[f"{rope}.base"] *= factor ** (width / (width - 2))
        return wanted

    def check(self, wanted: Facts) -> None:
        width, heads = wanted["width"], wanted.get("attention.mixer.heads", wanted.get("blocks.0.mixer.heads"))
        if self.whole and width % heads:
            raise UnsupportedError(
                f"model.width: {width} is not a multiple of {heads} heads, which readers of the '{self.kind}' layout "
                "refuse"
            )

    def table(self, settings: ModelSettings) -> Sequence[Entry]:
        theirs, ours = "model.layers.{i}", "blocks.{i}"
        channel = f"{theirs}.{self.channel}"
        of_up = "intermediate_size, hidden_size"
        entries = [
            Entry("model.embed_tokens.weight", "embed.weight", sizes="vocab_size, hidden_size"),
            *(Entry(f"{theirs}.{a}.weight", f"{ours}.{b}.weight", sizes="hidden_size") for a, b in self.norms),
            Entry(f"{channel}.gate_proj.weight", f"{ours}.channel.inner.gate.weight", sizes=of_up),
            Entry(f"{channel}.gate_proj.bias", f"{ours}.channel.inner.gate.bias", sizes="intermediate_size"),
            Entry(f"{channel}.up_proj.weight", f"{ours}.channel.inner.up.weight", sizes=of_up),
            Entry(f"{channel}.up_proj.bias", f"{ours}.channel.inner.up.bias", sizes="intermediate_size"),
            Entry(f"{channel}.down_proj.weight", f"{ours}.channel.inner.down.weight", sizes=of_up),
            Entry(f"{channel}.down_proj.bias", f"{ours}.channel.inner.down.bias", sizes="hidden_size"),
            Entry(f"{self.last}.weight", "norm.weight", sizes="hidden_size"),
            Entry("lm_head.weight", "head.product.weight", sizes="vocab_size, hidden_size"),
        ]
        known = facts(settings)
        for index in range(settings.depth):
            entries += self._attention(known, index)
        return entries

    def _attention(self, known: Facts, index: int) -> list[Entry]:
        """One block's, if it attends; the pairing of its positions is about its queries and keys."""
        theirs, ours = f"model.layers.{index}.self_attn", f"blocks.{index}.mixer"
        if f"{ours}.position.pairing" not in known:
            return []
        interleaved = known[f"{ours}.position.pairing"] == "interleaved"
        of_v = "num_key_value_heads × head_dim"
        entries = [
            Entry(f"{theirs}.v_proj.weight", f"{ours}.inner.v.weight", sizes=f"{of_v}, hidden_size"),
            Entry(f"{theirs}.v_proj.bias", f"{ours}.inner.v.bias", sizes=of_v),
            Entry(
                f"{theirs}.o_proj.weight",
                f"{ours}.inner.o.weight",
                sizes="hidden_size, num_attention_heads × head_dim",
            ),
            Entry(f"{theirs}.o_proj.bias", f"{ours}.inner.o.bias", sizes="hidden_size"),
        ]
        for name, heads, count in (
            ("q", known[f"{ours}.heads"], "num_attention_heads"),
            ("k", known[f"{ours}.kv_heads"], "num_key_value_heads"),
        ):
            over_all = known.get(f"{ours}.norm_over") == "all"
            steps: tuple[Step, ...] = (PermuteHalfInterleaved(heads),) if interleaved else ()
            alone: tuple[Step, ...] = (PermuteHalfInterleaved(1),) if interleaved else ()
            rows = f"{count} × head_dim"
            entries += [
                Entry(f"{theirs}.{name}_proj.weight", f"{ours}.inner.{name}.weight", steps, f"{rows}, hidden_size"),
                Entry(f"{theirs}.{name}_proj.bias", f"{ours}.inner.{name}.bias", steps, rows),
                Entry(
                    f"{theirs}.{name}_norm.weight",
                    f"{ours}.inner.{name}_norm.weight",
                    steps if over_all else alone,
                    rows if over_all else "head_dim",
                ),
            ]
        return entries
