"""The plan of a comparison: every run's recipe, settled before anything is trained, and kept on the disk.

A comparison that is called again goes on; when what is asked for has changed, it is refused with
what differs, because runs of two different questions cannot be paired.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from armillary.base.errors import ArmillaryError, DataError, InputError, UnsupportedError
from armillary.base.files import write_atomic
from armillary.compare.budget import Budget
from armillary.compare.vary import HALF, Role, Variant, explained
from armillary.nn.describe import Description, describe
from armillary.nn.network import build
from armillary.recipe import Recipe
from armillary.train.precision import settled

PLAN, DATA, VARIANTS = "comparison.json", "data", "variants"
SCHEMA_VERSION = 1
FEWEST_SEEDS = 5  # of a claim of equal loss

Probes = Literal["none", "quick", "all"]


@dataclass(frozen=True)
class Job:
    """One run to be trained."""

    variant: Variant
    seed: int

    @property
    def recipe(self) -> Recipe:
        return self.variant.recipe.derive(seed=self.seed)

    @property
    def folder(self) -> Path:
        return Path(VARIANTS) / self.variant.folder / f"seed-{self.seed}"


@dataclass(frozen=True)
class Plan:
    """variants: with their settled recipes, the reference first; limit: documents to score, None = all."""

    name: str
    budget: Budget
    seeds: tuple[int, ...]
    variants: tuple[Variant, ...]
    probes: Probes = "quick"
    equal_loss: bool = False
    limit: int | None = None
    corpus: str = ""

    @property
    def reference(self) -> Variant:
        return self.variants[0]

    @property
    def others(self) -> tuple[Variant, ...]:
        """The variants in question: neither the reference nor a control."""
        return tuple(variant for variant in self.variants if variant.role == "variant")

    def jobs(self) -> Iterator[Job]:
        """Seed by seed, so that what is done so far is always paired, and a machine that slows down or
        speeds up does so for all variants."""
        for seed in self.seeds:
            for variant in self.variants:
                yield Job(variant, seed)

    def to_data(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            "budget": {"amount": self.budget.amount, "kind": self.budget.kind},
            "seeds": list(self.seeds),
            "probes": self.probes,
            "equal_loss": self.equal_loss,
            "limit": self.limit,
            "corpus": self.corpus,
            "variants": {
                v.name: {"role": v.role, "changes": [list(c) for c in v.changes], "recipe": v.recipe.to_data()}
                for v in self.variants
            },
        }

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Plan:
        found = []
        for name, held in data["variants"].items():
            role: Role = held["role"]
            changes = tuple((key, value) for key, value in held["changes"])
            found.append(Variant(name, Recipe.load(held["recipe"]), role, changes))
        budget = Budget(data["budget"]["amount"], data["budget"]["kind"])
        return cls(
            data["name"],
            budget,
            tuple(data["seeds"]),
            tuple(found),
            data["probes"],
            data["equal_loss"],
            data["limit"],
            data["corpus"],
        )

    @classmethod
    def read(cls, folder: Path) -> Plan | None:
        """The plan that a folder was begun with; None when it was not begun."""
        path = folder / PLAN
        if not path.is_file():
            return None
        try:
            data = json.loads(path.read_bytes())
            if data["schema_version"] != SCHEMA_VERSION:
                raise DataError(f"this plan has version {data['schema_version']}", where=str(path))
            return cls.of(data)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"the plan of this comparison is damaged ({error})", where=str(path)) from None

    def begin(self, folder: Path) -> None:
        """Make the folder this plan's own; InputError when it is another plan's or holds other things."""
        old = Plan.read(folder)
        if old is None:
            held = sorted(item.name for item in folder.iterdir()) if folder.is_dir() else []
            if set(held) - {DATA, ".lock"}:
                raise InputError(
                    "this folder holds other things and is not a comparison", where=str(folder), hint="name another"
                )
            write_atomic(folder / PLAN, json.dumps(self.to_data(), indent=1) + "\n")
            return
        changed = list(_differences(old.to_data(), self.to_data()))
        if changed:
            more = f"\n  … and {len(changed) - 6} more" if len(changed) > 6 else ""
            raise InputError(
                "this comparison was begun with other settings:\n  " + "\n  ".join(changed[:6]) + more,
                where=str(folder),
                hint="ask as before to go on, or name another folder with --run",
            )


def settle(
    found: list[Variant],
    budget: Budget,
    seeds: int,
    *,
    vocabulary: int,
    probes: Probes = "quick",
    equal_loss: bool = False,
    limit: int | None = None,
    corpus: str = "",
) -> Plan:
    """Bring every variant to the budget and make sure that it can be built, trained and measured.

    vocabulary: entries where the recipe leaves them to the tokenizer. Raises an ArmillaryError that
    names the variant.
    """
    base = found[0].recipe
    if seeds < 1:
        raise InputError(
            f"{seeds} seeds train nothing", hint="give at least 1, and at least 2 for intervals over seeds"
        )
    if equal_loss and seeds < FEWEST_SEEDS:
        raise InputError(
            f"equal loss cannot be shown with {seeds} seeds",
            hint=f"give at least {FEWEST_SEEDS}: --seeds {FEWEST_SEEDS}",
        )
    if probes not in ("none", "quick", "all"):
        raise InputError(f"there are no probes called '{probes}'", hint="none, quick or all")
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}", hint="score at least 1 document, or leave it out")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UnsupportedError("a comparison runs in one process", hint="start it without torchrun")
    settled = []
    for variant in found:
        try:
            recipe = _trimmed(budget.settle(variant.recipe, vocabulary))
            check(recipe, vocabulary)
        except Exception as error:
            raise explained(variant.name, error) from (None if isinstance(error, ArmillaryError) else error)
        settled.append(Variant(variant.name, recipe, variant.role, variant.changes))
    if equal_loss:
        settled.append(_control(settled[0].recipe, vocabulary))
    first = base.seed
    numbers = tuple(range(first, first + seeds))
    return Plan(base.name, budget, numbers, tuple(settled), probes, equal_loss, limit, corpus)


def check(recipe: Recipe, vocabulary: int) -> Description:
    """Build the model without storage and pass tokens through it as training and decoding will."""
    model, training = recipe.model, settled(recipe.training)
    if model.form not in ("decoder", "prefix"):
        raise UnsupportedError(
            f"a network of the form '{model.form}' does not predict a text token by token",
            hint="comparisons measure held-out bits per byte: use form: decoder",
        )
    if model.vocabulary is None:
        model = model.derive(vocabulary=vocabulary)
    rows = training.micro_batch or training.batch
    found = describe(model, length=training.context, batch=rows, bf16=training.precision == "bf16")
    if model.form == "decoder":
        network = build(model, device="meta").eval()
        with torch.no_grad():
            state = network.init_state(1, 4)
            ids = torch.zeros(1, 3, dtype=torch.int64, device="meta")
            network.extend(ids, state)
            if recipe.data.isolate:
                network.hidden(ids, documents=torch.zeros_like(ids))
    return found


def _trimmed(recipe: Recipe) -> Recipe:
    """Without what a comparison has no use for: sample texts on the way, old checkpoints."""
    return recipe.derive(training=recipe.training.derive(keep=1, samples_every=None, tensorboard=False))


def _control(reference: Recipe, vocabulary: int) -> Variant:
    """The reference at half its width and as many tokens: what a real loss of capacity costs here."""
    width = reference.model.width // 2
    try:
        recipe = reference.derive(model=reference.model.derive(width=width))
        check(recipe, vocabulary)
    except Exception as error:
        raise explained(HALF, error) from (None if isinstance(error, ArmillaryError) else error)
    return Variant(HALF, recipe, "control", (("model.width", str(width)),))


def _differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """'seeds: 3 → 5' for every leaf that differs."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in [*old, *(key for key in new if key not in old)]:
            inner = f"{path}.{key}" if path else str(key)
            yield from _differences(old.get(key), new.get(key), inner)
    elif old != new:
        yield f"{path}: {_short(old)} → {_short(new)}"


def _short(value: Any) -> str:
    if value is None:
        return "not there"
    if isinstance(value, Mapping):
        return "there"
    return str(value) if len(str(value)) < 60 else f"{str(value)[:57]}…"
