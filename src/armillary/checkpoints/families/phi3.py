"""Phi-3-shaped checkpoints (Abdin et al. 2024, Phi-3 Technical Report): LLaMA's arrangement with queries, keys and
values stored as one tensor, gate and up as another; with a window or none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from armillary.base.errors import UnsupportedError
from armillary.checkpoints.decoder import ACTIVATION, TIED, Decoder, epsilon, sizes
from armillary.checkpoints.facts import Facts
from armillary.checkpoints.fields import Config, Data, Field, Fixed
from armillary.checkpoints.layers import Window
from armillary.checkpoints.rope import Rope
from armillary.checkpoints.table import Entry, Family, Split, families
from armillary.nn.network import ModelSettings

_FUSED = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


class OwnCode(Field):
    """`auto_map`: published folders carry a copy of the code that these readers have; it is not run."""

    keys = ("auto_map",)

    def read(self, config: Config, data: Data) -> None:
        found = config.take("auto_map", {})
        names = found.values() if isinstance(found, Mapping) else [found]
        if not all(isinstance(name, str) and name.rpartition(".")[2] in ("Phi3Config", *_CLASSES) for name in names):
            raise UnsupportedError(
                f"'auto_map' is {found!r}",
                where=config.where,
                hint="the model is computed by code in its folder, and no code from a folder is ever run",
            )


_CLASSES = ("Phi3ForCausalLM", "Phi3Model")


@families.register
class Phi3(Decoder):
    """Phi-3 and Phi-4, but for those with longrope, whose angles depend on the length of each input."""

    kind: ClassVar[str] = "phi3"
    source: ClassVar[str] = "Abdin et al. 2024, Phi-3 Technical Report"
    architectures: ClassVar[tuple[str, ...]] = _CLASSES
    fields: ClassVar[tuple[Field, ...]] = (
        *sizes(4096),
        Fixed("attention_bias", False),
        Rope(fraction=1.0, scalings=()),
        ACTIVATION,
        epsilon(1e-5),
        TIED,
        OwnCode(),
        Window(),
    )
    ignored: ClassVar[frozenset[str]] = Decoder.ignored | {
        "embd_pdrop",
        "resid_pdrop",
        "original_max_position_embeddings",  # of longrope only
    }

    def equivalent(self, wanted: Facts) -> Facts:
        return Family.equivalent(self, wanted)  # queries and keys are one tensor: no rows are permuted in it

    def table(self, settings: ModelSettings) -> Sequence[Entry]:
        theirs, ours = "model.layers.{i}", "blocks.{i}"
        return [
            *(entry for entry in super().table(settings) if str(entry.theirs).split(".")[-2] not in _FUSED),
            Entry(
                f"{theirs}.self_attn.qkv_proj.weight",
                tuple(f"{ours}.mixer.inner.{name}.weight" for name in "qkv"),
                (Split(),),
                "(num_attention_heads + 2 × num_key_value_heads) × head_dim, hidden_size",
            ),
            Entry(
                f"{theirs}.mlp.gate_up_proj.weight",
                (f"{ours}.channel.inner.gate.weight", f"{ours}.channel.inner.up.weight"),
                (Split(),),
                "2 × intermediate_size, hidden_size",
            ),
        ]
