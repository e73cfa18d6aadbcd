"""What every test shares: quiet, offline, one thread per worker, and the same numbers in any order."""

from __future__ import annotations

import os
import sys

import pytest
from hypothesis import HealthCheck, settings

# Set before anything imports PyTorch; a caller's own choice stands.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Two workers share the machine with each other, so the time of one example says nothing. CI takes
# the same examples every time; elsewhere new ones are tried.
settings.register_profile("here", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("here"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "here")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Global generators start alike in every test, whichever worker runs it and in whatever order."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(0)
