"""Held-out measurements: how well a model predicts text it was not trained on, and against what."""
