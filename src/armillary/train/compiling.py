"""Whether the blocks of a run are compiled: asked for, or worth the wait.

Compiling costs tens of seconds once, and gives back a share of every step; short runs stay eager.
The choice depends on the recipe and the machine only, so that a resumed run makes it again.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch

from armillary.base.errors import SettingsError
from armillary.nn.network import Network
from armillary.recipe.training import TrainingSettings

# FLOPs of a whole run from which compiling pays. Measured on a CPU with a model of 6 M parameters in
# bf16: 30 s to compile one kind of block, then an eighth less time a step, or 0.7 s a core for 10^12
# FLOPs; asked for is twice the cost. A GPU compiles as long and computes a hundred times faster.
CPU_WORK = 8e13  # for each thread
GPU_WORK = 1e16


@dataclass(frozen=True)
class CompileChoice:
    """on: whether to compile; why: one sentence for the user."""

    on: bool
    why: str


def choose(network: Network, training: TrainingSettings, *, ranks: int = 1) -> CompileChoice:
    """What `training.compile` means here."""
    if training.compile == "no":
        return CompileChoice(False, "blocks run eagerly: compile is no")
    driver = network.driver
    if driver is not None and not driver.compiles:
        if training.compile == "yes":
            raise SettingsError(
                f"the driver '{driver.kind}' runs blocks in pieces, which are not compiled",
                path=("training", "compile"),
                hint="set training.compile=no",
            )
        return CompileChoice(False, f"blocks run eagerly: the driver '{driver.kind}' runs them in pieces")
    if training.compile == "yes":
        return CompileChoice(True, "blocks are compiled: compile is yes")
    if ranks > 1:
        return CompileChoice(False, "blocks run eagerly: several processes share the model")
    missing = _missing(network.device)
    if missing:
        return CompileChoice(False, f"blocks run eagerly: {missing}")
    work = 6.0 * sum(p.numel() for p in network.parameters()) * training.batch * training.context * training.steps
    if work < (CPU_WORK * torch.get_num_threads() if network.device.type == "cpu" else GPU_WORK):
        return CompileChoice(False, "blocks run eagerly: the run is too short for compiling to pay")
    return CompileChoice(True, "blocks are compiled: the first step takes longer, the others less time")


def failed_to_compile(error: BaseException) -> bool:
    """Whether an exception comes from the compiler rather than from what was compiled."""
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))


def uncompile(network: Network) -> None:
    """Go back to eager blocks."""
    for stack in network.stacks():
        stack._compiled = None


def _missing(device: torch.device) -> str:
    """What the compiler would need and this machine lacks, or nothing."""
    if device.type == "cuda":
        return "" if importlib.util.find_spec("triton") else "triton is not installed"
    if device.type != "cpu":
        return f"nothing compiles for {device.type}"
    named = os.environ.get("CXX")
    if not any(shutil.which(name) for name in ([named] if named else ["g++", "clang++", "c++"])):
        return "there is no C++ compiler"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        return "the headers of Python are not installed"
    return ""
