"""Compression: smaller models from trained ones. Attention pruned by data, attention only where required, and
experts out of dense weights."""

from armillary.compress.clusters import balanced_clusters
from armillary.compress.emergent import Splitting, merge_experts, pick, split_experts
from armillary.compress.pruning import Pruning, attention_mass, keep_largest, prune_attention
from armillary.compress.search import found_model, found_order, found_recipe

__all__ = [
    "Pruning",
    "Splitting",
    "attention_mass",
    "balanced_clusters",
    "found_model",
    "found_order",
    "found_recipe",
    "keep_largest",
    "merge_experts",
    "pick",
    "prune_attention",
    "split_experts",
]
