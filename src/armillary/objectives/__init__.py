"""Objectives, one a file: what a network is asked to predict, and the loss.

An objective is a batch transform (inputs, targets, weights, mask) and `loss`, which may run the
network several times. It returns sums and weights; only the trainer takes means.
"""

from armillary.objectives.base import Loss, Objective, ObjectiveSettings, Prepared, objectives

__all__ = ["Loss", "Objective", "ObjectiveSettings", "Prepared", "objectives"]
