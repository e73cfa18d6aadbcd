"""What is asked of the next token's choice from its scores, and what each sequence's choice depends on (the choice
itself: `choosing`).

Order: constraints; biases, penalties and bounds of length; temperature, top-k, top-p, min-p; watermark;
draw. Every sequence draws from its own generator, once per token, so its tokens do not depend on its
neighbours in the batch, nor on whether they were guessed beforehand.
"""

from __future__ import annotations

import itertools
import math
from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from ctypes import c_float
from itertools import islice
from typing import Any, NamedTuple, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor

from armillary.base.errors import ArmillaryError, InputError, SettingsError, nearest
from armillary.base.settings import Settings
from armillary.engine.steps import Mark, Sieve, Step
from armillary.native.choice import Ends, Row


class Sampling(Settings):
    """temperature 0 is greedy; a filter left at its default does nothing."""

    max_new_tokens: int = Field(64, gt=0, description="at most this many new tokens")
    temperature: float = Field(0.8, ge=0, description="0: always the likeliest token")
    top_k: int | None = Field(None, gt=0, description="keep the k likeliest")
    top_p: float | None = Field(
        None, gt=0, le=1, description="keep the likeliest that make up p (Holtzman et al. 2020, nucleus)"
    )
    min_p: float | None = Field(
        None, gt=0, le=1, description="keep those at least min_p times as likely as the likeliest (Nguyen et al. 2024)"
    )
    repetition_penalty: float = Field(
        1.0, gt=0, description="scores of tokens already there shrink by this factor (Keskar et al. 2019, CTRL)"
    )
    presence_penalty: float = Field(0.0, ge=-2, le=2, description="taken off the score of every token generated before")
    frequency_penalty: float = Field(0.0, ge=-2, le=2, description="taken off as often as the token was generated")
    logit_bias: dict[int, float] = Field({}, description="added to the scores of tokens; −100 forbids, 100 forces")
    min_new_tokens: int = Field(0, ge=0, description="no end before so many")
    target_new_tokens: int | None = Field(
        None, gt=0, description="about so many: the end's score rises by 10 from half of it to half more than it"
    )
    alternatives: int = Field(0, ge=0, le=20, description="give the log-probabilities of so many likeliest tokens, too")
    stop: tuple[str, ...] = Field((), description="texts that end a completion; they are left out of it")
    seed: int = Field(0, description="seed of the draws")

    @model_validator(mode="after")
    def _lengths(self) -> Sampling:
        for name in ("min_new_tokens", "target_new_tokens"):
            if (getattr(self, name) or 0) > self.max_new_tokens:
                raise ValueError(f"{name} is {getattr(self, name)}, more than max_new_tokens, {self.max_new_tokens}")
        return self

    @property
    def plain(self) -> bool:
        """Whether the scores are taken as they come."""
        return (
            self.repetition_penalty == 1.0
            and not (self.presence_penalty or self.frequency_penalty or self.logit_bias)
            and not (self.min_new_tokens or self.target_new_tokens)
        )

    @classmethod
    def of(cls, options: dict[str, Any]) -> Sampling:
        """From keyword arguments; raises InputError that names the argument."""
        if isinstance(options.get("stop"), str):
            options = options | {"stop": (options["stop"],)}
        for name in options:
            if name not in cls.model_fields:
                raise InputError(f"generate has no argument '{name}'", hint=nearest(name, cls.model_fields))
        try:
            return cls(**options)
        except SettingsError as error:
            raise InputError(str(error)) from None


# Numbers that are drawn at a time, which does not change them. It is now more and now less, so that answers which began
# together do not draw in the same step: between other work it takes a tenth of a millisecond each.
AHEAD = range(64, 320, 48)
_ahead = itertools.cycle(AHEAD)
AGES = 1 << 40  # more choices than there will be


