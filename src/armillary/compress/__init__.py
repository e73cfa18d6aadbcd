"""Compression: smaller models from trained ones. Attention pruned by data, and attention only where required."""

from armillary.compress.pruning import Pruning, attention_mass, keep_largest, prune_attention
from armillary.compress.search import found_model, found_order, found_recipe

__all__ = [
    "Pruning",
    "attention_mass",
    "found_model",
    "found_order",
    "found_recipe",
    "keep_largest",
    "prune_attention",
]
