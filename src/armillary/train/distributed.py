"""Several processes, one model: FSDP2 under `torchrun` (Zhao et al. 2023, PyTorch FSDP).

Each block is a group of sharded parameters, and the root holds the rest, so that an embedding and
the head tied to it are always gathered together. Rank r computes its rows of the same batch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from armillary.base.errors import TrainingError
from armillary.nn.network import Network

FORWARD_METHODS = ("hidden", "cross_entropy", "token_nll", "extend", "init_state")


@dataclass(frozen=True)
class World:
    """The processes of a run, and which of them this is; by default there is one."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @property
    def first(self) -> bool:
        """Whether this process writes files and speaks to the user."""
        return self.rank == 0

    def add(self, values: Tensor) -> None:
        """Sum a tensor over all processes, in place."""
        if self.size > 1:
            torch.distributed.all_reduce(values)

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            torch.distributed.barrier()

    def agree(self, value: Any) -> Any:
        """What the first process holds, in all of them (plain data)."""
        if self.size == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def sync_gradients(self, network: nn.Module, now: bool) -> None:
        """Gradients are exchanged with the last micro-batch only."""
        if self.size > 1:
            network.set_requires_gradient_sync(now)  # type: ignore[operator]


def begin() -> World:
    """This process's place among those that `torchrun` started; a World of one outside it.

    Raises TrainingError when the processes cannot find each other.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ:
        return World()
    cuda = torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = f"cuda:{local}" if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(local)
    if not torch.distributed.is_initialized():
        try:
            torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        except (RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise TrainingError(f"the processes cannot find each other: {reason}", hint="start with torchrun") from error
    return World(torch.distributed.get_rank(), size, device)


def shard(network: Network, world: World) -> None:
    """Shard the parameters, block by block, and see that what was tied still is.

    Parameters shared between blocks must be gathered together, so such a network is one group.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(torch.device(world.device).type, (world.size,))
    if not network.settings.share:
        for stack in network.stacks():
            for block in stack:
                fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)
    for name in FORWARD_METHODS:
        register_fsdp_forward_method(network, name)
    network.check_ties()


def whole(value: Tensor) -> Tensor:
    """A sharded tensor gathered; any other as it is. Every process must call it."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def spread(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor placed, typed and sharded as `like`; one that is sharded already as it is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(value, DTensor) or not isinstance(like, DTensor):
        return value.to(like)
    return distribute_tensor(value.to(device=like.device, dtype=like.dtype), like.device_mesh, like.placements)
