"""Comparisons: variants of a recipe raced at equal budget, measured, and told apart as far as the runs allow.

    import armillary as arm

    found = arm.compare("quick", ["model.block.mixer=retention"], "2e13flops", seeds=5)
    print(*found.conclusion, sep="\\n")

The package can be called like `compare` itself (docs/decisions/0007).
"""

from armillary.base.modules import callable_as
from armillary.compare.budget import Budget
from armillary.compare.events import Compared, Failed, Measured, Planned, Probed, Progress, Working
from armillary.compare.run import Comparison, compare

__all__ = [
    "Budget",
    "Compared",
    "Comparison",
    "Failed",
    "Measured",
    "Planned",
    "Probed",
    "Progress",
    "Working",
    "compare",
]

callable_as(__name__, "compare")
