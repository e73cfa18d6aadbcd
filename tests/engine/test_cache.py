"""Answers with bounded and with 8-bit keys and values: the engine's laws, as far as they hold for such."""

from __future__ import annotations

from dataclasses import replace

import pytest
from engine_parts import PROMPTS, in_pieces

from armillary.base.errors import InputError
from armillary.engine.core import Engine
from armillary.engine.drafts import PromptLookup
from armillary.engine.request import Request
from armillary.engine.sampling import Sampling
from armillary.model import Model
from armillary.nn.cache import HeavyHitters, Int8, Salient, Sinks
from armillary.nn.network import ModelSettings, build
from armillary.text import TokenizerSettings, train_tokenizer

TOKENIZER = train_tokenizer(TokenizerSettings(kind="byte"), [])
REQUESTS = [Request(prompt, Sampling(max_new_tokens=10, temperature=0)) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def network():
    mixer = {"kind": "attention", "heads": 2, "position": "rope"}
    block = {"mixer": mixer, "channel": "gated"}
    return build(ModelSettings(width=64, depth=2, vocabulary=TOKENIZER.size, context=64, block=block), seed=5).eval()


def tokens(answers) -> list[list[int]]:
    return [[choice.token for choice in answer.choices] for answer in answers]


def scores(answers) -> list[list[float]]:
    return [[choice.logprob for choice in answer.choices] for answer in answers]


@pytest.mark.parametrize("policy", [Sinks(8), HeavyHitters(8), Salient(8)], ids=lambda one: type(one).__name__)
def test_what_is_dropped_does_not_depend_on_neighbours(network, policy) -> None:
    alone = [Engine(network, TOKENIZER, slots=1, cache=policy).run([one])[0] for one in REQUESTS]
    engine = Engine(network, TOKENIZER, slots=2, cache=policy)
    for _ in range(2):  # the second time nothing is gone on from
        together = engine.run(REQUESTS)
        assert tokens(together) == tokens(alone)
        for found, expected in zip(scores(together), scores(alone), strict=True):
            assert found == pytest.approx(expected, abs=1e-4)
        assert all(one.reused == 0 for one in together)
    assert engine.recall.prefixes.nbytes == 0
    hurried = Engine(network, TOKENIZER, slots=1, cache=policy)
    pieces = in_pieces(hurried)
    low = hurried.submit(REQUESTS[0])
    for _ in range(5):
        hurried.step()
    high = hurried.submit(replace(REQUESTS[2], priority=1))
    hurried.step()
    assert hurried.scheduler.waiting, "nobody made way"
    for found, expected in ((high, alone[2]), (low, alone[0])):
        assert scores([found.wait()])[0] == pytest.approx(scores([expected])[0], abs=1e-4)
    assert hurried.steps >= pieces.asked > 0
    whole = Engine(network, TOKENIZER).run(REQUESTS)
    assert any(
        abs(a - b) > 1e-4 for x, y in zip(scores(whole), scores(alone), strict=True) for a, b in zip(x, y, strict=True)
    )
    wide = Engine(network, TOKENIZER, cache=type(policy)(40)).run(REQUESTS)
    assert tokens(wide) == tokens(whole)


def test_eight_bits_are_shared_and_guessed_like_others(network) -> None:
    plain = Engine(network, TOKENIZER, kv="int8", keep=False)
    expected = plain.run(REQUESTS)
    engine = Engine(network, TOKENIZER, kv="int8", drafter=PromptLookup(shortest=1))
    for _ in range(2):
        found = engine.run(REQUESTS)
        assert tokens(found) == tokens(expected)
    assert all(one.reused > 0 for one in found)
    assert engine.slots.divisible
    assert 3.5 * plain.slots.each < Engine(network, TOKENIZER).slots.each
    assert plain.memory.total < Engine(network, TOKENIZER, keep=False).memory.total / 3.5


def test_a_model_takes_a_cache(network) -> None:
    model = Model(network, TOKENIZER)
    asked = {"max_new_tokens": 6, "temperature": 0}
    assert model.generate("abcdefgh", cache=Sinks(40), **asked).ids == model.generate("abcdefgh", **asked).ids
    assert model.init_state(1, cache=HeavyHitters(8)).nbytes < model.init_state(1, 64).nbytes / 4


def test_refusals(network) -> None:
    with pytest.raises(InputError, match="guesses"):
        Engine(network, TOKENIZER, cache=Sinks(8), drafter=PromptLookup())
    with pytest.raises(InputError, match="beside a cache"):
        Engine(network, TOKENIZER, cache=Int8(), kv="int8")
    with pytest.raises(InputError, match="int4"):
        Engine(network, TOKENIZER, kv="int4")
