"""The public conformance suite: the laws that every mechanism obeys, for ours and for your own.

    from armillary import testing

    for result in testing.check("mixer", "attention"):
        print(result.law, "holds" if result.passed else result.detail)

A mechanism is held to them by being registered; which variants are tried is said by `examples()`
and `limits()` of its settings class.
"""

from armillary.testing.cases import NotApplicable
from armillary.testing.compare import LawBroken
from armillary.testing.suite import ROLES, LawResult, check, laws_for

__all__ = ["ROLES", "LawBroken", "LawResult", "NotApplicable", "check", "laws_for"]
