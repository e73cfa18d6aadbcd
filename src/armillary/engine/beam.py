"""Beam search: the likeliest continuations that a search of a few beams finds.

A step takes every beam's next tokens, keeps the best (1 + ends)·beams of all, moves those that end (among the best
`beams`) to the finished ones, and goes on with the best `beams` of the others; rows of the network's state
follow by `select`. What is finished is ranked by its log-probability over length^length_penalty, its end
token counted (Wu et al. 2016, Google's Neural Machine Translation System, with plain powers of the length).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from armillary.base.errors import InputError, SettingsError, nearest
from armillary.base.settings import Settings
from armillary.engine.request import GenerationError
from armillary.nn.network import Network
from armillary.nn.taps import Taps


class Beams(Settings):
    """early_stopping: true: as soon as `beams` are finished; false: when the best open beam, at its present
    length, is no better than the worst of so many finished ones; never: when it cannot become better."""

    beams: int = Field(4, gt=0, description="sequences that are followed at a time")
    returned: int = Field(1, gt=0, description="so many of the best finished sequences are given out")
    max_new_tokens: int = Field(64, gt=0, description="at most this many new tokens")
    min_new_tokens: int = Field(0, ge=0, description="no end before so many")
    length_penalty: float = Field(
        1.0, description="log-probabilities are divided by length to this power; above 0 favours long ones"
    )
    early_stopping: bool | Literal["never"] = Field(False, description="when the search ends")
    logit_bias: dict[int, float] = Field({}, description="added to the log-probabilities of tokens")

    @model_validator(mode="after")
    def _coherent(self) -> Beams:
        if self.returned > self.beams:
            raise ValueError(f"returned is {self.returned}, more than beams, {self.beams}")
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens is {self.min_new_tokens}, more than max_new_tokens, {self.max_new_tokens}"
            )
        return self

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Beams:
        """From keyword arguments; raises InputError that names the argument."""
        for name in options:
            if name not in cls.model_fields:
                raise InputError(f"a search with beams has no argument '{name}'", hint=nearest(name, cls.model_fields))
        try:
            return cls(**options)
        except SettingsError as error:
            raise InputError(str(error)) from None


@dataclass(frozen=True)
class Found:
    """A sequence: its new tokens (without the end token), the log-probability of each in nats, its score,
    and whether it ended by itself."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    score: float
    ended: bool


@torch.no_grad()
def search(
    network: Network,
    prompt: Sequence[int],
    asked: Beams,
    *,
    ends: Sequence[int] = (),
    source: Sequence[int] | None = None,
    side: Mapping[str, int] | None = None,
    taps: Taps | None = None,
) -> list[Found]:
    """The best `asked.returned` continuations of a prompt (token ids), the best first.

    ends: the ids that end a sequence; source: what an encoder–decoder reads; side: numbers that mechanisms
    take. Raises InputError where prompt and continuation exceed what the network can hold.
    """
    if not prompt:
        raise InputError("the prompt has no tokens", hint="give at least one token")
    device = network.device
    given = None if source is None else torch.tensor([list(source)], device=device)
    state = network.init_state(1, len(prompt) + asked.max_new_tokens, source=given)
    numbers = {name: torch.tensor([value], device=device) for name, value in (side or {}).items()}
    if "prefix" in network.side_names:
        numbers["prefix"] = torch.tensor([len(prompt)], device=device)
    ids = torch.tensor([list(prompt)], device=device)
    logits = network.extend(ids, state, last=True, side=numbers, taps=taps)[:, -1]
    hunt = _Search(asked, ends, logits.shape[-1])
    while True:
        parents, tokens = hunt.step(logits.float())
        if hunt.over:
            return hunt.best()
        rows = torch.tensor(parents, device=device)
        state = state.select(rows)
        numbers = {name: value[rows] for name, value in numbers.items()}
        ids = torch.tensor(tokens, device=device)[:, None]
        logits = network.extend(ids, state, last=True, side=numbers, taps=taps)[:, -1]


@dataclass(frozen=True)
class _Beam:
    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    total: float = 0.0  # the log-probability of all, with biases


class _Search:
    """The beams of one prompt, without a network."""

    def __init__(self, asked: Beams, ends: Sequence[int], vocabulary: int) -> None:
        self.asked, self.ends, self.over = asked, list(ends), False
        self.open, self.finished = [_Beam()], list[Found]()
        for token in asked.logit_bias:
            if not 0 <= token < vocabulary:
                raise InputError(f"logit_bias names the token {token}; the vocabulary has {vocabulary}")

    def step(self, logits: Tensor) -> tuple[list[int], list[int]]:
        """Logits [open, V] → for each beam that goes on the row that it comes from, and its token."""
        asked, length = self.asked, len(self.open[0].ids) + 1
        if not bool(torch.isfinite(logits).any(-1).all()) or bool(torch.isnan(logits).any()):
            raise GenerationError("the network gave no finite scores")
        own = torch.log_softmax(logits, -1)
        scores = self._biased(own, length) + torch.tensor([[beam.total] for beam in self.open], device=own.device)
        values, places = scores.flatten().topk(min((1 + max(1, len(self.ends))) * asked.beams, scores.numel()))
        parents, tokens = places // own.shape[1], places % own.shape[1]
        chosen = own[parents, tokens].tolist()
        going, last = list[tuple[int, int, _Beam]](), length == asked.max_new_tokens
        ranked = enumerate(zip(values.tolist(), parents.tolist(), tokens.tolist(), chosen, strict=True))
        for rank, (total, parent, token, logprob) in ranked:
            if total == -torch.inf:
                break
            before = self.open[parent]
            ends = token in self.ends
            if ends or last:
                if rank < asked.beams:
                    self._finish(before, token, logprob, total / length**asked.length_penalty, ends)
            elif len(going) < asked.beams:
                going.append((parent, token, _Beam((*before.ids, token), (*before.logprobs, logprob), total)))
        self.open = [beam for _, _, beam in going]
        self.over = last or not going or self._settled(length)
        return [parent for parent, _, _ in going], [token for _, token, _ in going]

    def best(self) -> list[Found]:
        return self.finished[: self.asked.returned]

    def _biased(self, own: Tensor, length: int) -> Tensor:
        own = own.clone()
        for token, bias in self.asked.logit_bias.items():
            own[:, token] += bias
        if self.ends and length <= self.asked.min_new_tokens:
            own[:, self.ends] = -torch.inf
        return own

    def _finish(self, before: _Beam, token: int, logprob: float, score: float, ends: bool) -> None:
        """Kept in order of their scores, the earlier first where they are equal."""
        if self.asked.early_stopping is True and len(self.finished) == self.asked.beams:
            return
        ids = before.ids if ends else (*before.ids, token)
        logprobs = before.logprobs if ends else (*before.logprobs, logprob)
        self.finished.append(Found(ids, logprobs, score, ends))
        self.finished.sort(key=lambda one: -one.score)
        del self.finished[self.asked.beams :]

    def _settled(self, length: int) -> bool:
        """Whether the open beams no longer matter."""
        asked = self.asked
        if len(self.finished) < asked.beams:
            return False
        if asked.early_stopping is True:
            return True
        longest = asked.early_stopping == "never" and asked.length_penalty > 0
        reached = asked.max_new_tokens if longest else length
        best: float = self.open[0].total / reached**asked.length_penalty
        return best <= self.finished[-1].score