class Choice(NamedTuple):
    """A token, its log-probability in nats under the model's own distribution (unfiltered, temperature
    1), and the likeliest tokens with theirs."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Unusable(ArmillaryError):
    """Scores from which no token can be chosen."""


class Chooser:
    """Chooses the tokens of one sequence.

    prompt: its tokens; ends: the ids that end an answer; stream: keeps the draws of sequences
    with one seed apart; steps: constraints; mark: a watermark.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int],
        *,
        ends: Sequence[int] = (),
        stream: int = 0,
        steps: Sequence[Step] = (),
        mark: Mark | None = None,
    ) -> None:
        self.sampling, self.ends, self.steps = sampling, list(ends), tuple(steps)
        self.mark = None if mark is None else mark.begin()
        self.greedy = c_float(sampling.temperature).value == 0  # in the precision in which scores are divided
        # A fixed odd multiplier keeps the streams of neighbouring sequences and seeds apart.
        self._generator = torch.Generator().manual_seed((sampling.seed * 0x9E3779B1 + stream) & 0x7FFFFFFF_FFFFFFFF)
        self._draws = deque[float]()  # drawn and not used yet
        self.ids = list(prompt)
        self.begun = len(self.ids)
        self.plain = sampling.plain and not self.steps and mark is None
        self.seen = Tally(self.ids if sampling.repetition_penalty != 1.0 else None)
        self.counted = Tally(() if sampling.presence_penalty or sampling.frequency_penalty else None)
        self.bounded = bool(self.ends) and (sampling.min_new_tokens > 0 or sampling.target_new_tokens is not None)
        alone = self.steps[0] if len(self.steps) == 1 else None
        self.sieve = cast(Sieve, alone) if hasattr(alone, "look") else None
        self._row: _Row | None = None
        # whether anything but the text itself hears of a token
        self.told = bool(self.steps) or self.mark is not None or self.seen.counts_any or self.counted.counts_any

    @property
    def unmoved(self) -> int:
        """For how many choices after the next one its row stays as it is."""
        if self.steps or self.seen.counts_any or self.counted.counts_any:
            return 0
        if not self.bounded:
            return AGES
        left = self.sampling.min_new_tokens - self.generated
        if self.sampling.target_new_tokens is not None:
            return max(0, left - 1)
        return left - 1 if left > 0 else AGES

    @property
    def generated(self) -> int:
        return len(self.ids) - self.begun

    def draw(self) -> float:
        """The next number in [0, 1) of its own stream, which is drawn ahead."""
        if not self._draws:
            self._drawn(1)
        return self._draws.popleft()

    def ahead(self, count: int) -> list[float]:
        """The next numbers that it will draw, 0 for those of greedy choices."""
        if self.greedy:
            return [0.0] * count
        self._drawn(count)
        return list(islice(self._draws, count))

    def _drawn(self, count: int) -> None:
        while len(self._draws) < count:
            more = min(next(_ahead), self.sampling.max_new_tokens)
            self._draws.extend(torch.rand(more, dtype=torch.float64, generator=self._generator).tolist())

    def stepped(self, scores: Tensor) -> Tensor:
        """Scores [V] float32, which may be changed, with constraints applied."""
        for step in self.steps:
            given = step.apply(scores, self.ids)
            if given.shape != scores.shape or given.device != scores.device:
                raise ValueError(f"{type(step).__name__} made {list(given.shape)} scores of {list(scores.shape)}")
            scores = given.float()
        return scores

    def ends_within(self, vocabulary: int) -> list[int]:
        """The ends that can be chosen at all."""
        return [end for end in self.ends if 0 <= end < vocabulary]

    def end_rule(self) -> tuple[Ends, float]:
        """What happens to the scores of the ends now, and what is added to them."""
        sampling = self.sampling
        if self.generated < sampling.min_new_tokens:
            return Ends.FORBID_UNLESS_ALL if self.steps else Ends.FORBID, 0.0
        if sampling.target_new_tokens is not None:
            done = self.generated / sampling.target_new_tokens
            return Ends.ADD_TO, 10 * max(-1.0, min(1.0, 2 * (done - 1)))
        return Ends.LEAVE, 0.0

    def check_bias(self, vocabulary: int) -> None:
        """Raises InputError for a bias of a token that is none."""
        for token in self.sampling.logit_bias:
            if not 0 <= token < vocabulary:
                raise InputError(f"logit_bias names the token {token}; the vocabulary has {vocabulary}")

    def shaped(self, scores: Tensor) -> Tensor:
        """Scores [V] float32 with constraints, biases, penalties and bounds applied."""
        sampling = self.sampling
        scores = self.stepped(scores.clone())
        self.check_bias(len(scores))
        for token, bias in sampling.logit_bias.items():
            scores[token] += bias
        if self.seen.tokens:
            seen = torch.tensor(self.seen.tokens, dtype=torch.int64)
            picked, penalty = scores[seen], sampling.repetition_penalty
            scores[seen] = torch.where(picked > 0, picked / penalty, picked * penalty)
        if self.counted.tokens:
            tokens = torch.tensor(self.counted.tokens, dtype=torch.int64)
            counts = torch.tensor(self.counted.counts, dtype=scores.dtype)
            scores[tokens] -= sampling.presence_penalty + sampling.frequency_penalty * counts
        rule, amount = self.end_rule() if self.bounded else (Ends.LEAVE, 0.0)
        ends = self.ends_within(len(scores))
        if rule is Ends.ADD_TO:
            scores[ends] += amount
        elif rule is not Ends.LEAVE:
            kept = scores[ends].clone()
            scores[ends] = -torch.inf
            if rule is Ends.FORBID_UNLESS_ALL and bool((scores == -torch.inf).all()):
                scores[ends] = kept  # a constraint that allows nothing but the end stands above a bound
        return scores

    def accept(self, token: int) -> None:
        self.ids.append(token)
        if not self.plain:
            self.seen.add(token)
            self.counted.add(token)
            for step in self.steps:
                step.accept(token)
            if self.mark is not None:
                self.mark.accept(token)

    def row(self, width: int, line: Tensor | None = None) -> Row:
        """For the C library: what is asked of a row of so many scores; line: the scores, for steps."""
        if self._row is None:
            self._row = _Row(self, width)
        if not self.plain:
            self._row.shape(self, line)
        return self._row.row


