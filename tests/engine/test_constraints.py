"""Constrained answers: always valid, whatever the model says; hostile grammars end as errors, in time.

Validity is judged by Python's `json` and `re`. The hostile inputs are those that break peers' servers.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import time

import pytest
import torch

from armillary.base.errors import InputError
from armillary.engine import constraints
from armillary.engine.constraints import Grammars
from armillary.engine.core import Engine
from armillary.engine.guesses import Guesses
from armillary.engine.request import GenerationError, Request
from armillary.engine.sampling import Sampling
from armillary.nn.network import ModelSettings, build
from armillary.text import TokenizerSettings, train_tokenizer

pytest.importorskip("llguidance")
TOKENIZER = train_tokenizer(TokenizerSettings(kind="byte"), [])
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "kind": {"enum": ["cat", "dog"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "kind", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def grammars():
    made = Grammars(TOKENIZER)
    yield made
    made.close()


@pytest.fixture(scope="module")
def engine():
    settings = ModelSettings(width=16, depth=1, vocabulary=TOKENIZER.size + 3, context=256)
    return Engine(build(settings, seed=1).eval(), TOKENIZER, slots=4)


def asked(constraint, seed: int) -> Request:
    return Request((1, 2, 3), Sampling(max_new_tokens=120, temperature=1.5, seed=seed), steps=(constraint,))


def test_json_follows_its_schema(engine) -> None:
    grammars = Grammars(TOKENIZER, TOKENIZER.size + 3)
    answers = engine.run([asked(grammars.constraint("json_schema", SCHEMA), seed) for seed in range(6)])
    grammars.close()
    for answer in answers:
        assert answer.finish == "end"
        found = json.loads(answer.text)
        assert set(found) == {"name", "kind", "age"}
        assert len(found["name"]) <= 6
        assert found["kind"] in ("cat", "dog")
        assert 0 <= found["age"] <= 99


def test_patterns_and_guesses(engine, grammars) -> None:
    """Guesses that break the pattern change nothing."""

    pattern = r"\[[0-9]{3}\]( [a-z]+){2}!"
    plain = engine.run([asked(grammars.constraint("regex", pattern), seed) for seed in range(3)])

    class Half:
        """The plain answer's next tokens, and one that no digit, letter or bracket is."""

        def propose(self, ids, most):
            texts = [[*one.request.ids, *(choice.token for choice in one.choices)] for one in plain]
            text = next(text for text in texts if text[: len(ids)] == list(ids))
            return [*text[len(ids) : len(ids) + 2], ord("#")][:most]

    engine.guesses = Guesses(Half())
    guessed = engine.run([asked(grammars.constraint("regex", pattern), seed) for seed in range(3)])
    engine.guesses = None
    for one, other in zip(plain, guessed, strict=True):
        assert re.fullmatch(pattern, one.text) or one.finish == "length"
        assert one.text == other.text
    assert sum(one.accepted for one in guessed) > 0


@pytest.mark.parametrize("mixer", ["attention", "retention"])
@pytest.mark.parametrize("most", [120, 20, 9])
def test_what_can_only_go_on_in_one_way_is_read_in_one_piece(mixer, most, monkeypatch) -> None:
    """By fewer steps, and nothing else is different: tokens, draws, ends, log-probabilities and what is kept; beside
    an answer that nothing binds."""
    block = {"mixer": {"kind": mixer}, "channel": "gated"}
    settings = ModelSettings(width=16, depth=2, vocabulary=TOKENIZER.size, context=256, block=block)
    network, grammars = build(settings, seed=1).eval(), Grammars(TOKENIZER)
    loose = Sampling(max_new_tokens=5, min_new_tokens=5, temperature=1.0, seed=3, alternatives=2)
    plain = Request((1, 2, 4), loose)

    def answered() -> tuple[list, int]:
        engine = Engine(network, TOKENIZER, slots=4)
        asked = [
            Request(
                (1, 2, 3),
                Sampling(max_new_tokens=most, temperature=1.5, seed=seed, stop=('","kin',) if seed == 4 else ()),
                steps=(grammars.constraint("json_schema", SCHEMA),),
            )
            for seed in range(5)
        ]
        found = engine.run([plain, *asked])
        alone = engine.steps
        again = engine.run([Request((*asked[0].ids, *(one.token for one in found[1].choices), 7))])
        assert engine.scheduler.running == [] and not engine.busy
        return [*found, *again], alone

    together, few = answered()
    monkeypatch.setattr(constraints.Constraint, "forced", lambda self: [])
    monkeypatch.setattr(constraints.Constraint, "over", False)
    apart, many = answered()
    grammars.close()
    assert few < many
    if most == 120:
        assert [one.finish for one in together[1:6]] == ["end"] * 4 + ["stop"]
        assert few < 0.7 * many
    for one, other in zip(together, apart, strict=True):
        assert (one.finish, one.text, one.reused) == (other.finish, other.text, other.reused)
        assert [choice.token for choice in one.choices] == [choice.token for choice in other.choices]
        scores = [torch.tensor([choice.logprob for choice in row.choices]) for row in (one, other)]
        assert torch.allclose(*scores, atol=1e-4)
        assert one.drafted == one.accepted == 0


