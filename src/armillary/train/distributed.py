"""Several processes, one model: FSDP2 under `torchrun` (Zhao et al. 2023, PyTorch FSDP).

Each block is a group of sharded parameters, and the root holds the rest, so that an embedding and
the head tied to it are always gathered together. Rank r computes its rows of the same batch.
"""

from __future__ import annotations

import atexit
import errno
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from armillary.base.errors import ArmillaryError, TrainingError
from armillary.nn.network import Network

# What is called besides `forward`, of the network and of a block: parameters are gathered for these too.
NETWORK_METHODS = ("hidden", "cross_entropy", "token_nll", "extend", "init_state")
BLOCK_METHODS = ("extend", "init_state")


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
        """What the first process holds, in all of them (data that JSON can say)."""
        if self.size == 1:
            return value
        text = json.dumps(value).encode() if self.first else b""
        length = torch.tensor([len(text)])
        torch.distributed.broadcast(length, src=0)
        content = torch.zeros(int(length), dtype=torch.uint8)
        if self.first:
            content = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        torch.distributed.broadcast(content, src=0)
        return json.loads(bytes(content.tolist()))

    def lead(self, work: Callable[[], Any]) -> Any:
        """Let the first process do something and tell the others its result (data that JSON can say);
        a user's error is raised in all of them, so that none waits for ever."""
        if self.size == 1:
            return work()
        error: ArmillaryError | None = None
        told: dict[str, Any] = {}
        if self.first:
            try:
                told = {"result": work()}
            except ArmillaryError as caught:
                error = caught
                code = caught.__cause__.errno if isinstance(caught.__cause__, OSError) else None
                told = {"what": caught.what, "where": caught.where, "hint": caught.hint, "errno": code}
        told = self.agree(told)
        if error is not None:
            raise error
        if "what" in told:
            cause = None if told["errno"] is None else OSError(told["errno"], told["what"])
            raise TrainingError(told["what"], where=told["where"], hint=told["hint"]) from cause
        return told["result"]

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
            raise TrainingError(
                f"the processes cannot find each other: {reason}", hint="start with torchrun"
            ) from error
        atexit.register(_end)
    return World(torch.distributed.get_rank(), size, device)


def _end() -> None:
    """Leave the group while the interpreter is whole. Gloo's threads let go of their last tensors
    first: one that waits for the interpreter's lock while it closes brings the process down."""
    time.sleep(0.1)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


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
                for name in BLOCK_METHODS:
                    register_fsdp_forward_method(block, name)
    fully_shard(network, mesh=mesh)
    for name in NETWORK_METHODS:
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


def write_shards(folder: Path, files: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write whole safetensors files, each process its own part of every tensor.

    files: file name → tensors by name. Every process calls it with the same folder, which is new.
    torch.distributed.checkpoint writes the parts and joins them in its safetensors form; its usual
    form keeps a pickled index, which nothing here would read. Raises OSError as one process would.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    tensors = {name: tensor for part in files.values() for name, tensor in part.items()}
    places = {name: number for number, part in enumerate(files.values(), 1) for name in part}
    writer = HuggingFaceStorageWriter(
        str(folder), fqn_to_index_mapping=places, save_distributed=True, enable_consolidation=True
    )
    try:
        save(tensors, storage_writer=writer)
    except CheckpointException as error:
        for failure, _ in error.failures.values():
            if any(word in str(failure) for word in ("No space left", "os error 28", "Errno 28")):
                raise OSError(errno.ENOSPC, str(failure)) from error
            if isinstance(failure, OSError):
                raise failure from error
        raise
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        for number, name in enumerate(files, 1):
            os.replace(folder / f"model-{number:05d}-of-{len(files):05d}.safetensors", folder / name)
    torch.distributed.barrier()


def read_shards(folder: Path, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by name from the safetensors files of a folder, sharded like those in `wanted`; each
    process reads its own part only, however many processes wrote them."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    filled = {name: torch.zeros_like(like) for name, like in wanted.items()}
    load(filled, storage_reader=HuggingFaceStorageReader(str(folder)))
    return filled
