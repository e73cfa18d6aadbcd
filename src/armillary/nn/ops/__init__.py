"""Numerics that several mechanisms share: the plain form, which is the oracle, beside the fast form.

Inside `with plain_ops():` every op takes its plain form; tests and FLOP counts run there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

_plain = False


def plain() -> bool:
    """Whether ops take their plain form now."""
    return _plain


@contextlib.contextmanager
def plain_ops() -> Iterator[None]:
    """Take the plain forms inside the block."""
    global _plain
    before, _plain = _plain, True
    try:
        yield
    finally:
        _plain = before
