"""What a network takes before anything runs: parameters, FLOPs, state bytes, memory for training.

Parameters and memory come from a build without storage; FLOPs and state bytes from what each
mechanism declares.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from armillary.nn.block import BlockSettings
from armillary.nn.network import ModelSettings, Network, build


@dataclass(frozen=True)
class Description:
    """parameters: all, each once; active: those that take part for one token; embedding: those of the
    embedding and head; flops_per_token: forward, at `length`; state_bytes: of one row after `length`
    tokens; training_bytes: weights, gradients, moments and kept activations of one micro-batch;
    driver: its kind, or None."""

    parameters: int
    active: int
    embedding: int
    flops_per_token: float
    state_bytes: float
    length: int
    training_bytes: int
    activation_bytes: int
    blocks: tuple[str, ...]
    driver: str | None = None


def describe(
    settings: ModelSettings, *, length: int | None = None, batch: int = 1, bf16: bool = True, recompute: bool = False
) -> Description:
    """Numbers for a network with these settings.

    length: tokens per row (by default the model's context); batch: rows of one micro-batch.
    """
    length = length or settings.context
    network = build(settings, device="meta")
    total = sum(p.numel() for p in network.parameters())
    embedding = network.embed.weight.numel()
    if "head.product.weight" not in network.tied_names():
        embedding += sum(p.numel() for p in network.head.parameters())
    cost = settings.cost(settings.place(), length, 2 if bf16 else 4)
    kept = _activations(settings, length, batch, bf16, recompute)
    return Description(
        parameters=total,
        active=total - _idle(settings, network),
        embedding=embedding,
        flops_per_token=cost.flops / length,
        state_bytes=cost.state_bytes,
        length=length,
        training_bytes=16 * total + kept,
        activation_bytes=kept,
        blocks=tuple(_line(block) for block in settings.layers()),
        driver=None if settings.driver is None else settings.driver.kind,
    )


def _idle(settings: ModelSettings, network: Network) -> int:
    """Parameters of mixers and channel mixers that a single token does not reach."""
    idle = 0
    for block, module in zip(settings.layers(), network.blocks, strict=True):
        for branch in block.all():
            held = sum(p.numel() for p in module.get_submodule(f"{branch.name}.inner").parameters())
            if branch.mixer is not None:
                idle += held - branch.mixer.active(held)
            elif branch.channel is not None:
                idle += held - branch.channel.active(held, settings.width)
    return idle


def _activations(settings: ModelSettings, length: int, batch: int, bf16: bool, recompute: bool) -> int:
    """Bytes kept for the backward pass, from a forward pass over tensors without storage."""
    seen: dict[int, tuple[torch.UntypedStorage, int]] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        network = Network(settings)
        network.compute(torch.bfloat16 if bf16 else torch.float32)
        network.recompute_blocks(recompute)
        owned = {p.untyped_storage()._cdata for p in network.parameters()}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in owned:
                seen[storage._cdata] = (storage, storage.nbytes())
            return tensor

        ids = torch.zeros(batch, length, dtype=torch.int64)
        source = ids if settings.form == "encoder_decoder" else None
        side = network.blank_side(batch, length)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            network.hidden(ids, source=source, side=side)
    return sum(size for _, size in seen.values())


def _line(block: BlockSettings) -> str:
    names = [(branch.mixer or branch.channel) for branch in block.all()]
    return " + ".join(part.kind for part in names if part is not None)
