"""Bamba-shaped checkpoints (Ganti et al. 2024, Bamba): Mamba-2 in most blocks and attention in a few, each before a
gated feed-forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from armillary.base.errors import UnsupportedError
from armillary.checkpoints.decoder import RMSNORM, SIZES, TIED, Decoder, epsilon
from armillary.checkpoints.experts import blocks_listed
from armillary.checkpoints.facts import Facts, facts
from armillary.checkpoints.fields import Config, Data, Field, Fixed, Same
from armillary.checkpoints.layers import vary
from armillary.checkpoints.rope import Rope
from armillary.checkpoints.state_space import Heads, StepLimits, mamba2_entries
from armillary.checkpoints.table import Entry, families
from armillary.nn.network import ModelSettings

_ATTENTION, _MAMBA = "attention", "mamba"
_KEYS = ("mamba_expand", "mamba_n_groups", "mamba_d_state", "mamba_n_heads", "mamba_d_conv")


class HalfTurned(Rope):
    """Their readers turn half of each head, whatever the folder says."""

    def __init__(self) -> None:
        super().__init__(fraction=0.5, scalings=(), position=f"{_ATTENTION}.mixer.position")
        self.keys = (*self.keys, "attn_rotary_emb")

    def read(self, config: Config, data: Data) -> None:
        super().read(config, data)
        share = data[_ATTENTION]["mixer"]["position"]["fraction"]
        if share != 0.5:
            raise UnsupportedError(f"'{self.share}' is {share!r}", where=config.where, hint="only 0.5 can be read")
        turned, width, heads = config.take("attn_rotary_emb"), data["width"], data[_ATTENTION]["mixer"]["heads"]
        if turned is not None and (isinstance(turned, bool) or turned != width / heads / 2):
            raise UnsupportedError(
                f"'attn_rotary_emb' is {turned!r}, but half of a head is {width / heads / 2:g} by 'hidden_size' and "
                "'num_attention_heads'",
                where=config.where,
                hint="only half of each head can be read",
            )


class Attending(Field):
    """`attn_layer_indices`: the blocks with attention. Reads last: it gives the blocks their mixers."""

    keys = ("attn_layer_indices",)

    def read(self, config: Config, data: Data) -> None:
        listed = blocks_listed(config, "attn_layer_indices", data["depth"])
        besides = {kind: data.pop(kind) for kind in (_ATTENTION, _MAMBA)}
        vary(data, [_ATTENTION if index in listed else _MAMBA for index in range(data["depth"])], besides)

    def write(self, facts: Facts, config: Data) -> None:
        kinds = [facts.get(f"blocks.{index}.mixer.kind") for index in range(facts["depth"])]
        config["attn_layer_indices"] = [index for index, kind in enumerate(kinds) if kind == "attention"]


@families.register
class Bamba(Decoder):
    """Bamba 9B."""

    kind: ClassVar[str] = "bamba"
    source: ClassVar[str] = "Ganti et al. 2024, Bamba: Inference-Efficient Hybrid Mamba2 Model"
    architectures: ClassVar[tuple[str, ...]] = ("BambaForCausalLM", "BambaModel")
    whole: ClassVar[bool] = True
    norms: ClassVar[tuple[tuple[str, str], ...]] = (
        ("input_layernorm", "mixer.norm"),
        ("pre_ff_layernorm", "channel.norm"),
    )
    channel: ClassVar[str] = "feed_forward"
    last: ClassVar[str] = "model.final_layernorm"
    template: ClassVar[Mapping[str, Any]] = {
        **Decoder.template,
        "block": {"channel": {"kind": "gated", "activation": "silu"}, "norm": RMSNORM},
        _ATTENTION: {"mixer": {"kind": "attention", "position": {"kind": "rope"}}},
        _MAMBA: {"mixer": {"kind": "mamba2"}},
    }
    kinds: ClassVar[Mapping[str, tuple[str, Any]]] = {
        _ATTENTION: ("mixer.kind", "attention"),
        _MAMBA: ("mixer.kind", "mamba2"),
    }
    fields: ClassVar[tuple[Field, ...]] = (
        *SIZES[:3],
        Same("num_attention_heads", "attention.mixer.heads", needed=True),
        Same("intermediate_size", "block.channel.hidden", needed=True),
        Same("max_position_embeddings", "context", default=262144),
        Same("num_key_value_heads", "attention.mixer.kv_heads", default=8, null=None),
        Same("attention_bias", "attention.mixer.bias", "attention.mixer.out_bias", kind=bool, default=False),
        HalfTurned(),
        Same("mamba_expand", "mamba.mixer.expand", default=2),
        Heads("mamba_n_heads", "mamba_d_head", "mamba_expand", "mamba.mixer", defaults=(128, None)),
        Same("mamba_n_groups", "mamba.mixer.groups", default=1),
        Same("mamba_d_state", "mamba.mixer.state_width", default=256),
        Same("mamba_d_conv", "mamba.mixer.taps", default=4),
        Fixed("mamba_conv_bias", True),
        Fixed("mamba_proj_bias", False),
        StepLimits("mamba.mixer.step_limits"),
        Fixed("hidden_act", "silu"),
        Same("mlp_bias", "block.channel.bias", kind=bool, default=False),
        epsilon(1e-5, "mamba.mixer.epsilon"),
        TIED,
        Attending(),
    )
    ignored: ClassVar[frozenset[str]] = Decoder.ignored | {
        "mamba_chunk_size",
        "chunk_size",
        "num_logits_to_keep",
        "z_loss_coefficient",
        "use_mamba_kernels",
    }

    def table(self, settings: ModelSettings) -> Sequence[Entry]:
        known = facts(settings)
        mixers = [index for index in range(settings.depth) if known[f"blocks.{index}.mixer.kind"] == "mamba2"]
        return [
            *super().table(settings),
            *(
                entry
                for index in mixers
                for entry in mamba2_entries(f"model.layers.{index}.mamba", f"blocks.{index}.mixer.inner", _KEYS)
            ),
        ]
