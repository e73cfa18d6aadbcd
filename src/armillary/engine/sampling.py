"""How the next token is chosen from its scores: what is asked for, and the choice itself.

Order: constraints; biases, penalties and bounds of length; temperature, top-k, top-p, min-p; watermark;
draw. Every sequence draws from its own generator, once per token, so its tokens do not depend on its
neighbours in the batch, nor on whether they were guessed beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from pydantic import Field, model_validator
from torch import Tensor

from armillary.base.errors import InputError, SettingsError, nearest
from armillary.base.settings import Settings


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


class Step(Protocol):
    """Something that changes the scores of one sequence: a constraint before anything else, a watermark
    after everything else."""

    def apply(self, scores: Tensor, ids: Sequence[int]) -> Tensor:
        """Scores [V] float32 after the tokens `ids` → new scores; may change them in place."""
        ...

    def accept(self, token: int) -> None:
        """The token that was chosen."""
        ...


class Mark(Protocol):
    """What watermarks answers: gives each a step of its own, which sees the scores that are drawn from."""

    @property
    def draws(self) -> bool:
        """Whether it acts through the draw, so that a greedy answer cannot carry it."""
        ...

    def begin(self) -> Step: ...


@dataclass(frozen=True)
class Choice:
    """A token, its log-probability in nats under the model's own distribution (unfiltered, temperature
    1), and the likeliest tokens with theirs."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


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
        # A fixed odd multiplier keeps the streams of neighbouring sequences and seeds apart.
        self.generator = torch.Generator().manual_seed((sampling.seed * 0x9E3779B1 + stream) & 0x7FFFFFFF_FFFFFFFF)
        self.ids = list(prompt)
        self.begun = len(self.ids)
        self.plain = sampling.plain and not self.steps and mark is None
        self._seen = set(self.ids)
        self._counts: dict[int, int] = {}

    @property
    def generated(self) -> int:
        return len(self.ids) - self.begun

    def shaped(self, scores: Tensor) -> Tensor:
        """Scores [V] float32 with constraints, biases, penalties and bounds applied."""
        sampling = self.sampling
        scores = scores.clone()
        for step in self.steps:
            scores = step.apply(scores, self.ids)
        for token, bias in sampling.logit_bias.items():
            if not 0 <= token < len(scores):
                raise InputError(f"logit_bias names the token {token}; the vocabulary has {len(scores)}")
            scores[token] += bias
        if sampling.repetition_penalty != 1.0:
            seen = torch.tensor(sorted(self._seen), dtype=torch.int64)
            picked, penalty = scores[seen], sampling.repetition_penalty
            scores[seen] = torch.where(picked > 0, picked / penalty, picked * penalty)
        if self._counts and (sampling.presence_penalty or sampling.frequency_penalty):
            tokens = torch.tensor(list(self._counts), dtype=torch.int64)
            counts = torch.tensor(list(self._counts.values()), dtype=scores.dtype)
            scores[tokens] -= sampling.presence_penalty + sampling.frequency_penalty * counts
        if self.ends:
            if self.generated < sampling.min_new_tokens:
                kept = scores[self.ends].clone()
                scores[self.ends] = -torch.inf
                if self.steps and not bool(torch.isfinite(scores).any()):
                    scores[self.ends] = kept  # a constraint that allows nothing but the end stands above a bound
            elif sampling.target_new_tokens is not None:
                done = self.generated / sampling.target_new_tokens
                scores[self.ends] += 10 * max(-1.0, min(1.0, 2 * (done - 1)))
        return scores

    def accept(self, token: int) -> None:
        self.ids.append(token)
        if not self.plain:
            self._seen.add(token)
            self._counts[token] = self._counts.get(token, 0) + 1
            for step in (*self.steps, *([] if self.mark is None else [self.mark])):
                step.accept(token)


def choose(logits: Tensor, choosers: Sequence[Chooser]) -> list[Choice]:
    """One token for each row of logits [n, V], by the chooser of the row."""
    scores = logits.float()
    own = torch.log_softmax(scores, -1)
    if not all(chooser.plain for chooser in choosers):
        scores = torch.stack(
            [row if chooser.plain else chooser.shaped(row) for row, chooser in zip(scores, choosers, strict=True)]
        )
    tokens = torch.empty(len(choosers), dtype=torch.int64, device=logits.device)
    groups: dict[tuple[Any, ...], list[int]] = {}
    for row, chooser in enumerate(choosers):
        asked = chooser.sampling
        greedy = asked.temperature == 0
        groups.setdefault(() if greedy else (asked.temperature, asked.top_k, asked.top_p, asked.min_p), []).append(row)
    for kind, rows in groups.items():
        some = scores if len(rows) == len(choosers) else scores[rows]
        asked = choosers[rows[0]].sampling
        if kind:
            some = filtered(some / asked.temperature, asked)
        if any(choosers[row].mark is not None for row in rows):
            some = torch.stack([_marked(one, choosers[row]) for one, row in zip(some, rows, strict=True)])
        tokens[rows] = _draw(some, [choosers[row].generator for row in rows]) if kind else some.argmax(-1)
    logprobs = own.gather(1, tokens[:, None])[:, 0].tolist()
    found = []
    for row, (chooser, token) in enumerate(zip(choosers, tokens.tolist(), strict=True)):
        chooser.accept(token)
        top: tuple[tuple[int, float], ...] = ()
        if chooser.sampling.alternatives:
            top = likeliest(own[row], chooser.sampling.alternatives)
        found.append(Choice(token, logprobs[row], top))
    return found


def likeliest(logprobs: Tensor, count: int) -> tuple[tuple[int, float], ...]:
    """The `count` likeliest tokens of [V], the first first."""
    values, tokens = logprobs.topk(min(count, len(logprobs)))
    return tuple(zip(tokens.tolist(), values.tolist(), strict=True))


def _marked(scores: Tensor, chooser: Chooser) -> Tensor:
    return scores if chooser.mark is None else chooser.mark.apply(scores, chooser.ids)


def _draw(scores: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    ladder = torch.softmax(scores, -1).double().cumsum(-1)
    draws = torch.stack([torch.rand((), dtype=torch.float64, generator=one) for one in generators])
    goal = draws.to(ladder.device)[:, None] * ladder[:, -1:]
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
        ordered, order = scores.sort(-1, descending=True)
        share = torch.softmax(ordered, -1)
        beyond = share.cumsum(-1) - share >= sampling.top_p
        scores = scores.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)
    if sampling.min_p is not None:
        floor = scores.amax(-1, keepdim=True) + torch.tensor(sampling.min_p).log()
        scores = scores.masked_fill(scores < floor, -torch.inf)
    return scores
