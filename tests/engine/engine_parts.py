"""What tests of the engine share: small networks, prompts, and when two answers are alike."""

from __future__ import annotations

import pytest

from armillary.engine.core import Engine
from armillary.engine.pace import Pace
from armillary.engine.request import Answer
from armillary.engine.sampling import Sampling
from armillary.nn.network import ModelSettings, Network, build

VOCABULARY, TOKENS = 24, 8
MARGIN = 1e-4
PROMPTS = [tuple((7 * i + 3 * row * row) % VOCABULARY for i in range(9 + 5 * row)) for row in range(3)]
ASKED = Sampling(max_new_tokens=TOKENS, temperature=0, alternatives=2)


def causal(role):  # the first example of each kind that decodes
    found = []
    for kind, settings in sorted(dict(role).items()):
        for example in settings.examples():
            place = example.place
            if place.get("order", "causal") == "causal" and not place.get("cross") and settings.capabilities.causal:
                found.append(pytest.param(example.settings, id=kind))
                break
    return found


def network_of(**settings) -> Network:
    model = ModelSettings(width=16, depth=1, vocabulary=VOCABULARY, context=64, **settings)
    return build(model, seed=5).eval()


def alike(found: Answer, expected: Answer, what: str) -> None:
    assert found.finish == expected.finish == "length"
    for one, other in zip(found.choices, expected.choices, strict=True):
        (_, best), (_, second) = other.top
        if best - second < MARGIN:
            return
        assert one.token == other.token, what
        assert one.logprob == pytest.approx(other.logprob, abs=MARGIN), what


class Pieces(Pace):
    """A few prompt tokens a step, however long they take. asked: how often the engine wanted to know."""

    size, asked = 3, 0

    def budget(self, answers: int, context: int = 0, most: int = 0) -> int:
        self.asked += 1
        return self.size


def in_pieces(engine: Engine) -> Pieces:
    """From now on the engine reads its prompts so; `asked` tells whether it did."""
    assert isinstance(engine.pace, Pace) and "budget" in vars(Pace), "a step's size is decided elsewhere"
    engine.pace = pieces = Pieces()
    return pieces
