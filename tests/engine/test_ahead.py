"""Answers that nobody looks at before they are complete: several steps are made in one native call. Expected values:
the same answers, step by step."""

from __future__ import annotations

import dataclasses
import time
from array import array

import pytest
import torch

from armillary.engine import Engine, Request, Sampling
from armillary.engine.choosing import Choosers
from armillary.engine.request import Answer
from armillary.native import available
from armillary.nn.network import ModelSettings, build
from armillary.text import TokenizerSettings, train_tokenizer

pytestmark = pytest.mark.skipif(not available(), reason="there is no C compiler here")

MIXERS = {
    "attention": {"kind": "attention", "heads": 2, "position": "rope"},
    "window": {"kind": "window", "heads": 2, "position": "rope", "window": 6},
    "retention": {"kind": "retention", "heads": 2},
}
PROMPT = (3, 1, 4, 1, 5, 9, 2, 6)


def network_of(mixer: str = "attention", vocabulary: int = 24):
    block = {"mixer": MIXERS[mixer], "channel": "gated"}
    settings = ModelSettings(width=16, depth=2, vocabulary=vocabulary, context=200, block=block, head={"tied": False})
    return build(settings, seed=5).eval()


class Text:
    """A tokenizer of ends alone."""

    ends = (7,)

    def __init__(self) -> None:
        self._whole = train_tokenizer(TokenizerSettings(kind="byte"), [])

    def stream(self):
        return self._whole.stream()


def counted(engine: Engine) -> list[int]:
    """Steps of each native call."""
    steps, inner = list[int](), engine.slots.go_on_together

    def go_on(*given):
        found = inner(*given)
        steps.append(0 if found is None else max(map(len, found)))
        return found

    engine.slots.go_on_together = go_on
    return steps


def answered(network, requests: list[Request], whole: bool, **options) -> tuple[list[Answer], list[int]]:
    engine = Engine(network, keep=False, **options)
    steps = counted(engine)
    found = [engine.submit(dataclasses.replace(request, whole=whole)) for request in requests]
    while engine.step():
        pass
    assert engine.memory.held == 0 and engine.failures == 0, "nothing outside the answers failed"
    return found, steps


def same(found: list[Answer], expected: list[Answer]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one.finish, one.error, one.text) == (other.finish, other.error, other.text)
        assert one.choices == other.choices


@pytest.mark.parametrize("mixer", MIXERS)
def test_tokens_are_the_same(mixer: str) -> None:
    """With every way to ask, more answers than places, and ends by length."""
    asked = [
        Sampling(max_new_tokens=90, temperature=0, logit_bias={7: -50.0}),
        Sampling(max_new_tokens=70, temperature=1.0, seed=3, top_k=9),
        Sampling(max_new_tokens=33, temperature=0.7, seed=4, top_p=0.9, min_new_tokens=20, logit_bias={7: 1.5}),
        Sampling(max_new_tokens=50, temperature=1.3, seed=5, min_p=0.02, target_new_tokens=30),
        Sampling(max_new_tokens=41, temperature=0.9, seed=6, repetition_penalty=1.2),
        Sampling(max_new_tokens=41, temperature=0.9, seed=7, frequency_penalty=0.5, alternatives=3),
    ]
    requests = [Request(PROMPT[row:], sampling) for row, sampling in enumerate(asked)]
    for chosen in (requests[:4], requests):
        expected, single = answered(network_of(mixer), chosen, False, slots=3, tokenizer=Text())
        found, steps = answered(network_of(mixer), chosen, True, slots=3, tokenizer=Text())
        same(found, expected)
        assert max(single) == 1
        assert len(steps) < len(single) and sum(steps) == sum(single)
    assert {one.finish for one in found} == {"end", "length"}


def test_many_steps_are_made_at_once() -> None:
    _, steps = answered(network_of(), [Request(PROMPT, Sampling(max_new_tokens=130, temperature=0))], True)
    assert len(steps) <= 4


def test_every_token_counts_as_served() -> None:
    """Whose turn it is goes by it."""
    served = []
    for whole in (False, True):
        engine = Engine(network_of(), keep=False)
        steps = counted(engine)
        for row, key in enumerate("aba"):
            asked = Sampling(max_new_tokens=40 + row, temperature=0)
            engine.submit(Request(PROMPT[row:], asked, key=key, whole=whole))
        while engine.step():
            pass
        served.append(engine.scheduler.served)
    assert served[0] == served[1] and max(steps) > 1


