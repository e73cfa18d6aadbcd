"""Mixtures of experts in config.json and on disk: which blocks have them, and a tensor for every product of each."""

from __future__ import annotations

from armillary.base.errors import CheckpointError
from armillary.checkpoints.facts import Facts
from armillary.checkpoints.fields import Config, Data, Field
from armillary.checkpoints.layers import vary
from armillary.checkpoints.table import Entry, Split, Stack

SPARSE, DENSE = "sparse", "dense"
KINDS = {SPARSE: ("channel.kind", "moe"), DENSE: ("channel.kind", "gated")}
# What only training and its records look at.
IGNORED = frozenset({"output_router_logits", "router_aux_loss_coef", "router_jitter_noise"})


class Sparse(Field):
    """As the Qwen families say it: every so many blocks have experts, but for some that are listed.

    Reads last of a family's fields: it gives the blocks what was put under `sparse` and `dense`.
    """

    keys = ("decoder_sparse_step", "mlp_only_layers")

    def read(self, config: Config, data: Data) -> None:
        step = config.number("decoder_sparse_step", config.take("decoder_sparse_step", 1), int)
        if step < 1:
            raise config.wrong("decoder_sparse_step", step, "at least 1")
        listed = blocks_listed(config, "mlp_only_layers", data["depth"])
        besides = {kind: data.pop(kind, {}) for kind in (SPARSE, DENSE)}
        sparse = [(index + 1) % step == 0 and index not in listed for index in range(data["depth"])]
        vary(data, [SPARSE if one else DENSE for one in sparse], besides)

    def write(self, facts: Facts, config: Data) -> None:
        config["decoder_sparse_step"] = 1
        config["mlp_only_layers"] = [
            index for index in range(facts["depth"]) if facts.get(f"blocks.{index}.channel.kind") != "moe"
        ]


def blocks_listed(config: Config, key: str, depth: int) -> set[int]:
    """The blocks that a key lists, none where it is not given; those beyond the last are a mistake."""
    given = config.take(key, [])
    if not isinstance(given, list) or any(type(one) is not int for one in given):
        raise config.wrong(key, given, "a list of whole numbers")
    beyond = [one for one in given if not 0 <= one < depth]
    if beyond:
        raise CheckpointError(
            f"'{key}' names block {beyond[0]}, but 'num_hidden_layers' is {depth}", where=config.where
        )
    return set(given)


def expert_entries(
    theirs: str,
    ours: str,
    count: int,
    *,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    fused: str | None = None,
    keys: tuple[str, str] = ("num_experts", "moe_intermediate_size"),
) -> list[Entry]:
    """Experts and router of every block, at `theirs` and `ours`; names: of the products gate, up and down.

    Newer readers hold all experts in one tensor, gate and up in one besides. They write a tensor for each
    as published, but can be told not to: such folders, with names at `fused`, are read too. keys: of how many
    experts and how wide.
    """
    number, hidden = keys
    both = fused or theirs
    gate, up, down = (f"{ours}.experts.{name}.weight" for name in ("gate", "up", "down"))
    entries = [
        Entry(
            tuple(f"{theirs}.experts.{expert}.{name}.weight" for expert in range(count)),
            held,
            (Stack(),),
            f"{hidden}, hidden_size",
        )
        for name, held in zip(names, (gate, up, down), strict=True)
    ]
    entries += [
        Entry(f"{theirs}.gate.weight", f"{ours}.router.weight", sizes=f"{number}, hidden_size"),
        Entry(
            f"{both}.experts.gate_up_proj",
            (gate, up),
            (Split(1),),
            f"{number}, 2 × {hidden}, hidden_size",
            other=True,
        ),
        Entry(f"{both}.experts.down_proj", down, (), f"{number}, hidden_size, {hidden}", other=True),
    ]
    if both != theirs:
        entries.append(Entry(f"{both}.gate.weight", f"{ours}.router.weight", other=True))
    return entries
