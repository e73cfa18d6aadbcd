"""One small C library for what tensors do slowly on a CPU; without a compiler the plain forms run."""

from armillary.native.library import available, library

__all__ = ["available", "library"]
