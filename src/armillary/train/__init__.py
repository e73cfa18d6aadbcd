"""Training: one update (`Trainer`), a whole run in a folder (`train`, `resume`), and what a run tells; a layer
whose training provably ends at the optimum (`convex_attention`)."""

from armillary.base.modules import callable_as
from armillary.train.convex import ConvexAttention, convex_attention
from armillary.train.ledger import Ledger
from armillary.train.progress import (
    Evaluated,
    Event,
    Finished,
    Line,
    Notice,
    Preparing,
    Progress,
    Sampled,
    Saved,
    Started,
    Stepped,
)
from armillary.train.run import Run, resume, train
from armillary.train.trainer import Trainer, Update

__all__ = [
    "ConvexAttention",
    "Event",
    "Evaluated",
    "Finished",
    "Ledger",
    "Line",
    "Notice",
    "Preparing",
    "Progress",
    "Run",
    "Sampled",
    "Saved",
    "Started",
    "Stepped",
    "Trainer",
    "Update",
    "convex_attention",
    "resume",
    "train",
]

callable_as(__name__, "train")
