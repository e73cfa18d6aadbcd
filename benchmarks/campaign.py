"""Runs the long measurements, each in a process of its own; results are appended to results.jsonl.

`python benchmarks/campaign.py [name …] [--tiny] [options of that campaign]`: what was trained before is not trained
again, so an interrupted campaign goes on. --tiny only shows that everything runs: its figures mean nothing and are
not kept.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).with_name("campaigns")
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "paired")


def main() -> None:
    given = sys.argv[1:]
    first = next((place for place, word in enumerate(given) if word.startswith("--")), len(given))
    wanted, words = given[:first] or NAMES, given[first:]
    failed = []
    around = os.environ | {"PYTHONPATH": os.pathsep.join([str(FOLDER.parent), os.environ.get("PYTHONPATH", "")])}
    for name in wanted:
        if name not in NAMES:
            sys.exit(f"there is no campaign '{name}'; there are {', '.join(NAMES)}")
        if subprocess.run([sys.executable, str(FOLDER / f"{name}.py"), *words], env=around).returncode:
            failed.append(name)
    if failed:
        sys.exit(f"these did not run: {', '.join(failed)}")


if __name__ == "__main__":
    main()
