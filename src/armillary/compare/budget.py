"""Equal budgets: what each kind means, and how a recipe is brought to it.

flops    steps = ⌊amount / (3 × declared forward FLOPs per token × tokens in an update)⌋, the forward
         cost being that of sequences of training.context tokens, the backward pass counted as two of it
time     training ends once its updates have taken that long, the first one (which may compile) and
         the reading of batches included, evaluation and saving left out; the schedule follows the clock
params   the width is moved until the parameters are within 2 % of the amount, and where the widths that
         can be built lie too far apart, the hidden features of the channel mixers too; steps as in the recipe
tokens   steps = ⌊amount / tokens in an update⌋
steps    updates
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from armillary.base.errors import ArmillaryError, InputError, SettingsError
from armillary.base.settings import parse
from armillary.base.words import amount as shown
from armillary.nn.mechanism import ChannelSettings
from armillary.nn.network import ModelSettings, build
from armillary.recipe import Recipe

Kind = Literal["flops", "seconds", "params", "tokens", "steps"]
CLOSE = 0.02  # relative difference of parameter counts that passes as equal
BACKWARD = 3  # forward and backward together, in forward passes
FORMS = "for example 2e13flops, 90s, 20min, 1.5h, 5Mparams, 3e6tokens or 500steps"

_TEXT = re.compile(r"([0-9.]+(?:[eE][-+]?[0-9]+)?)([A-Za-z]*)\Z")
_TIMES = {"s": 1.0, "sec": 1.0, "second": 1.0, "min": 60.0, "minute": 60.0, "h": 3600.0, "hour": 3600.0}
_COUNTS: dict[str, Kind] = {
    "flop": "flops",
    "param": "params",
    "parameter": "params",
    "token": "tokens",
    "step": "steps",
    "update": "steps",
}
_PREFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}


@dataclass(frozen=True)
class Budget:
    """What every variant is given: so many FLOPs, seconds, parameters, tokens or steps."""

    amount: float
    kind: Kind

    @classmethod
    def parse(cls, text: str) -> Budget:
        """'2e13flops', '20 min', '5Mparams', …; raises InputError for anything else."""
        match = _TEXT.match("".join(text.split()))
        try:
            value = float(match[1]) if match else math.nan
        except ValueError:
            value = math.nan
        if match is None or not math.isfinite(value):
            raise InputError(f"'{text}' is not a budget", hint=FORMS)
        if value <= 0:
            raise InputError(f"a budget of {text} leaves nothing to compare", hint=FORMS)
        unit = match[2]
        if not unit:
            raise InputError(f"the budget {text} has no unit", hint=FORMS)
        singular = unit[:-1] if len(unit) > 1 and unit.endswith("s") else unit
        if singular.lower() in _TIMES:
            return cls(value * _TIMES[singular.lower()], "seconds")
        for prefix, factor in _PREFIXES.items():
            kind = _COUNTS.get(singular.removeprefix(prefix).lower()) if singular.startswith(prefix) else None
            if kind is not None:
                return cls(value * factor, kind)
        raise InputError(f"the unit '{unit}' of the budget is not known", hint=FORMS)

    def __str__(self) -> str:
        if self.kind == "seconds":
            size, unit = next((s, u) for s, u in ((3600, "h"), (60, "min"), (1, "s")) if self.amount >= s or s == 1)
            return f"{self.amount / size:g} {unit}"
        name = {"flops": "FLOPs", "params": "parameters"}.get(self.kind, self.kind)
        return f"{shown(self.amount)} {name}"

    @property
    def meaning(self) -> str:
        """One sentence for a report."""
        return {
            "flops": "every variant trains for as many steps as its declared cost allows (forward FLOPs × 3)",
            "seconds": "every variant trains until its updates have taken that long; the schedule follows the clock",
            "params": "every variant has the width that gives it as many parameters, within 2 %; steps are equal",
            "tokens": "every variant reads as many tokens of text in training",
            "steps": "every variant makes as many updates of equal size",
        }[self.kind]

    def settle(self, recipe: Recipe, vocabulary: int) -> Recipe:
        """`recipe` at this budget; vocabulary: entries where the recipe leaves them to the tokenizer.

        Raises InputError where the budget is too small for one step, SettingsError where the schedule
        or the width does not fit.
        """
        training = recipe.training
        each = training.batch * training.context
        if self.kind == "seconds":
            return recipe.derive(training=training.derive(seconds=self.amount))
        if self.kind == "params":
            return recipe.derive(model=fitted(recipe.model, recipe.model.vocabulary or vocabulary, self.amount))
        if self.kind == "steps":
            if self.amount != int(self.amount):
                raise InputError(f"{self.amount} is not a number of steps")
            steps = int(self.amount)
        else:
            one = float(each)
            if self.kind == "flops":
                one *= BACKWARD * forward_flops(recipe, vocabulary)
            steps = int(self.amount / one + 1e-9)
            if steps < 1:
                name = "FLOPs" if self.kind == "flops" else "tokens"
                raise InputError(
                    f"a budget of {self} does not pay for one step, which takes {shown(one)} {name}",
                    hint="give more, or make training.batch or training.context smaller",
                )
        return recipe.derive(training=training.derive(steps=steps))


def forward_flops(recipe: Recipe, vocabulary: int) -> float:
    """Declared forward FLOPs per token at the training context."""
    model = recipe.model if recipe.model.vocabulary else recipe.model.derive(vocabulary=vocabulary)
    length = recipe.training.context
    return model.cost(model.place(), length, 2).flops / length


def parameters(model: ModelSettings, vocabulary: int) -> int:
    """How many a network with these settings has, each counted once; nothing is allocated."""
    model = model if model.vocabulary else model.derive(vocabulary=vocabulary)
    return sum(p.numel() for p in build(model, device="meta").parameters())


def fitted(model: ModelSettings, vocabulary: int, target: float) -> ModelSettings:
    """`model` at the width where it has `target` parameters; its own width where that is close enough.

    Raises SettingsError when neither a width that the mechanisms can be built at nor its channel mixers
    bring it within 2 %.
    """
    known: dict[int, int | None] = {}

    def count(width: int) -> int | None:
        if width not in known:
            try:
                known[width] = parameters(model.derive(width=width), vocabulary)
            except ArmillaryError:  # heads that do not divide this width, for example
                known[width] = None
        return known[width]

    def off(width: int) -> float:
        return abs((count(width) or math.inf) / target - 1)

    own = known[model.width] = parameters(model, vocabulary)
    if off(model.width) <= CLOSE / 4:
        return model
    width = _approached(model.width, own, target, count)
    best = min([*range(max(1, width - 24), width + 25), *known], key=off)
    if off(best) <= CLOSE:
        return model.derive(width=best)
    found = _filled(model.derive(width=best), vocabulary, target)
    held = parameters(found, vocabulary)
    if abs(held / target - 1) > CLOSE:
        raise SettingsError(
            f"no width gives {shown(target)} parameters within {CLOSE:.0%}; "
            f"the nearest is {best} ({(known[best] or 0) / target - 1:+.1%})",
            path=("model", "width"),
            hint="give another number of parameters, or another number of heads or blocks",
        )
    return found


def _filled(model: ModelSettings, vocabulary: int, target: float) -> ModelSettings:
    """The model with its channel mixers made wider or narrower, at most by half, to meet the target."""
    low, high = 0.5, 1.5
    found = model
    for _ in range(12):
        middle = (low + high) / 2
        found = parse(ModelSettings, _rescaled(model.to_data(), model.width, middle))
        held = parameters(found, vocabulary)
        if abs(held / target - 1) < CLOSE / 8:
            break
        low, high = (middle, high) if held < target else (low, middle)
    return found


def _rescaled(data: Any, width: int, factor: float) -> Any:
    """Plain data of settings with every `hidden` of a channel mixer times `factor`."""
    if isinstance(data, list):
        return [_rescaled(item, width, factor) for item in data]
    if not isinstance(data, dict):
        return data
    found = {key: _rescaled(value, width, factor) for key, value in data.items()}
    channel = found.get("channel")
    if isinstance(channel, dict) and "hidden" in channel:
        features = getattr(parse(ChannelSettings, channel), "features", None)
        hidden = channel["hidden"] or (features(width) if callable(features) else None)
        if hidden:
            found["channel"] = channel | {"hidden": max(1, round(hidden * factor))}
    return found


def _approached(width: int, held: int, target: float, count: Callable[[int], int | None]) -> int:
    """A width near the wanted one: parameters grow between linearly and quadratically with it."""
    for _ in range(16):
        ratio = target / held
        wanted = max(1, round(width * ratio ** (1 / 1.6)))
        around = sorted(range(max(1, wanted - 64), wanted + 65), key=lambda w: abs(w - wanted))
        found = next((w for w in around if count(w)), None)
        if found is None or found == width:
            return width
        width, held = found, count(found) or held
    return width
