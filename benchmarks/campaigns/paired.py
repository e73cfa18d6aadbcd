"""What campaigns share: text, small models trained once and kept, paired differences and their verdict.

Every arm of a seed sees the same batches from the same start. A claim of equal loss holds when the
95 % interval of the mean difference lies within ±1 % of the reference's held-out bits per byte, at a
budget where a reference of half the width is more than 2 % worse.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import common
from armillary.compare.statistics import percent_apart

ROOT = Path(__file__).resolve().parents[2]
SETS = {"novels_en": ("train-00*",), "textbooks": ("train*",), "tech_docs": ("train*",)}


@dataclass(frozen=True)
class Budget:
    """What a campaign spends on each run."""

    width: int = 128
    depth: int = 4
    context: int = 1024
    batch: int = 4
    steps: int = 200
    rate: float = 3e-3
    vocabulary: int = 2048
    windows: int = 64  # of held-out text
    seeds: int = 5
    head: int = 32  # features per head
    precision: str = "float32"  # of activations in training


TINY = {"width": 32, "depth": 2, "context": 64, "steps": 3, "windows": 4, "seeds": 2, "head": 8, "vocabulary": 512}


def begin(name: str, budget: Budget, kind: type[Campaign] | None = None, **tiny: Any) -> Campaign:
    """The campaign that the command line asks for; kind: one with text of its own."""
    parser = argparse.ArgumentParser(description=f"campaign {name}")
    parser.add_argument("--tiny", action="store_true", help="show that it runs; the figures mean nothing")
    asked = parser.parse_args()
    if asked.tiny:
        budget = replace(budget, **TINY | tiny)
    return (kind or Campaign)(name, budget, asked.tiny)


def texts(*names: str) -> Path:
    """The folder of data sets, by default all of `SETS`, beside the checkout or above it."""
    names = names or tuple(SETS)
    for place in (ROOT, *ROOT.parents):
        folder = place / "shared" / "data"
        if all((folder / name).is_dir() for name in names):
            return folder
    raise SystemExit(f"the campaign needs {', '.join(names)} in ../shared/data beside the checkout, which is not there")


class Campaign:
    """Trains arms and compares them; trained models are kept in runs/campaigns."""

    def __init__(self, name: str, budget: Budget, tiny: bool) -> None:
        self.name, self.budget, self.tiny = name, budget, tiny
        self.folder = ROOT / "runs" / "campaigns" / (f"{name}-tiny" if tiny else name)
        self.trained = self.folder.parent / "trained"  # an arm that several campaigns ask for is trained once
        for folder in (self.folder, self.trained):
            folder.mkdir(parents=True, exist_ok=True)
        self.corpus = self._corpus()
        if tiny:
            common.RESULTS = self.folder / "figures.jsonl"

    def _corpus(self) -> Any:
        """train* files to learn from, valid* files held out; no test file is ever read."""
        from armillary.data.prepare import prepare
        from armillary.data.settings import DataSettings, SourceSettings
        from armillary.text import TokenizerSettings

        folder, sources = texts(), []
        for name, patterns in SETS.items():
            if self.tiny and name != "textbooks":  # the smallest
                continue
            path = str(folder / name)
            sources.append(SourceSettings(path=path, include=patterns, split="train"))
            sources.append(SourceSettings(path=path, include=("valid*",), split="heldout"))
        size = self.budget.vocabulary
        self.data = DataSettings(sources=tuple(sources), heldout=0.0, tokenizer_sample=2**22)
        place = ROOT / "runs" / "campaigns" / f"corpus-{size}{'-tiny' if self.tiny else ''}"
        return prepare(self.data, TokenizerSettings(kind="bpe", size=size), place)

    # -- arms

    def model(self, mixer: dict[str, Any] | None = None, *, width: int | None = None, **changes: Any) -> dict[str, Any]:
        """A decoder as plain data: attention with rotary positions, or `mixer` with as many heads."""
        width = width or self.budget.width
        heads = {"heads": max(1, width // self.budget.head)}
        return {
            "width": width,
            "depth": self.budget.depth,
            "vocabulary": self.corpus.tokenizer.size,
            "context": self.budget.context,
            "block": {
                "mixer": heads | (mixer or {"kind": "attention", "position": "rope"}),
                "channel": {"kind": "gated"},
            },
        } | changes

    def half(self) -> dict[str, Any]:
        """The reference at half its width: what the budget must be able to tell apart."""
        return self.model(width=self.budget.width // 2)

    def train(self, arm: str, seed: int, model: dict[str, Any], rate: float | None = None) -> Any:
        """The network of an arm, trained now or before; rate: by default the budget's."""
        from armillary.base.settings import parse
        from armillary.checkpoints import load, save
        from armillary.nn.network import ModelSettings, build
        from armillary.objectives.base import Vocabulary
        from armillary.recipe.training import TrainingSettings
        from armillary.train import Trainer

        spent = self.budget
        training = {
            "context": spent.context,
            "batch": spent.batch,
            "steps": spent.steps,
            "precision": spent.precision,
            "compile": "no",
            "optimiser": {"learning_rate": rate or spent.rate},
            "schedule": {"kind": "cosine", "warmup": spent.steps // 10},
        }
        said = json.dumps([model, training, self.corpus.fingerprint], sort_keys=True)
        place = self.trained / f"{arm}-{seed}-{hashlib.sha256(said.encode()).hexdigest()[:10]}"
        if place.exists():
            return load(place, device="cpu", dtype="float32").network.eval()
        start = time.perf_counter()
        network = build(parse(ModelSettings, model), seed=seed)
        vocabulary = Vocabulary(self.corpus.tokenizer.size)
        trainer = Trainer(network, parse(TrainingSettings, training), vocabulary=vocabulary, seed=seed)
        loader = self.corpus.loader(self.data, context=spent.context, batch=spent.batch, seed=seed)
        loss = math.nan
        for step in range(spent.steps):
            loss = trainer.step(loader.batch(step))
        network.eval()
        save(place, network)
        print(f"  {arm} {seed}: {loss:.3f} nats after {time.perf_counter() - start:.0f} s", flush=True)
        return network

    # -- measures

    def rows(self, split: str, count: int) -> list[Tensor]:
        """Windows of context + 1 tokens, spread evenly over one side of the corpus, in batches."""
        import numpy as np

        store = self.corpus.heldout if split == "heldout" else self.corpus.train
        size = self.budget.context + 1
        starts = np.unique(np.linspace(0, store.tokens - size, count).astype(np.int64))
        ids = np.stack([np.asarray(store.read(int(start), int(start) + size), np.int64) for start in starts])
        return list(torch.from_numpy(ids).split(4))

    def bits(self, network: Any) -> float:
        """Held-out bits per byte."""
        nats, tokens = 0.0, 0
        with torch.no_grad():
            for ids in self.rows("heldout", self.budget.windows):
                found = network.token_nll(network.hidden(ids[:, :-1]), ids[:, 1:])
                nats, tokens = nats + float(found.double().sum()), tokens + found.numel()
        store = self.corpus.heldout
        return nats / tokens / math.log(2) * store.tokens / float(store.document_bytes.sum())

    def seeds(self) -> range:
        return range(1, self.budget.seeds + 1)

    # -- verdict

    def report(self, claim: dict[str, float], bits: dict[str, list[float]], reach: dict[str, float]) -> None:
        """Figures of every arm against `reference`; `claim` figures must be at least as in `reach`.

        bits: held-out bits per byte of each arm, one for each seed in order; `candidate` is what is claimed for.
        """
        figures: dict[str, Any] = dict(claim)
        base = statistics.mean(bits["reference"])
        figures["reference, bits per byte"] = base
        for arm, found in bits.items():
            if arm == "reference":
                continue
            apart = percent_apart(found, bits["reference"])
            figures[f"{arm}: difference %"] = apart.value
            figures[f"{arm}: difference %, low"] = apart.low
            figures[f"{arm}: difference %, high"] = apart.high
        goals: dict[str, tuple[float, str]] = {key: (value, "min") for key, value in reach.items()}
        goals["candidate: difference %, low"] = (-1.0, "min")
        goals["candidate: difference %, high"] = (1.0, "max")
        goals["half width: difference %"] = (2.0, "min")
        self.record(figures, goals, bits, "reference")

    def record(
        self,
        figures: dict[str, Any],
        goals: dict[str, tuple[float, str]],
        bits: dict[str, list[float]] | None = None,
        base: str = "",
    ) -> None:
        """Print and keep; base: the arm that the others are compared with in the drawing."""
        about = sys.modules["__main__"].__doc__ or ""
        more = {"about": about, "budget": vars(self.budget), "arms": bits or {}, "base": base}
        common.report(f"campaign_{self.name}", figures, goals, **more)
