"""How long `import armillary` and `armillary --help` take, beyond nothing and as whole processes."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from common import report


def seconds(command: list[str], repeats: int = 9) -> float:
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def main() -> None:
    bare = seconds([sys.executable, "-c", "pass"])
    report(
        "startup",
        {
            "bare interpreter s": bare,
            "armillary --help s": seconds([sys.executable, "-m", "armillary", "--help"]),
            "import armillary s": seconds([sys.executable, "-c", "import armillary"]) - bare,
        },
        {"armillary --help s": (0.3, "max"), "import armillary s": (0.1, "max")},
    )


if __name__ == "__main__":
    main()
