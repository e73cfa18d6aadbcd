"""Compression: smaller models from trained ones. Pruned attention so far."""

from armillary.compress.pruning import Pruning, attention_mass, keep_largest, prune_attention

__all__ = ["Pruning", "attention_mass", "keep_largest", "prune_attention"]
