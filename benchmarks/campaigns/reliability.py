"""The server under load, faults and hostility: parts 6 to 12 of the suite, the long ones; the others are tests.

`python benchmarks/campaign.py reliability [--parts storm,soak] [--minutes 30] [--tiny] [--results FILE]`

Each part starts `armillary serve` on this machine with a small model, does its worst, and holds what it sees to
goals. `tools/reliability.py` writes docs/reliability.md from the results. Let nothing else run meanwhile: a busy
machine misses the goals that are times.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import common
from service import faults, isolation, numbers, overload, slow, soak, storm
from service.process import make_model


def main() -> None:
    parser = argparse.ArgumentParser(description="campaign reliability")
    parser.add_argument("--tiny", action="store_true", help="show that it runs; the figures mean nothing")
    parser.add_argument("--minutes", type=float, default=30.0, help="of the soak")
    parser.add_argument("--parts", default="", help="names with commas between; by default all")
    parser.add_argument("--results", type=Path, default=common.RESULTS, help="the file to append to")
    parser.add_argument("--guidellm", default="guidellm", help="the command of that tool, for its part of 'numbers'")
    asked = parser.parse_args()
    parts: dict[str, Callable[[Path, bool], Any]] = {
        "storm": storm.run,
        "slow": slow.run,
        "overload": overload.run,
        "faults": faults.run,
        "soak": partial(soak.run, minutes=asked.minutes),
        "isolation": isolation.run,
        "numbers": partial(numbers.run, guidellm=asked.guidellm),
    }
    wanted = [name for name in asked.parts.split(",") if name] or list(parts)
    for name in wanted:
        if name not in parts:
            sys.exit(f"there is no part '{name}'; there are {', '.join(parts)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to end"))  # the server that runs is ended, too
    common.RESULTS = Path(os.devnull) if asked.tiny else asked.results
    failed = []
    with tempfile.TemporaryDirectory(prefix="armillary-reliability-") as folder:
        model = make_model(Path(folder) / "tiny")
        for name in wanted:
            begun = time.monotonic()
            try:
                figures, reach = parts[name](model, asked.tiny)
            except Exception:
                traceback.print_exc()
                failed.append(name)
                continue
            common.report(f"reliability_{name}", figures, reach)
            print(f"  ({time.monotonic() - begun:.0f} s)", flush=True)
    if failed:
        sys.exit(f"these parts did not run: {', '.join(failed)}")


if __name__ == "__main__":
    main()