class Tally:
    """Tokens and how often each came, in memory that C can read; tokens: to begin with, or None: none is counted."""

    def __init__(self, tokens: Iterable[int] | None) -> None:
        self.tokens, self.counts = array("q"), array("f")
        self.counts_any = tokens is not None
        self._places: dict[int, int] = {}
        for token in tokens or ():
            self.add(token)

    def add(self, token: int) -> None:
        if not self.counts_any:
            return
        place = self._places.setdefault(token, len(self.tokens))
        if place == len(self.tokens):
            self.tokens.append(token)
            self.counts.append(0.0)
        self.counts[place] += 1.0


def row_of(asked: Sampling) -> Row:
    """For the C library: temperature and filters, nothing else."""
    return Row(
        temperature=asked.temperature,
        top_k=asked.top_k or 0,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        least=-math.inf if asked.min_p is None else math.log(asked.min_p),
        repetition=1.0,
    )


class _Row:
    """A chooser's row for the C library: what stays is written once, what moves before every choice."""

    def __init__(self, chooser: Chooser, vocabulary: int) -> None:
        asked = chooser.sampling
        chooser.check_bias(vocabulary)
        self._bias_ids, self._biases = array("q", asked.logit_bias), array("f", asked.logit_bias.values())
        self._ends = array("q", chooser.ends_within(vocabulary))
        self._scores: Tensor | None = None  # there until the choice is made
        self.row = row_of(asked)
        self.row.tops, self.row.repetition = asked.alternatives, asked.repetition_penalty
        self.row.presence, self.row.frequency = asked.presence_penalty, asked.frequency_penalty
        self.row.biased_ids, self.row.biased = self._bias_ids.buffer_info()
        self.row.biases = self._biases.buffer_info()[0]
        self.row.end_ids, self.row.ends = self._ends.buffer_info()
        if chooser.sieve is not None:
            self.row.bits, self.row.tokens = chooser.sieve.address, chooser.sieve.tokens

    def shape(self, chooser: Chooser, line: Tensor | None) -> None:
        """What the answer has come to."""
        row = self.row
        if chooser.sieve is not None:
            chooser.sieve.look()
        elif chooser.steps:
            assert line is not None
            self._scores = chooser.stepped(line.flatten().to(torch.float32, copy=True)).contiguous()
            row.scores = self._scores.data_ptr()
        if chooser.bounded:
            row.end_rule, row.end_amount = chooser.end_rule()
        if chooser.seen.tokens:
            row.seen_ids, row.seen = chooser.seen.tokens.buffer_info()
        if chooser.counted.tokens:
            row.counted_ids, row.counted = chooser.counted.tokens.buffer_info()
            row.counts = chooser.counted.counts.buffer_info()[0]
