"""Norms, one a file; each is computed in float32 and returned in the dtype of its input."""
