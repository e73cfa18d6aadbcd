"""The engine's laws, for every registered mixer and driver: however answers are computed, they are the same.

The oracle is the engine with nothing else going on, which `test_generate.py` compares with whole passes.
Scores are compared within 1e-4; an answer whose two likeliest tokens come closer than that is compared up
to there.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from engine_parts import ASKED, MARGIN, PROMPTS, TOKENS, VOCABULARY, alike, causal, in_pieces, network_of

from armillary.engine.core import Engine
from armillary.engine.replay import Held
from armillary.engine.request import Answer, Request
from armillary.engine.sampling import Sampling
from armillary.nn.driver import drivers
from armillary.nn.mechanism import mixers
from armillary.nn.network import ModelSettings, Network, build


class Oracle:
    """Guesses that are the plain answer, every third token wrong, and sometimes no guess."""

    def __init__(self, answers: Sequence[Answer]) -> None:
        self.texts = [[*answer.request.ids, *(choice.token for choice in answer.choices)] for answer in answers]

    def propose(self, ids: Sequence[int], most: int) -> list[int]:
        text = next(text for text in self.texts if text[: len(ids)] == list(ids))
        if len(ids) % 4 == 0:
            return []
        guesses = text[len(ids) : len(ids) + min(3, most)]
        return [token if (len(ids) + at) % 3 else (token + 1) % VOCABULARY for at, token in enumerate(guesses)]


def laws(network: Network, weights: Held = "auto") -> None:
    engine_of = partial(Engine, network, weights=weights)
    requests = [Request(prompt, ASKED) for prompt in PROMPTS]
    alone = [engine_of(slots=1, keep=False).run([one])[0] for one in requests]

    together = engine_of(slots=3, keep=False).run(requests)
    for found, expected in zip(together, alone, strict=True):
        alike(found, expected, "batched against alone")

    chunked = engine_of(slots=2, keep=False)
    pieces = in_pieces(chunked)
    for found, expected in zip(chunked.run(requests), alone, strict=True):
        alike(found, expected, "in small chunks, with a place too few, against alone")
    least = sum(map(len, PROMPTS)) // pieces.size  # steps with a piece, each of which asks
    assert chunked.steps >= pieces.asked >= least

    engine = engine_of(slots=2)
    alike(engine.run([requests[2]])[0], alone[2], "keeping against not keeping")
    follow = Request((*PROMPTS[2], *(choice.token for choice in alone[2].choices), 1, 2), ASKED)
    warm, cold = engine.run([follow])[0], engine_of(slots=1, keep=False).run([follow])[0]
    assert warm.reused >= len(PROMPTS[2]) + TOKENS - 1, "a second turn computed what was there"
    assert cold.reused == 0
    alike(warm, cold, "gone on from what was kept")

    # the first makes way after a few tokens, and comes back
    engine = engine_of(slots=1)
    low = engine.submit(requests[0])
    for _ in range(4):
        engine.step()
    high = engine.submit(Request(PROMPTS[1], ASKED, priority=1))
    engine.step()
    assert low.finish is None
    assert engine.scheduler.waiting, "nobody made way"
    alike(high.wait(), alone[1], "the one that went first")
    alike(low.wait(), alone[0], "pre-empted against not")

    guessed = engine_of(slots=2, keep=False, drafter=Oracle(alone)).run(requests)
    for found, expected in zip(guessed, alone, strict=True):
        alike(found, expected, "with guesses against without")
    assert sum(one.accepted for one in guessed) > 0
    assert sum(one.drafted for one in guessed) > sum(one.accepted for one in guessed)


@pytest.mark.parametrize("mixer", causal(mixers))
def test_mixers(mixer) -> None:
    laws(network_of(block={"mixer": mixer, "channel": "gated"}))


@pytest.mark.parametrize("driver", causal(drivers))
def test_drivers(driver) -> None:
    laws(network_of(block={"mixer": {"kind": "attention", "heads": 2}, "channel": "gated"}, driver=driver))


def hybrid() -> Network:
    blocks = {
        "look": {"mixer": {"kind": "attention", "heads": 2, "position": "rope"}, "channel": "gated"},
        "near": {"mixer": {"kind": "window", "heads": 2, "window": 4, "position": "rope"}, "channel": "ffn"},
        "state": {"mixer": "retention", "channel": "gated"},
    }
    settings = ModelSettings(
        width=16, depth=3, vocabulary=VOCABULARY, context=64, blocks=blocks, pattern=["look", "near", "state"]
    )
    return build(settings, seed=2).eval()


@pytest.mark.parametrize("weights", ["auto", "plain", "bf16", "float16", "int8", "int4"])
def test_hybrid(weights: Held) -> None:
    laws(hybrid(), weights)


def test_draws_do_not_depend_on_neighbours_or_guesses() -> None:
    network = network_of(block={"mixer": {"kind": "attention", "heads": 2, "position": "rope"}, "channel": "gated"})
    drawn = Sampling(max_new_tokens=TOKENS, temperature=1.0, seed=3)
    requests = [Request(prompt, drawn) for prompt in PROMPTS]
    alone = [Engine(network, slots=1, keep=False).run([one])[0] for one in requests]
    guessed = Engine(network, slots=3, drafter=Oracle(alone)).run(requests)
    for found, expected in zip(guessed, alone, strict=True):
        assert [one.token for one in found.choices] == [one.token for one in expected.choices]
    assert sum(one.accepted for one in guessed) > 0


def test_prefix_models_read_their_prompts_whole() -> None:
    network = network_of(
        form="prefix", block={"mixer": {"kind": "attention", "heads": 2, "position": "rope"}, "channel": "gated"}
    )
    requests = [Request(prompt, ASKED) for prompt in PROMPTS]
    engine = Engine(network, slots=2)
    pieces = in_pieces(engine)
    for found in engine.run(requests):
        ids = list(found.request.ids)
        with torch.no_grad():
            side = {"prefix": torch.tensor([len(ids)])}
            for choice in found.choices:
                scores = torch.log_softmax(network(torch.tensor([ids]), side=side)[0, -1], -1)
                assert choice.token == int(scores.argmax())
                assert choice.logprob == pytest.approx(float(scores.max()), abs=MARGIN)
                ids.append(choice.token)
    assert pieces.asked


def test_encoder_decoders_answer_sources_of_any_length() -> None:
    attention = {"kind": "attention", "heads": 2}
    network = network_of(
        form="encoder_decoder",
        encoder={"depth": 1, "block": {"mixer": attention, "channel": "gated"}},
        block={"mixer": attention, "cross": attention, "channel": "gated"},
    )
    requests = [Request((1,), ASKED, source=prompt) for prompt in PROMPTS]
    for found in Engine(network, slots=2).run(requests):
        ids = [1]
        source = torch.tensor([found.request.source])
        with torch.no_grad():
            for choice in found.choices:
                scores = torch.log_softmax(network(torch.tensor([ids]), source=source)[0, -1], -1)
                assert choice.token == int(scores.argmax())
                ids.append(choice.token)