def deep(levels: int):
    schema = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(
    "kind, text",
    [
        ("json_schema", deep(40)),
        ("json_schema", {"$defs": {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(1000)}, "$ref": "#/$defs/d0"}),
        ("json_schema", {"type": "string", "pattern": "(" * 60_000}),
        ("json_schema", {"$ref": "http://example.org/schema"}),
        ("json_schema", {"$ref": "#"}),
        ("json_schema", {"$ref": "#/nowhere"}),
        ("json_schema", {"type": "wizard"}),
        ("json_schema", {"enum": [str(i) for i in range(3000)]}),
        ("json_schema", {"allOf": [{"type": "string"}, {"type": "integer"}]}),
        ("regex", "(" * 500),
        ("regex", "[a-z"),
        ("grammar", "start: start start"),
        ("grammar", "this is no grammar"),
        ("grammar", "start: " + "(" * 30_000),
    ],
    ids=lambda value: str(value)[:24],
)
def test_hostile_constraints(grammars, kind, text) -> None:
    started = time.monotonic()
    with pytest.raises(InputError):
        grammars.constraint(kind, text)
    assert time.monotonic() - started < 15  # a busy machine; the bound is on the processor's time
    assert grammars.constraint("regex", "ok") is not None, "the next one is served"


@pytest.mark.parametrize("pattern", ["(((((a*)*)*)*)*){1,999999}", "(a|b){100000}{100000}", "(a?){3000}a{3000}"])
def test_patterns_that_explode_elsewhere_are_served_or_refused_in_time(engine, grammars, pattern) -> None:
    started = time.monotonic()
    with contextlib.suppress(InputError, GenerationError):
        answer = engine.submit(asked(grammars.constraint("regex", pattern), 0)).wait()
        assert set(answer.text) <= {"a", "b"}
    assert time.monotonic() - started < 30


def test_a_dead_end_is_an_error_of_the_request_and_names_its_constraint(engine, grammars) -> None:
    """No character is both b and c, which shows only after the a."""
    with pytest.raises(InputError, match="could not follow its 'grammar': nothing matches"):
        engine.submit(asked(grammars.constraint("grammar", 'start: "a" A\nA: /b/ & /c/'), 0)).wait()
    with pytest.raises(InputError, match="could not follow its 'tools'"):
        engine.submit(asked(grammars.constraint("grammar", 'start: "a" A\nA: /b/ & /c/', "tools"), 0)).wait()


def test_a_wrong_constraint_ends_its_own_answer_only(engine, grammars) -> None:
    class Broken:
        def apply(self, scores, ids):
            raise InputError("the constraint failed")

        def accept(self, token):
            raise AssertionError

    plain = Sampling(max_new_tokens=5, temperature=0)
    bad, good = engine.submit(asked(Broken(), 0)), engine.submit(Request((1, 2, 3), plain))
    with pytest.raises(Exception, match="constraint failed"):
        bad.wait()
    assert len(good.wait().choices) == 5


def test_what_the_first_constraint_waits_for_can_be_done_before() -> None:
    grammars = Grammars(TOKENIZER)
    grammars.warm()
    grammars.warm()
    grammars._warming.join(30)
    trial = grammars._trial
    assert trial.poll() is None
    assert grammars.constraint("regex", "ok") is not None
    assert grammars._trial is trial, "a second helper was started"
    grammars.close()
    assert trial.returncode is not None
    with pytest.raises(InputError, match="closed"):
        grammars.constraint("regex", "other")


def test_closing_in_the_middle_of_it_leaves_no_process(monkeypatch) -> None:
    started = []
    plain = subprocess.Popen

    def popen(*given, **more):
        time.sleep(0.2)
        started.append(plain(*given, **more))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", popen)
    grammars = Grammars(TOKENIZER)
    grammars.warm()
    time.sleep(0.05)
    grammars.close()
    assert not grammars._warming.is_alive()
    assert all(one.poll() is not None for one in started)


def test_a_mask_forbids_what_the_automaton_forbids_and_all_that_is_no_token(grammars) -> None:
    """By llguidance's own list of allowed tokens; beyond the tokenizer's there are scores of tokens that are none."""
    wide = Grammars(TOKENIZER, TOKENIZER.size + 70)
    constraint = wide.constraint("regex", "a[bc]|d")
    for token, width in zip(TOKENIZER.encode("ac"), (TOKENIZER.size + 70, TOKENIZER.size), strict=True):
        listed = list(constraint._matcher.compute_logit_bias())
        scores = torch.arange(width, dtype=torch.float32)
        found = constraint.apply(scores.clone(), ())
        free = torch.tensor([bool(place < len(listed) and listed[place]) for place in range(width)])
        assert bool(free.any()) and not bool(free.all())
        assert torch.equal(found, torch.where(free, scores, -torch.inf))
        constraint.accept(token)
    wide.close()


def test_warming_walks_through_an_answer(monkeypatch) -> None:
    """The whole way that the first answer takes: compiled here, chosen from, to its end."""
    seen = []
    inner = constraints.choose
    monkeypatch.setattr(constraints, "choose", lambda *given: seen.append(inner(*given)[0]) or seen[-1:])
    grammars = Grammars(TOKENIZER)
    grammars.warm()
    grammars._warming.join(30)
    grammars.close()
    assert seen[-1].token in TOKENIZER.ends
    json.loads(TOKENIZER.decode([one.token for one in seen[:-1]]))


def test_what_can_only_go_on_in_one_way_is_encoded_once(monkeypatch) -> None:
    """Of two answers to one schema the second asks the tokenizer for nothing, and both are allowed the same."""
    asked = []
    plain = TOKENIZER.encode
    monkeypatch.setattr(TOKENIZER, "encode", lambda text: asked.append(text) or plain(text))
    grammars, ids, found, counts = Grammars(TOKENIZER), plain('{"name":"ab","kind":"cat","age":1}'), [], []
    for _ in range(2):
        constraint, free = grammars.constraint("json_schema", SCHEMA), []
        before = len(asked)
        for token in ids:
            free.append(torch.isfinite(constraint.apply(torch.zeros(TOKENIZER.size), ())).tolist())
            constraint.accept(token)
        found.append(free)
        counts.append(len(asked) - before)
    grammars.close()
    assert counts[0] > 5 and counts[1] == 0
    assert found[0] == found[1]
