"""The choice of tokens by what is asked for: of many sequences in one call, again and again.

On a CPU the C library chooses for all rows in one call (native/choice.c), which gives the tokens of the plain form
here but where a draw lies within about 1e-6 of the border between two tokens: sums are taken in another order.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence
from ctypes import c_float
from typing import Any

import torch
from torch import Tensor

from armillary.engine.sampling import AGES, Choice, Chooser, Sampling, Unusable
from armillary.native.choice import Problem, Row, Rows, Sheet, sheet

# With draws [steps, rows]: as `Rows.choose`, step by step, for so many steps or fewer.
Make = Callable[[Rows, "array[float]"], list[float]]


def choose(logits: Tensor, choosers: Sequence[Chooser]) -> list[Choice | Exception]:
    """One token for each row of logits [n, V] or [n, 1, V], by the chooser of the row; or what went wrong with that
    row: Unusable where its scores are no numbers or allow nothing, else what a step into its choice has raised."""
    return Choosers(choosers).choose(logits)


class Choosers:
    """The choosers of sequences that go on together, step after step: what stays the same is set out once.

    Between two steps little of Python is left in the processor's caches, so that what is touched counts, more than
    what is done with it.
    """

    def __init__(self, choosers: Sequence[Chooser]) -> None:
        self._choosers = list(choosers)
        self._together = all(not chooser.steps or chooser.sieve is not None for chooser in choosers)
        self._together = self._together and not any(chooser.mark is not None for chooser in choosers)
        self._moving = [(at, chooser) for at, chooser in enumerate(choosers) if not chooser.plain]
        self._rest = 0  # choices for which the rows are right as they are
        self._drawing = [(at, chooser) for at, chooser in enumerate(choosers) if not chooser.greedy]
        self._accept = [chooser.accept if chooser.told else chooser.ids.append for chooser in choosers]
        # where there is more to a choice than its token, or a step may not accept it
        self._apart = any(chooser.sampling.alternatives or chooser.steps for chooser in choosers)
        self._rows: Rows | None = None
        self._logits: Tensor | None = None
        self._sheet: Sheet | None = None

    def choose(self, logits: Tensor) -> list[Choice | Exception]:
        """As `choose` above."""
        if logits is not self._logits:  # a tape gives the same tensor again and again
            self._logits, self._sheet = logits, sheet(logits)
        scores = self._sheet
        if scores is None:
            return choose_plain(logits, self._choosers)
        rows = self._ready(scores.width)
        if rows is None:
            return self._one_by_one(logits, scores)
        for at, chooser in self._drawing:
            rows.draws[at] = chooser.draw()
        self._rest -= 1
        return [one for (one,) in self._taken(rows, rows.choose(scores), scores.width)]

    def go_on(self, make: Make, width: int, most: int) -> list[list[Choice | Exception]] | None:
        """As `choose` of scores [n, width] again and again, up to `most` times, by a call that makes the scores, too:
        the tokens of each sequence. None, and nothing done, where one has to be looked at in between."""
        rows = self._ready(width)
        if rows is None:
            return None
        count = len(self._choosers)
        steps = 1 if self._apart else min(most, self._rest)
        draws = array("d", bytes(8 * count * steps))
        for at, chooser in self._drawing:
            draws[at::count] = array("d", chooser.ahead(steps))
        found = make(rows, draws)
        made = len(found) // (3 * count)
        for _, chooser in self._drawing:
            for _ in range(made):
                chooser.draw()
        self._rest -= made
        return self._taken(rows, found, width)

    def _ready(self, width: int) -> Rows | None:
        """Rows that are right for the next `_rest` choices, one at least; None where each is chosen for by itself."""
        if not self._together:
            return None
        try:
            if self._rows is None:
                self._rows = Rows([chooser.row(width) for chooser in self._choosers], range(len(self._choosers)))
            elif not self._rest:
                for _, chooser in self._moving:
                    chooser.row(width)
        except Exception:
            self._together = False
            return None
        if not self._rest:
            self._rest = 1 + min((chooser.unmoved for _, chooser in self._moving), default=AGES)
        return self._rows

    def _taken(self, rows: Rows, found: list[float], width: int) -> list[list[Choice | Exception]]:
        """What was found [steps, rows, 3], by rows; only in the last step can one have a problem."""
        count = len(self._choosers)
        problems, tokens, logprobs = found[::3], list(map(int, found[1::3])), found[2::3]
        if self._apart or any(problems):
            taken = list[list[Choice | Exception]]()
            for at, (chooser, row) in enumerate(zip(self._choosers, rows.rows, strict=True)):
                of = zip(problems[at::count], tokens[at::count], logprobs[at::count], strict=True)
                taken.append([_chosen(chooser, row, *one, width) for one in of])
            return taken
        new = tuple.__new__  # what a named tuple of Python's does besides takes longer than a choice
        each = zip(tokens, logprobs, strict=True)
        chosen: list[Choice | Exception] = [new(Choice, (token, logprob, ())) for token, logprob in each]
        if len(tokens) == count:
            for accept, token in zip(self._accept, tokens, strict=True):
                accept(token)
            return [[choice] for choice in chosen]
        for at, chooser in enumerate(self._choosers):  # no row moves in several steps, so nothing is told of a token
            chooser.ids += tokens[at::count]
        return [chosen[at::count] for at in range(count)]

    def _one_by_one(self, logits: Tensor, scores: Sheet) -> list[Choice | Exception]:
        """Where what is asked of one may fail, or needs its scores first."""
        found: dict[int, Choice | Exception] = {}
        rows, places = list[Row](), list[int]()
        for at, chooser in enumerate(self._choosers):
            if chooser.mark is not None:
                (found[at],) = choose_plain(logits[at : at + 1], [chooser])
                continue
            try:
                rows.append(chooser.row(scores.width, logits[at]))
            except Exception as error:
                found[at] = error
                continue
            places.append(at)
        given = Rows(rows, places)
        for place, at in enumerate(places):
            given.draws[place] = 0.0 if self._choosers[at].greedy else self._choosers[at].draw()
        each = iter(given.choose(scores))
        for at, row, problem, token, logprob in zip(places, rows, each, each, each, strict=True):
            found[at] = _chosen(self._choosers[at], row, problem, int(token), logprob, scores.width)
        return [found[at] for at in range(len(self._choosers))]


def choose_along(logits: Tensor, chooser: Chooser, guesses: Sequence[int]) -> list[Choice | Exception]:
    """Tokens of one sequence from logits [guesses + 1, V] of its last token and of guesses behind it: as `choose` row
    by row, for as long as the token chosen is the one that was guessed and no end."""
    found = list[Choice | Exception]()
    scores, rows, given = sheet(logits) if chooser.mark is None else None, None, None
    if chooser.plain and not chooser.sampling.alternatives and scores is not None:
        count = len(guesses) + 1
        rows = Rows([chooser.row(scores.width)] * count, range(count))
        rows.draws[:] = array("d", chooser.ahead(count))
        given = rows.choose(scores)
    for step in range(len(guesses) + 1):
        choice: Choice | Exception
        if scores is None:
            (choice,) = choose_plain(logits[step : step + 1], [chooser])
        elif given is None:
            try:
                row = chooser.row(scores.width, logits[step])
            except Exception as error:
                return [*found, error]
            rows = rows or Rows([row], [step])
            rows.move(0, step)
            rows.draws[0] = 0.0 if chooser.greedy else chooser.draw()
            problem, token, logprob = rows.choose(scores)
            choice = _chosen(chooser, row, problem, int(token), logprob, scores.width)
        else:
            problem, token, logprob = given[3 * step : 3 * step + 3]
            if not chooser.greedy:
                chooser.draw()
            choice = _unusable(int(problem)) if problem else _accepted(chooser, int(token), logprob, ())
        found.append(choice)
        if (
            not isinstance(choice, Choice)
            or step == len(guesses)
            or choice.token != guesses[step]
            or choice.token in chooser.ends
            or chooser.generated >= chooser.sampling.max_new_tokens
        ):
            break
    return found


def guess_one(logits: Tensor, asked: Sampling, row: Row, draw: float, vocabulary: int | None) -> tuple[int, float]:
    """The token that one row of logits gives by temperature and filters alone, and its log-probability under them
    unfiltered, of the first `vocabulary` entries; row: `row_of` what is asked."""
    scores = sheet(logits)
    if scores is not None:
        if vocabulary is not None:
            scores = scores._replace(width=min(vocabulary, scores.width))
        rows = Rows([row], [0])
        rows.draws[0] = draw
        problem, token, logprob = rows.choose(scores)
        return (0, -math.inf) if problem else (int(token), logprob)
    line = logits.reshape(1, -1)[:, :vocabulary].float()
    own = torch.log_softmax(line, -1)
    if c_float(asked.temperature).value == 0:
        token = int(line.argmax())
    else:
        token = int(_draw(filtered((line - line.amax(-1, keepdim=True)) / asked.temperature, asked), [draw])[0])
    logprob = float(own[0, token])
    return (0, -math.inf) if math.isnan(logprob) else (token, logprob)


def _chosen(chooser: Chooser, row: Row, problem: float, token: int, logprob: float, width: int) -> Choice | Exception:
    """What the C library found for a row."""
    if problem:
        sieve = chooser.sieve if problem == Problem.NOTHING_LEFT else None
        return (None if sieve is None else sieve.why_nothing()) or _unusable(int(problem))
    wanted = min(row.tops, width)
    top = tuple(zip(row.top_ids[:wanted], row.top_logprobs[:wanted], strict=True)) if wanted else ()
    return _accepted(chooser, token, logprob, top)


def _accepted(chooser: Chooser, token: int, logprob: float, top: tuple[tuple[int, float], ...]) -> Choice | Exception:
    try:
        chooser.accept(token)
    except Exception as error:
        return error
    return Choice(token, logprob, top)


def _unusable(problem: int) -> Unusable:
    return Unusable(
        "the network gave no finite scores" if problem == Problem.NOT_FINITE else "nothing is left to choose from"
    )


def choose_plain(logits: Tensor, choosers: Sequence[Chooser]) -> list[Choice | Exception]:
    """The plain form of `choose`."""
    scores = logits.flatten(1).float()
    own = torch.log_softmax(scores, -1)
    found = dict[int, Choice | Exception]()
    found |= {row: _unusable(Problem.NOT_FINITE) for row in _not_finite(scores)}
    if not all(chooser.plain for chooser in choosers):
        shaped = list(scores)
        for row, chooser in enumerate(choosers):
            if chooser.plain or row in found:
                continue
            try:
                shaped[row] = chooser.shaped(scores[row])
            except Exception as error:
                found[row] = error
        scores = torch.stack(shaped)
        found |= {row: _unusable(Problem.NOTHING_LEFT) for row in _not_finite(scores) if row not in found}
    groups: dict[tuple[Any, ...], list[int]] = {}
    for row, chooser in enumerate(choosers):
        asked = chooser.sampling
        kind = () if chooser.greedy else (asked.temperature, asked.top_k, asked.top_p, asked.min_p)
        if row not in found:
            groups.setdefault(kind, []).append(row)
    tokens = torch.zeros(len(choosers), dtype=torch.int64, device=logits.device)
    for kind, rows in groups.items():
        some = scores if len(rows) == len(choosers) else scores[rows]
        asked = choosers[rows[0]].sampling
        if kind:  # however low the temperature is, the likeliest stays at 0
            some = filtered((some - some.amax(-1, keepdim=True)) / asked.temperature, asked)
        for place, row in enumerate(rows):
            mark = choosers[row].mark
            if mark is not None:
                some = some.clone()
                try:
                    some[place] = mark.apply(some[place], choosers[row].ids)
                except Exception as error:
                    found[row] = error
        tokens[rows] = _draw(some, [choosers[row].draw() for row in rows]) if kind else some.argmax(-1)
    logprobs = own.gather(1, tokens[:, None])[:, 0].tolist()
    for row, (chooser, token) in enumerate(zip(choosers, tokens.tolist(), strict=True)):
        if row not in found:
            wanted = chooser.sampling.alternatives
            found[row] = _accepted(chooser, token, logprobs[row], likeliest(own[row], wanted) if wanted else ())
    return [found[row] for row in range(len(choosers))]


def _not_finite(scores: Tensor) -> list[int]:
    """Rows with no largest number."""
    return [row for row, fine in enumerate(torch.isfinite(scores.amax(-1)).tolist()) if not fine]


def likeliest(logprobs: Tensor, count: int) -> tuple[tuple[int, float], ...]:
    """The `count` likeliest tokens of [V], the first first."""
    values, tokens = logprobs.topk(min(count, len(logprobs)))
    return tuple(zip(tokens.tolist(), values.tolist(), strict=True))


def _draw(scores: Tensor, draws: Sequence[float]) -> Tensor:
    ladder = torch.softmax(scores, -1).double().cumsum(-1)
    goal = torch.tensor(draws, dtype=torch.float64, device=ladder.device)[:, None] * ladder[:, -1:]
    tokens = torch.searchsorted(ladder, goal, right=True)[:, 0]
    # A draw that rounds to the very top must land on the last token that has any probability.
    last = (ladder < ladder[:, -1:]).sum(-1)
    return torch.minimum(tokens, last)


def filtered(scores: Tensor, sampling: Sampling) -> Tensor:
    """Scores [b, V] with everything that the filters drop at −∞; the likeliest token always stays."""
    if sampling.top_k is not None and sampling.top_k < scores.shape[-1]:
        floor = scores.topk(sampling.top_k, -1).values[:, -1:]
        scores = scores.masked_fill(scores < floor, -torch.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, order = scores.sort(dim=-1, descending=True, stable=True)
        share = torch.softmax(ordered.double(), -1)
        beyond = share.cumsum(-1) - share >= sampling.top_p
        scores = scores.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)
    if sampling.min_p is not None:
        floor = scores.amax(-1, keepdim=True) + torch.tensor(sampling.min_p).log()
        scores = scores.masked_fill(scores < floor, -torch.inf)
    return scores


def scored(logits: Tensor, tokens: Sequence[int], alternatives: int) -> list[Choice]:
    """Tokens that were given, as if they had been chosen from logits [n, V]: as many as there are of both."""
    found = []
    for line, token in zip(logits, tokens, strict=False):
        own = torch.log_softmax(line.float(), -1)
        found.append(Choice(token, float(own[token]), likeliest(own, alternatives) if alternatives else ()))
    return found
