"""Runs every benchmark, each in a process of its own, and prints the table; results are appended to results.jsonl.

`python benchmarks/run.py [name …]`
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

NAMES = sorted(
    path.stem
    for path in Path(__file__).parent.glob("*.py")
    if path.stem not in ("common", "llama", "rivals", "run", "campaign")
)


def main() -> None:
    wanted = sys.argv[1:] or NAMES
    failed = []
    for name in wanted:
        file = Path(__file__).with_name(f"{name}.py")
        if not file.is_file():
            sys.exit(f"there is no benchmark '{name}'; there are {', '.join(NAMES)}")
        if subprocess.run([sys.executable, str(file)]).returncode:
            failed.append(name)
    if failed:
        sys.exit(f"these did not run: {', '.join(failed)}")


if __name__ == "__main__":
    main()
