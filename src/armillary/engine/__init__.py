"""Generation: from a network and its state to tokens.

`Engine` answers many `Request`s at a time; `armillary.load(…).engine()` makes one.
"""

from armillary.engine.core import Engine
from armillary.engine.request import Answer, GenerationError, Piece, Request
from armillary.engine.sampling import Sampling

__all__ = ["Answer", "Engine", "GenerationError", "Piece", "Request", "Sampling"]
