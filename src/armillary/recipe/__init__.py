"""Recipes: everything a user can ask for, in one validated tree that YAML files and overrides fill."""

from armillary.recipe.recipe import Recipe
from armillary.recipe.training import GuardSettings, OptimiserSettings, TrainingSettings

__all__ = ["GuardSettings", "OptimiserSettings", "Recipe", "TrainingSettings"]
