"""The engine beside its laws: a thread that nothing ends, and prompts that are scored once."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
from engine_parts import in_pieces

from armillary.base.errors import InputError, UnsupportedError
from armillary.engine import Engine, GenerationError, Request, Sampling
from armillary.engine.request import Answer, Piece
from armillary.engine.scheduler import Scheduler
from armillary.engine.slots import Slots
from armillary.native import available
from armillary.nn.network import ModelSettings, build

BLOCK = {"mixer": {"kind": "attention", "heads": 2, "position": "rope"}, "channel": "gated"}
PROMPT = (3, 1, 4, 1, 5, 9, 2, 6)


@pytest.fixture(scope="module")
def network():
    return build(ModelSettings(width=16, depth=1, vocabulary=24, context=64, block=BLOCK), seed=5).eval()


def test_a_fault_outside_the_network_ends_answers_and_not_the_thread(network) -> None:
    class Broken:
        faults = 1

        def propose(self, ids, most):
            if self.faults:
                self.faults -= 1
                raise RuntimeError("no guess")
            return []

    asked = Sampling(max_new_tokens=5, temperature=0)
    engine = Engine(network, drafter=Broken()).start()
    try:
        with pytest.raises(GenerationError, match="no guess"):
            engine.submit(Request(PROMPT, asked)).wait()
        assert engine.failures == 1
        again = engine.submit(Request(PROMPT, asked)).wait()
        assert len(again.choices) == 5
        assert engine.memory.held == 0
    finally:
        engine.close()


def test_who_leaves_with_copies_takes_nobody_along(network) -> None:
    """The copies of an answer wait for the first to read their prompt; it leaves before it has, or they all do."""
    asked = Sampling(max_new_tokens=5, temperature=0)
    for leaving in (1, 3):
        engine = Engine(network)
        other = engine.submit(Request(PROMPT[::-1], asked))
        engine.step()
        copies = engine.submit_copies([Request(PROMPT, asked, stream=row) for row in range(3)])
        for one in copies[:leaving]:
            one.cancel()
        while engine.step():
            pass
        assert engine.failures == 0
        assert (other.finish, len(other.choices)) == ("length", 5)
        assert [one.finish for one in copies] == ["cancelled"] * leaving + ["length"] * (3 - leaving)
        assert engine.memory.held == 0


def test_a_prompt_is_scored_once_whoever_goes_first(network) -> None:
    """Expected values: one pass over the whole prompt."""
    engine = Engine(network, slots=1)
    pieces = in_pieces(engine)
    asked = Sampling(max_new_tokens=2, temperature=0)
    low = engine.submit(Request(PROMPT, asked, prompt_logprobs=True))
    engine.step()
    engine.step()
    assert len(low.prompt_choices) == 2 * pieces.size, "a part of it"
    engine.submit(Request(PROMPT[::-1], asked, priority=1)).wait()
    found = low.wait().prompt_choices
    with torch.no_grad():
        own = torch.log_softmax(network(torch.tensor([PROMPT]))[0, :-1], -1)
    assert [choice.token for choice in found] == list(PROMPT[1:])
    expected = own.gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0].tolist()
    assert [choice.logprob for choice in found] == pytest.approx(expected, abs=1e-4)


def test_a_source_belongs_to_an_encoder_decoder(network) -> None:
    asked = Sampling(max_new_tokens=2, temperature=0)
    with pytest.raises(InputError, match="no encoder"):
        Engine(network).submit(Request(PROMPT, asked, source=PROMPT))
    look = {"kind": "attention", "heads": 2}
    settings = {
        "form": "encoder_decoder",
        "encoder": {"depth": 1, "block": {"mixer": look, "channel": "ffn"}},
        "block": {"mixer": look, "cross": look, "channel": "ffn"},
    }
    both = build(ModelSettings(width=16, depth=1, vocabulary=24, context=64, **settings), seed=1).eval()
    engine = Engine(both)
    for source, message in ((None, "needs a source"), ((), "no tokens"), ((99,), "outside the vocabulary")):
        with pytest.raises(InputError, match=message):
            engine.submit(Request((1,), asked, source=source))
    assert not engine.busy


def test_states_are_shared_only_by_what_they_depend_on() -> None:
    """The same prompt for another task: compared with an engine that has seen neither."""
    block = {"mixer": BLOCK["mixer"], "channel": {"kind": "task_moe", "experts": 4, "top": 2, "hidden": 16, "tasks": 3}}
    routed = build(ModelSettings(width=16, depth=2, vocabulary=24, context=64, block=block), seed=2).eval()
    asked = Sampling(max_new_tokens=3, temperature=0)
    engine = Engine(routed)
    engine.run([Request(PROMPT, asked, side={"tasks": 2})])
    (found,) = engine.run([Request(PROMPT, asked, side={"tasks": 1})])
    (fresh,) = Engine(routed).run([Request(PROMPT, asked, side={"tasks": 1})])
    assert found.reused == 0
    assert [one.logprob for one in found.choices] == pytest.approx([one.logprob for one in fresh.choices], abs=1e-5)
    (again,) = engine.run([Request(PROMPT, asked, side={"tasks": 1})])
    assert again.reused == len(PROMPT) - 1


def test_several_threads_may_wait_for_one_engine(network) -> None:
    asked = Sampling(max_new_tokens=12, temperature=0)
    prompts = [PROMPT[start:] for start in range(4)]
    expected = [[one.token for one in Engine(network).run([Request(p, asked)])[0].choices] for p in prompts]
    engine = Engine(network, slots=2)
    answers = [engine.submit(Request(prompt, asked)) for prompt in prompts]
    threads = [threading.Thread(target=answer.wait) for answer in answers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert [[one.token for one in answer.choices] for answer in answers] == expected


def test_a_step_of_one_answer_that_fails_in_any_way_ends_that_one_only(network, caplog) -> None:
    class Broken:
        def apply(self, scores, ids):
            raise ValueError("unforeseen")

        def accept(self, token):
            raise AssertionError

    asked = Sampling(max_new_tokens=4, temperature=0)
    engine = Engine(network, slots=2)
    bad = engine.submit(Request(PROMPT, asked, steps=(Broken(),)))
    good = engine.submit(Request(PROMPT, asked))
    assert len(good.wait().choices) == 4
    with pytest.raises(GenerationError, match="unforeseen"):
        bad.wait()
    assert bad.inside
    (line,) = caplog.records
    assert line.message == "an answer failed"
    assert isinstance(line.exc_info[1], ValueError)


LONG = tuple((5 * i + i * i) % 24 for i in range(40))


def beside(network, broken=None, **asked) -> tuple[list[Answer], list[tuple[int, ...]]]:
    """Two answers under way, and then a long prompt in pieces; with the number of tokens of each row of every call.
    broken: is asked about every call."""
    engine = Engine(network, slots=3, keep=False)
    in_pieces(engine)
    sampling = Sampling(max_new_tokens=20, temperature=0)
    answers = [engine.submit(Request(PROMPT[row:], sampling)) for row in range(2)]
    while not all(answer.choices for answer in answers):
        engine.step()
    calls, inner = list[tuple[int, ...]](), engine.slots.extend

    def extend(rows, chunks, **how):
        calls.append(tuple(map(len, chunks)))
        if broken is not None:
            broken(chunks)
        return inner(rows, chunks, **how)

    engine.slots.extend = extend
    answers.append(engine.submit(Request(LONG, sampling, **asked)))
    while engine.step():
        pass
    assert engine.memory.held == 0
    return answers, calls


def tokens(answer: Answer) -> list[int]:
    return [choice.token for choice in answer.choices]


@pytest.mark.skipif(not available(), reason="there is no C compiler here")
def test_a_piece_of_a_prompt_is_read_in_one_call_with_answers(network) -> None:
    """Expected values: each by itself."""
    answers, calls = beside(network)
    pieces = -(-len(LONG) // 3)
    assert calls[: pieces - 1] == [(1, 1, 3)] * (pieces - 1), calls
    for answer in answers:
        (alone,) = Engine(network, slots=1, keep=False).run([answer.request])
        assert tokens(answer) == tokens(alone)
    scored, calls = beside(network, prompt_logprobs=True)
    assert calls[0] == (1, 1, 3)
    assert [tokens(answer) for answer in scored] == [tokens(answer) for answer in answers]
    assert [choice.token for choice in scored[2].prompt_choices] == list(LONG[1:])


@pytest.mark.skipif(not available(), reason="there is no C compiler here")
def test_a_piece_that_fails_ends_its_own_answer_only(network) -> None:
    good, _ = beside(network)

    def poor(chunks) -> None:
        if any(chunk == list(LONG[6:9]) for chunk in chunks):
            raise RuntimeError("not this one")

    answers, calls = beside(network, poor)
    assert calls[2:5] == [(1, 1, 3), (1, 1), (3,)], "together, and then each by itself"
    assert [tokens(answer) for answer in answers[:2]] == [tokens(answer) for answer in good[:2]]
    assert answers[2].finish == "error"
    assert not answers[2].choices

    def poor_answers(chunks) -> None:
        if any(len(chunk) == 1 for chunk in chunks) and next(faults, False):
            raise RuntimeError("not these")

    faults = iter([True, True])
    answers, _ = beside(network, poor_answers)
    assert [answer.finish for answer in answers] == ["error", "error", "length"]
    assert tokens(answers[2]) == tokens(good[2])


@pytest.mark.skipif(not available(), reason="there is no C compiler here")
def test_a_fault_after_the_call_is_not_computed_twice(network) -> None:
    """Where the scores are there, the tokens are in the states."""
    engine = Engine(network, slots=2, keep=False)
    in_pieces(engine)
    first = engine.submit(Request(PROMPT, Sampling(max_new_tokens=20, temperature=0)))
    while not first.choices:
        engine.step()
    second = engine.submit(Request(LONG, Sampling(max_new_tokens=20, temperature=0)))
    inner, calls = engine._choose, []

    def broken(*given):
        calls.append(given)
        raise RuntimeError("no choice")

    engine._choose = broken
    engine.step()
    engine._choose = inner
    assert len(calls) == 1
    assert [first.finish, second.finish] == ["error", "error"]
    assert not engine.busy


def budgets(engine: Engine) -> list[tuple[int, int]]:
    """Of every step from now on: answers under way, and how many tokens one call may take, as the pace is told."""
    asked, inner = list[tuple[int, int]](), engine.pace.budget

    def budget(answers: int, context: int = 0, most: int = 0) -> int:
        asked.append((answers, most))
        return inner(answers, context, most)

    engine.pace.budget = budget
    return asked


@pytest.mark.parametrize("waiter", [(1,), (1, 2)])
def test_who_waits_does_not_slow_who_reads(network, waiter) -> None:
    """A prompt of one token is as good as an answer, but not before it has a place."""
    engine = Engine(network, slots=1, keep=False)
    in_pieces(engine)
    first = engine.submit(Request(LONG, Sampling(max_new_tokens=2, temperature=0)))
    engine.step()
    asked = budgets(engine)
    engine.submit(Request(waiter, Sampling(max_new_tokens=2, temperature=0)))
    while not first.choices:
        engine.step()
    *reading, _ = asked  # its own last token comes as an answer's do
    assert reading and all(answers == 0 for answers, _ in reading)


@pytest.mark.parametrize("weights", ["auto", "plain"])
def test_answers_that_just_go_on_are_not_planned_anew(network, weights, monkeypatch) -> None:
    """And are what they are when every step is planned: they end by length, leave, run out of time, and others come."""

    def answered(planned: bool) -> tuple[list[tuple[str | None, list[int]]], int, int]:
        if planned:
            monkeypatch.setattr(Scheduler, "again", lambda *_: False)
        engine = Engine(network, slots=3, keep=False, weights=weights)
        asked = [Sampling(max_new_tokens=30 + 5 * row, temperature=row / 2, seed=row, top_k=9) for row in range(4)]
        answers = list[Answer]()

        def leaves(piece: Piece) -> None:
            if len(answers[1].choices) == 20:
                answers[1].cancel()

        for row, sampling in enumerate(asked):  # the last one waits for a place
            listener = leaves if row == 1 else None
            answers.append(engine.submit(Request(PROMPT[row:], sampling, priority=-row), listener))
        plans, inner = [], engine.scheduler.plan
        engine.scheduler.plan = lambda *given: plans.append(given) or inner(*given)
        while engine.step():
            if len(answers) == 4 and len(answers[0].choices) == 12:
                answers.append(engine.submit(Request(PROMPT, Sampling(max_new_tokens=6, temperature=0), priority=3)))
        monkeypatch.undo()
        assert engine.memory.held == 0
        return [(answer.finish, tokens(answer)) for answer in answers], engine.steps, len(plans)

    found, steps, plans = answered(False)
    expected, planned_steps, every = answered(True)
    assert found == expected
    assert [finish for finish, _ in found] == ["length", "cancelled", "length", "length", "length"]
    assert steps == planned_steps == every - 1 > 3 * plans


def test_an_answer_that_goes_on_ends_at_its_deadline(network) -> None:
    engine = Engine(network, slots=2, keep=False)
    asked = Sampling(max_new_tokens=40, temperature=0)
    slow = lambda piece: time.sleep(0.01)  # noqa: E731
    timed, other = engine.submit(Request(PROMPT, asked, timeout=0.15), slow), engine.submit(Request(PROMPT[1:], asked))
    while engine.step():
        pass
    assert 1 < len(timed.choices) < 20
    assert (timed.finish, other.finish) == ("deadline", "length")


@pytest.mark.skipif(not available(), reason="there is no C compiler here")
def test_a_row_that_is_full_is_told_where_each_takes_a_token(network) -> None:
    slots = Slots(network, 2, 4)
    assert slots.replay is not None
    one = slots.extend([0, 1], [[1], [2]])
    again = slots.extend([0, 1], [[3], [4]])
    assert again.data_ptr() == one.data_ptr(), "the same memory, step after step"
    for row, text in ((0, [1, 3]), (1, [2, 4])):
        whole = Slots(network, 1, 4).extend([0], [text])
        torch.testing.assert_close(again[row], whole[0])
    slots.extend([0], [[5, 6]])
    with pytest.raises(UnsupportedError, match="4 tokens"):
        slots.extend([0, 1], [[1], [2]])
    found = slots.extend([1], [[7]])
    torch.testing.assert_close(found[0], Slots(network, 1, 4).extend([0], [[2, 4, 7]])[0])


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="this system does not list a process's threads")
@pytest.mark.skipif(not available(), reason="there is no C compiler here")
def test_who_starts_an_engine_lets_go_of_its_threads(network) -> None:
    """Those of PyTorch's products, that is: OpenMP counts them with the engine's own, and of too many none spins."""

    def threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    engine = Engine(network)
    try:
        torch.rand(1 << 20).exp()
        many = threads()
        engine.start()
        end = time.monotonic() + 10
        while threads() != many - 2 + 1 and time.monotonic() < end:
            time.sleep(0.01)
        assert threads() == many - 2 + 1
    finally:
        engine.close()
        torch.set_num_threads(before)
