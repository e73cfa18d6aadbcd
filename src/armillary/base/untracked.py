"""Values that the collector of reference cycles need not visit.

Python visits every tuple that is made and stays, again and again, in case it is part of a cycle. Where thousands of
small ones are made between other work, memory has to be fetched for each: several milliseconds at a time.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any


def _untrack() -> Callable[[Any], Any]:
    if sys.implementation.name != "cpython" or not hasattr(ctypes, "pythonapi"):
        return lambda value: None
    found = ctypes.PyDLL(None).PyObject_GC_UnTrack  # an object of its own: its types are nobody else's
    found.argtypes, found.restype = [ctypes.py_object], None
    return found


untrack = _untrack()
"""Take a value that can never be part of a cycle (a tuple of numbers and texts, say) from the collector's list. It
goes, as ever, when nobody holds it."""
