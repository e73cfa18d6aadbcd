"""What every test shares: quiet, offline, one thread per worker, and the same numbers in any order."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Set before anything imports PyTorch; a caller's own choice stands.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# One copy of the C library for all, also where a test has a home folder of its own.
_caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
os.environ.setdefault("ARMILLARY_CACHE", str(_caches / "armillary"))

# Two workers share the machine with each other, so the time of one example says nothing. CI takes
# the same examples every time; elsewhere new ones are tried.
settings.register_profile("here", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("here"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "here")


def pytest_configure(config: pytest.Config) -> None:
    """Where workers are started, the C library is compiled while they import: who needs it waits for it."""
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        source = str(Path(__file__).parents[1] / "src")
        command = [sys.executable, "-c", "from armillary.native import available; available()"]
        begun = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": source}, stderr=subprocess.DEVNULL)
        config.add_cleanup(begun.wait)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What tests import stays, and so do ten thousand of them: garbage is not looked for among them ever again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Global generators start alike in every test, whichever worker runs it and in whatever order."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(0)
