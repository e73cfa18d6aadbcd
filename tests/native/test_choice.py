"""The native choice of tokens against its plain form, and against distributions that are counted out in float64.

The two forms sum in another order, so they may part where a draw falls within 1e-6 of a border: with the seeds here
none does.
"""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from native_parts import VECTORS, built

from armillary.base.errors import InputError
from armillary.engine.choosing import Choosers, choose, choose_along, choose_plain
from armillary.engine.sampling import AHEAD, Choice, Chooser, Sampling, Unusable
from armillary.native import available

pytestmark = pytest.mark.skipif(not available(), reason="there is no C compiler here")
ASKED = {
    "plain": {"temperature": 1.0},
    "cool": {"temperature": 0.6},
    "greedy": {"temperature": 0},
    "barely": {"temperature": 1e-30},
    "nothing": {"temperature": 1e-60},
    "few": {"temperature": 0.8, "top_k": 3},
    "many": {"temperature": 2.0, "top_k": 60},
    "nucleus": {"temperature": 1.0, "top_p": 0.9},
    "wide nucleus": {"temperature": 1.5, "top_p": 0.999},
    "both": {"temperature": 0.8, "top_k": 20, "top_p": 0.7, "min_p": 0.01},
    "near": {"temperature": 1.0, "min_p": 0.1},
    "alternatives": {"temperature": 1.0, "alternatives": 20},
    "penalties": {
        "temperature": 1.0,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
        "logit_bias": {3: 2.0, 1: -100.0},
    },
    "not yet": {"temperature": 1.0, "min_new_tokens": 64},
    "about": {"temperature": 0, "target_new_tokens": 6},
}
STEPS = {5: 12, 24: 12, 257: 8, 1000: 8, 16384: 2}  # by the number of scores


