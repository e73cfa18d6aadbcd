"""What lies where in a run folder.

recipe.yaml       what was asked for
data/             the prepared corpus and the tokenizer
checkpoints/      step-000500/ and so on, each a whole model folder
metrics.jsonl     the curves
samples.jsonl     texts written on the way
ledger.jsonl      what happened, each line sealed with the hash of the one before
evaluation.json, report.html, card.md    written when the run is measured
"""

from __future__ import annotations

RECIPE, METRICS, SAMPLES, LEDGER = "recipe.yaml", "metrics.jsonl", "samples.jsonl", "ledger.jsonl"
EVALUATION, REPORT, CARD = "evaluation.json", "report.html", "card.md"
DATA, CHECKPOINTS, BOARD, LOCK = "data", "checkpoints", "tensorboard", ".lock"
FILES = (RECIPE, METRICS, SAMPLES, EVALUATION, REPORT, CARD, LEDGER)
