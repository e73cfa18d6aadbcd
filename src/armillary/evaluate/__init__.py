"""Held-out measurements: how well a model predicts text it was not trained on, and against what.

    from armillary.evaluate import evaluate, write_report

    result = evaluate(model, "runs/demo", baselines=True)
    print(result.bits_per_byte)

The package can be called like `evaluate` itself: where `armillary.evaluate` names the package, because
something imported it, and not the function, the call does the same.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from armillary.base.modules import callable_as

# not lazy: these functions bear their module's name, and whoever imports the module would hide them
from armillary.evaluate.baselines import Baseline, baselines, kneser_ney
from armillary.evaluate.environment import environment, peak_memory

if TYPE_CHECKING:
    from armillary.evaluate.card import write_card
    from armillary.evaluate.experts import ExpertLoad, expert_load
    from armillary.evaluate.heldout import corpus_folder
    from armillary.evaluate.intervals import Interval
    from armillary.evaluate.lengths import LengthScore, evaluate_lengths
    from armillary.evaluate.measure import Evaluation, evaluate
    from armillary.evaluate.perplexity import DocumentScore, score_documents
    from armillary.evaluate.report import write_report
    from armillary.evaluate.throughput import Throughput

_WHERE = {
    "DocumentScore": "perplexity",
    "Evaluation": "measure",
    "ExpertLoad": "experts",
    "Interval": "intervals",
    "LengthScore": "lengths",
    "Throughput": "throughput",
    "corpus_folder": "heldout",
    "evaluate": "measure",
    "evaluate_lengths": "lengths",
    "expert_load": "experts",
    "score_documents": "perplexity",
    "write_card": "card",
    "write_report": "report",
}

__all__ = [
    "Baseline",
    "DocumentScore",
    "Evaluation",
    "ExpertLoad",
    "Interval",
    "LengthScore",
    "Throughput",
    "baselines",
    "corpus_folder",
    "environment",
    "evaluate",
    "evaluate_lengths",
    "expert_load",
    "kneser_ney",
    "peak_memory",
    "score_documents",
    "write_card",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'armillary.evaluate' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"armillary.evaluate.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


callable_as(__name__, "evaluate")