def test_one_that_is_looked_at_keeps_the_others_at_its_pace() -> None:
    engine = Engine(network_of(), keep=False)
    steps = counted(engine)
    asked = Sampling(max_new_tokens=40, temperature=0)
    engine.submit(Request(PROMPT, asked, whole=True))
    shown = list[int]()
    watched = engine.submit(Request(PROMPT[1:], asked), lambda piece: shown.append(len(piece.choices)))
    watched.wait()
    assert shown == [1] * 40 and max(steps) == 1


def test_what_comes_behind_a_text_that_ends_is_not_given() -> None:
    network = network_of(vocabulary=train_tokenizer(TokenizerSettings(kind="byte"), []).size)
    tokenizer = train_tokenizer(TokenizerSettings(kind="byte"), [])
    free, _ = answered(
        network, [Request(PROMPT, Sampling(max_new_tokens=60, temperature=0))], False, tokenizer=tokenizer
    )
    ascii_ = [character for character in free[0].text[5:] if character.isascii()]
    assert ascii_
    request = Request(PROMPT, Sampling(max_new_tokens=60, temperature=0, stop=[ascii_[0]]))
    expected, _ = answered(network, [request], False, tokenizer=tokenizer)
    found, steps = answered(network, [request], True, tokenizer=tokenizer)
    same(found, expected)
    assert found[0].finish == "stop" and max(steps) <= 4


@pytest.mark.parametrize("happens", ["another comes", "it leaves", "all ends"])
def test_nobody_waits_for_more_than_a_step(happens: str) -> None:
    """While steps are made, another thread asks, cancels or closes: here it does so before the first of them."""
    engine = Engine(network_of(), keep=False)
    steps = counted(engine)
    asked = Sampling(max_new_tokens=120, temperature=0)
    answer = engine.submit(Request(PROMPT, asked, whole=True))
    engine.step()
    inner, meanwhile = (
        engine.slots.go_on_together,
        {
            "another comes": lambda: engine.submit(Request(PROMPT[1:], asked, whole=True)),
            "it leaves": answer.cancel,
            "all ends": engine.close,
        },
    )

    def interrupted(*given):
        engine.slots.go_on_together = inner
        meanwhile[happens]()
        return inner(*given)

    engine.slots.go_on_together = interrupted
    before = len(answer.choices)
    engine.step()
    assert steps[-1] == 1 and len(answer.choices) <= before + 1
    while engine.step():
        pass
    assert (max(steps) > 1) == (happens == "another comes")


def test_a_deadline_ends_the_steps() -> None:
    network = network_of()
    whole = Engine(network, keep=False)
    left = list[float]()
    inner = whole.slots.go_on_together
    whole.slots.go_on_together = lambda *given: left.append(given[4]) or inner(*given)
    timed = whole.submit(Request(PROMPT, Sampling(max_new_tokens=120, temperature=0), whole=True, timeout=0.05))
    began = time.monotonic()
    while whole.step():
        pass
    assert left and max(left) <= 0.05 + began - timed.submitted


def test_one_that_fails_takes_nobody_along() -> None:
    """From the token on whose embedding is no number, its scores are none; that of the other never comes to it."""
    network = network_of()
    requests = [Request(PROMPT[row:], Sampling(max_new_tokens=60, temperature=1.0, seed=row)) for row in range(2)]
    free, _ = answered(network, requests, False)
    one, other = ([choice.token for choice in answer.choices] for answer in free)
    token = next(token for token in one[10:] if token not in (*other, *one[:10], *PROMPT))
    with torch.no_grad():
        network.embed.weight[token] = torch.nan
    expected, _ = answered(network, requests, False)
    found, steps = answered(network, requests, True)
    same(found, expected)
    assert found[0].finish == "error" and 10 < len(found[0].choices) < 60
    assert found[1].finish == "length" and max(steps) > 4


def test_the_native_call_ends_when_it_is_told() -> None:
    """After so many lines of draws; after no time, in the first step; and when others say so."""
    network = network_of()

    def made(seconds: float, halted: int) -> int:
        engine = Engine(network, keep=False)
        answer = engine.submit(Request(PROMPT, Sampling(max_new_tokens=100, temperature=0), whole=True))
        while not answer.choices:
            engine.step()
        (run,) = engine._runs.values()
        ids, halt = [run.ids[-1]], array("q", [halted])
        found = engine.slots.go_on_together([run.progress.slot], ids, Choosers([run.chooser]), 20, seconds, halt)
        assert found is not None
        return len(found[0])

    assert (made(10.0, 0), made(0.0, 0), made(10.0, 1)) == (20, 1, 1)
