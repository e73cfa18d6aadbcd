"""One server for the tests of a file."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from server_parts import KEYS, Served, hosted

from armillary.server import Door, Server


@pytest.fixture(scope="module")
def served():
    running = Served(Server([hosted()], Door(KEYS)))
    yield running
    running.close()
