"""How the next token is chosen from its scores: filters, penalties, seeds.

Order: repetition penalty, temperature, top-k, top-p, min-p, draw. Every row draws from its own
generator, so a row's tokens do not depend on its neighbours in the batch.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
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
    stop: tuple[str, ...] = Field((), description="texts that end a completion; they are left out of it")
    seed: int = Field(0, description="seed of the draws")

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


class Sampler:
    """Chooses tokens for the rows of a batch; `rows` picks which generators go on."""

    def __init__(self, sampling: Sampling, prompts: list[list[int]], vocabulary: int, device: torch.device) -> None:
        self.sampling = sampling
        # A fixed odd multiplier keeps the streams of neighbouring rows and seeds apart.
        self.generators = [
            torch.Generator().manual_seed((sampling.seed * 0x9E3779B1 + row) & 0x7FFFFFFF_FFFFFFFF)
            for row in range(len(prompts))
        ]
        self.seen: Tensor | None = None
        if sampling.repetition_penalty != 1.0:
            self.seen = torch.zeros(len(prompts), vocabulary, dtype=torch.bool, device=device)
            for row, prompt in enumerate(prompts):
                self.seen[row, torch.tensor(prompt, dtype=torch.int64, device=device)] = True

    def pick(self, logits: Tensor, rows: list[int]) -> tuple[Tensor, Tensor]:
        """logits [b, V] of the given rows → tokens [b] int64 and their log-probabilities [b] under the
        unfiltered distribution at temperature 1."""
        scores = logits.float()
        plain = torch.log_softmax(scores, -1)
        if self.seen is not None:
            penalty = self.sampling.repetition_penalty
            shrunk = torch.where(scores > 0, scores / penalty, scores * penalty)
            scores = torch.where(self.seen[rows], shrunk, scores)
        if self.sampling.temperature == 0:
            tokens = scores.argmax(-1)
        else:
            tokens = self._draw(filtered(scores / self.sampling.temperature, self.sampling), rows)
        if self.seen is not None:
            self.seen[rows, tokens] = True
        return tokens, plain.gather(1, tokens[:, None])[:, 0]

    def _draw(self, scores: Tensor, rows: list[int]) -> Tensor:
        ladder = torch.softmax(scores, -1).double().cumsum(-1)
        draws = torch.stack([torch.rand((), dtype=torch.float64, generator=self.generators[row]) for row in rows])
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