def scores(rows: int, width: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Every second row has many ties, every third much that cannot be."""
    made = torch.Generator().manual_seed(seed)
    found = torch.randn(rows, width, generator=made) * 3
    found[1::2] = found[1::2].round()
    found[2::3][torch.rand(found[2::3].shape, generator=made) < 0.5] = -torch.inf
    found[:, 2] = 0.5  # something is left in any case, and is no end
    return found.to(dtype)


def pairs(asked: dict, rows: int, **more) -> list[list[Chooser]]:
    samplings = [Sampling(max_new_tokens=64, seed=7 + row, **asked) for row in range(rows)]
    return [[Chooser(one, [1, 2, 3, 3], ends=(0, 4), **more) for one in samplings] for _ in range(2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
@pytest.mark.parametrize("form", VECTORS)
def test_tokens_are_those_of_the_plain_form(form, asked, dtype) -> None:
    with built(form):
        check(asked, dtype)


def check(asked, dtype) -> None:
    for width, steps in STEPS.items():
        native, plain = pairs(asked, 6)
        for step in range(steps):
            given = scores(6, width, dtype, 100 * width + step)
            exact = torch.log_softmax(given.double(), -1)
            for row, (one, other) in enumerate(zip(choose(given, native), choose_plain(given, plain), strict=True)):
                assert isinstance(one, Choice) and isinstance(other, Choice)
                assert one.token == other.token, (width, step, row)
                assert one.logprob == pytest.approx(float(exact[row, one.token]), abs=2e-6)
                tokens, found = [token for token, _ in one.top], [value for _, value in one.top]
                best = exact[row].sort(descending=True, stable=True)
                assert tokens == best.indices[: len(tokens)].tolist(), "of equal ones the first"
                assert found == pytest.approx(best.values[: len(found)].tolist(), abs=2e-6)
                assert len(found) == min(native[row].sampling.alternatives, width)


@pytest.mark.parametrize("asked", ["plain", "few", "nucleus", "both", "near", "penalties"])
def test_draws_follow_the_distribution(asked) -> None:
    """Chi-square of many draws against probabilities by their definition, in float64 and in Python's own loops."""
    sampling = Sampling(seed=3, **ASKED[asked])
    given = scores(1, 24, torch.float32, 5) / 3
    expected = by_definition(given[0].tolist(), sampling, [1, 2, 3, 3])
    counts, draws = [0] * 24, 4000
    for stream in range(draws):
        chooser = Chooser(sampling, [1, 2, 3, 3], stream=stream)
        (found,) = choose(given, [chooser])
        counts[found.token] += 1
    assert all(count == 0 for count, share in zip(counts, expected, strict=True) if share == 0)
    square = sum(
        (count - draws * share) ** 2 / (draws * share) for count, share in zip(counts, expected, strict=True) if share
    )
    freedom = sum(share > 0 for share in expected) - 1
    tail = torch.special.gammaincc(torch.tensor(freedom / 2.0), torch.tensor(square / 2.0))
    assert float(tail) > 1e-4


def by_definition(given: list[float], sampling: Sampling, prompt: list[int]) -> list[float]:
    """The filters as their papers write them, token by token; nothing was generated yet."""
    scores = [one + sampling.logit_bias.get(token, 0.0) for token, one in enumerate(given)]
    for token in set(prompt):
        penalty = sampling.repetition_penalty
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    weights = [math.exp(one / sampling.temperature) for one in scores]
    if sampling.top_k is not None:
        floor = sorted(weights, reverse=True)[sampling.top_k - 1]
        weights = [one if one >= floor else 0.0 for one in weights]
    if sampling.top_p is not None:
        order = sorted(range(len(weights)), key=lambda token: -weights[token])
        before = itertools.accumulate((weights[token] for token in order), initial=0.0)
        goal = sampling.top_p * sum(weights)
        kept = {token for token, sum_before in zip(order, before, strict=False) if sum_before < goal}
        weights = [one if token in kept else 0.0 for token, one in enumerate(weights)]
    if sampling.min_p is not None:
        weights = [one if one >= sampling.min_p * max(weights) else 0.0 for one in weights]
    return [one / sum(weights) for one in weights]


def test_a_row_depends_neither_on_its_neighbours_nor_on_threads(monkeypatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    given = scores(9, 16384, torch.float32, 2)  # so many that threads share them
    asked = [Sampling(seed=row, temperature=0.9, top_k=(None, 40)[row % 2]) for row in range(9)]
    alone = [choose(given[row : row + 1], [Chooser(one, [1])])[0] for row, one in enumerate(asked)]
    assert choose(given, [Chooser(one, [1]) for one in asked]) == alone
    apart = torch.zeros(9, 3, 16384)
    apart[:, 1] = given  # rows that do not follow one another in memory
    assert choose(apart[:, 1], [Chooser(one, [1]) for one in asked]) == alone


def test_numbers_drawn_ahead_are_those_drawn_one_by_one() -> None:
    chooser = Chooser(Sampling(seed=11), [1], stream=2)
    own = torch.Generator().manual_seed(11 * 0x9E3779B1 + 2)
    expected = [float(torch.rand((), dtype=torch.float64, generator=own)) for _ in range(150)]
    assert [chooser.draw() for _ in range(150)] == expected


@pytest.mark.parametrize("form", [choose, choose_plain])
def test_scores_that_are_none_end_their_own_row(form) -> None:
    given = scores(6, 300, torch.float32, 3)
    given[0, 17] = torch.nan
    given[1] = -torch.inf
    given[2, 299] = torch.inf
    given[3, :], given[3, 7] = -torch.inf, -1e30

    class Nothing:
        def apply(self, scores, ids):
            return scores.fill_(-torch.inf)

        def accept(self, token):
            raise AssertionError

    class Broken(Nothing):
        def apply(self, scores, ids):
            raise ValueError("unforeseen")

    steps = {4: (Nothing(),), 5: (Broken(),)}
    found = form(given, [Chooser(Sampling(seed=row), [1], steps=steps.get(row, ())) for row in range(6)])
    for one in found[:3]:
        assert isinstance(one, Unusable) and "no finite scores" in str(one)
    assert found[3] == (7, 0.0, ())
    assert isinstance(found[4], Unusable) and "nothing is left" in str(found[4])
    assert isinstance(found[5], ValueError)


@pytest.mark.parametrize("form", [choose, choose_plain])
def test_a_constraint_that_allows_only_the_end_stands_above_a_bound(form) -> None:
    class Ends:
        allowed = (4,)

        def apply(self, scores, ids):
            mask = torch.full_like(scores, -torch.inf)
            mask[list(self.allowed)] = 0.0
            return scores + mask

        def accept(self, token):
            pass

    step = Ends()
    chooser = Chooser(Sampling(min_new_tokens=3, seed=1), [1], ends=(0, 4), steps=(step,))
    given = scores(1, 40, torch.float32, 4)
    assert form(given, [chooser])[0].token == 4
    step.allowed = (4, 9)
    assert form(given, [chooser])[0].token == 9


class Bits:
    """Allows other tokens at every step, by bits; none behind the first `tokens`."""

    def __init__(self, tokens: int, seed: int) -> None:
        self.tokens, self._draw, self.wrong = tokens, random.Random(seed), None
        self._bits = torch.zeros(-(-tokens // 32), dtype=torch.int32)
        self.address = self._bits.data_ptr()
        self.accept(0)

    def look(self) -> None:
        if self.wrong is not None:
            raise self.wrong
        words = [sum(1 << i for i in range(32) if 32 * at + i in self.free) for at in range(len(self._bits))]
        self._bits[:] = torch.tensor([word - (word >> 31 << 32) for word in words], dtype=torch.int32)

    def why_nothing(self):
        return None if self.free else InputError("it allows nothing")

    def apply(self, given, ids):
        if self.wrong is not None:
            raise self.wrong
        if not self.free:
            raise InputError("it allows nothing")
        free = [token for token in self.free if token < len(given)]
        mask = torch.full_like(given, -torch.inf)
        mask[free] = 0.0
        return given + mask

    def accept(self, token) -> None:
        some = {at for at in range(self.tokens) if self._draw.random() < 0.4}
        self.free = some | ({2, 3} & set(range(self.tokens)))


@pytest.mark.parametrize("asked", ["plain", "greedy", "both", "alternatives", "penalties", "not yet", "about"])
@torch.no_grad()
def test_bits_forbid_what_scores_without_it_do(asked: str) -> None:
    """Read by the C library, against the plain form, which takes it off the scores; beside rows that all is allowed."""
    for width in (5, 24, 257, 1000):
        for tokens in (width, width - 1, width + 70):
            sampling = Sampling(max_new_tokens=64, seed=width, **ASKED[asked])
            mine, plain = (
                [
                    Chooser(sampling, [1, 2], ends=(0, 4), steps=(Bits(tokens, 5),) if row % 2 else (), stream=row)
                    for row in range(4)
                ]
                for _ in "ab"
            )
            together = Choosers(mine)
            for step in range(8):
                given = scores(4, width, torch.float32, step)
                found, wanted = together.choose(given), choose_plain(given, plain)
                assert [one.token for one in found] == [one.token for one in wanted]
                logprobs = torch.tensor([one.logprob for one in found])
                assert torch.allclose(logprobs, torch.tensor([one.logprob for one in wanted]), atol=1e-5)
            assert together._together, "bits are read where the others' scores are"


@pytest.mark.parametrize("wrong", [None, ValueError("unforeseen")])
def test_bits_that_cannot_be_end_their_own_row(wrong) -> None:
    for form in (choose, choose_plain):
        others = [Chooser(Sampling(seed=row), [1]) for row in range(2)]
        bits = Bits(40, 1)
        bits.wrong, bits.free = wrong, set()
        found = form(scores(3, 40, torch.float32, 3), [others[0], Chooser(Sampling(), [1], steps=(bits,)), others[1]])
        assert isinstance(found[0], Choice) and isinstance(found[2], Choice)
        assert found[1] is wrong if wrong else str(found[1]) == "it allows nothing"
        assert all(one.generated == 1 for one in others)


@pytest.mark.parametrize(("number", "token"), [(0.0, 5), (1 - 2.0**-53, 2047)])
def test_the_lowest_and_the_highest_draw_take_a_token_that_can_be(number, token) -> None:
    class Fixed(Chooser):
        def draw(self) -> float:
            return number

    given = torch.full((1, 3000), -torch.inf)
    given[0, [5, 1500, 2047]] = 0.0
    for form in (choose, choose_plain):
        assert form(given, [Fixed(Sampling(temperature=1.0), [1])])[0].token == token


def test_a_bias_outside_the_vocabulary_is_an_error() -> None:
    for form in (choose, choose_plain):
        (found,) = form(torch.zeros(1, 8), [Chooser(Sampling(logit_bias={8: 1.0}), [1])])
        assert "logit_bias names the token 8" in str(found)


@pytest.mark.parametrize("form", [choose, choose_plain])
def test_an_end_outside_the_vocabulary_is_never_reached(form) -> None:
    """A tokenizer may know more than the network scores."""
    for more in ({"min_new_tokens": 2}, {"target_new_tokens": 2}):
        given = torch.linspace(0, 1, 24)[None]
        asked = Sampling(max_new_tokens=4, temperature=0, **more)
        (beyond,), (none,) = (form(given, [Chooser(asked, [1], ends=ends)]) for ends in ([24, 40_000_000], []))
        assert beyond == none and beyond.token == 23


@pytest.mark.parametrize("form", [choose, choose_plain])
def test_what_a_step_makes_of_scores_is_read_as_what_it_is(form) -> None:
    class Made:
        def __init__(self, make) -> None:
            self.make = make

        def apply(self, scores, ids):
            return self.make(scores)

        def accept(self, token) -> None:
            pass

    given = torch.linspace(0, 1, 24).flip(0)[None]

    def chosen(make):
        return form(given, [Chooser(Sampling(max_new_tokens=4, temperature=0), [1], steps=[Made(make)])])[0]

    for make in (torch.Tensor.double, torch.Tensor.half, lambda scores: torch.stack([scores, scores], 1)[:, 0]):
        assert chosen(make).token == 0
    for make in (lambda scores: scores[:12], lambda scores: scores[None]):
        assert isinstance(chosen(make), ValueError)


@pytest.mark.parametrize("asked", ["plain", "greedy", "nucleus", "alternatives", "penalties", "about"])
@torch.no_grad()
def test_along_guesses_as_one_by_one(asked: str) -> None:
    """The same tokens from the same draws, up to the first that was not guessed or ends; and the next draw follows."""
    logits, draw, lengths = scores(64, 257, torch.float32, 3), random.Random(2), set[int]()
    single, along = (Chooser(Sampling(max_new_tokens=40, seed=7, **ASKED[asked]), [1, 2], ends=(0, 4)) for _ in "ab")
    at = 0
    while at + 4 <= len(logits) and single.generated < 40:
        wanted = list[Choice]()
        guesses = [draw.randrange(257) for _ in range(3)]
        for step in range(4):
            (choice,) = choose(logits[at + step : at + step + 1], [single])
            assert isinstance(choice, Choice)
            wanted.append(choice)
            if step < 3 and draw.random() < 0.7:
                guesses[step] = choice.token
            if step == 3 or guesses[step] != choice.token or choice.token in (0, 4) or single.generated == 40:
                break
        assert choose_along(logits[at : at + 4], along, guesses) == wanted
        assert along.ids == single.ids
        lengths.add(len(wanted))
        at += len(wanted)
    assert {1, 4} <= lengths, "or this test says little"


def test_along_guesses_until_scores_are_no_numbers() -> None:
    logits = torch.zeros(3, 24)
    logits[:, 5] = 1.0
    logits[1, 3] = torch.nan
    chooser = Chooser(Sampling(max_new_tokens=9, temperature=0), [1])
    first, second = choose_along(logits, chooser, [5, 5])
    assert isinstance(first, Choice) and first.token == 5
    assert isinstance(second, Unusable)
    assert chooser.ids == [1, 5]


def test_what_is_set_out_once_gives_the_same_step_after_step() -> None:
    """Rows are written anew only when they change: against the plain form, whose choosers keep nothing."""
    bounds = {"early": {"min_new_tokens": 3}, "late": {"temperature": 1.0, "min_new_tokens": 4, "target_new_tokens": 7}}
    for names in ([name for name in ASKED if name != "alternatives"], list(ASKED), [*bounds, "greedy"], list(bounds)):
        asked = [Sampling(max_new_tokens=64, seed=row, **(ASKED | bounds)[name]) for row, name in enumerate(names)]
        native, plain = ([Chooser(one, [1, 2, 3, 3], ends=(0, 4)) for one in asked] for _ in range(2))
        together = Choosers(native)
        given = torch.empty(len(names), 1, 24)
        for step in range(12):
            given.copy_(scores(len(names), 24, torch.float32, step)[:, None])
            given[:, :, 0] += 6.0 if step % 2 else -1.0  # the end, which bounds forbid or add to
            found, expected = together.choose(given), choose_plain(given, plain)
            assert [one.token for one in found] == [one.token for one in expected], (names, step)
            assert [len(one.top) for one in found] == [len(one.top) for one in expected]
        assert [one.ids for one in native] == [one.ids for one in plain]
    bound = Choosers([Chooser(Sampling(min_new_tokens=3, temperature=0), [1], ends=(0,))])
    given = torch.tensor([[9.0, 0.0, 1.0]])
    assert [bound.choose(given)[0].token for _ in range(5)] == [2, 2, 2, 0, 0]


def test_a_bias_of_no_token_ends_its_own_row_only() -> None:
    given = torch.tensor([[9.0, 0.0, 1.0]] * 2)
    together = Choosers(
        [Chooser(Sampling(temperature=0, logit_bias={7: 1.0}), [1]), Chooser(Sampling(temperature=0), [1])]
    )
    for _ in range(2):
        poor, fine = together.choose(given)
        assert isinstance(poor, InputError)
        assert fine.token == 0


def test_numbers_that_are_drawn_ahead_are_those_drawn_one_by_one() -> None:
    """However many at a time; answers that begin together do not all draw ahead in one step."""
    choosers = [Chooser(Sampling(max_new_tokens=400, seed=3), [1], stream=stream) for stream in (0, 0, 0, 1)]
    one, *others = [[chooser.draw() for _ in range(400)] for chooser in choosers]
    made = torch.Generator().manual_seed(3 * 0x9E3779B1)
    assert one == [float(torch.rand((), dtype=torch.float64, generator=made)) for _ in range(400)]
    assert others[0] == others[1] == one != others[2]
    assert len(set(AHEAD)) > 4
