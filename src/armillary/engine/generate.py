"""Completions of prompts, on an engine made for them.

`stream` yields pieces of text as they are certain; `generate` gathers them; `generate_beams` searches for the
likeliest ones instead of drawing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from armillary.base.errors import InputError
from armillary.engine.beam import Beams, search
from armillary.engine.core import Engine
from armillary.engine.drafts import Drafter
from armillary.engine.replay import Held
from armillary.engine.request import Answer, Request
from armillary.engine.request import Piece as Given
from armillary.engine.sampling import Sampling
from armillary.engine.steps import Mark
from armillary.nn.cache import Cache
from armillary.nn.network import Network
from armillary.nn.taps import Taps
from armillary.text import Tokenizer

Finish = Literal["stop", "end", "length"]
MOST = 64  # prompts under way at a time


@dataclass
class Completion:
    """text: what was generated; ids: its tokens; logprobs: the log-probability of each, in nats, under
    the network's own distribution; finish: why it ended (a stop text, the end token, the length); score:
    of a search with beams, what it was ranked by."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: Finish = "length"
    score: float | None = None


class Completions(list[Completion]):
    """One completion per prompt; the fields of all of them as lists."""

    @property
    def text(self) -> list[str]:
        return [one.text for one in self]

    @property
    def ids(self) -> list[list[int]]:
        return [one.ids for one in self]

    @property
    def logprobs(self) -> list[list[float]]:
        return [one.logprobs for one in self]


@dataclass(frozen=True)
class Piece:
    """A piece of text of prompt number `row`; finish is set on a row's last piece."""

    row: int
    text: str
    finish: Finish | None = None


def generate(
    network: Network,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    sources: Sequence[Sequence[int]] | None = None,
    side: Mapping[str, Tensor] | None = None,
    taps: Taps | None = None,
    mark: Mark | None = None,
    cache: Cache | None = None,
    drafter: Drafter | None = None,
    weights: Held = "auto",
) -> Completions:
    """Complete every prompt (token ids).

    sources: what an encoder–decoder reads for each; side: numbers that mechanisms take, [prompts] by name;
    mark: a watermark; cache: how keys and values are kept (see `nn.cache`); drafter: guesses tokens, which are
    then checked together; weights: how decoding on a CPU holds them (see `Engine`).
    """
    done = Completions(Completion() for _ in prompts)
    more: dict[str, Any] = {"sources": sources, "side": side, "taps": taps}
    more |= {"mark": mark, "cache": cache, "drafter": drafter, "weights": weights}
    for piece in stream(network, tokenizer, prompts, sampling, into=done, **more):
        done[piece.row].text += piece.text
    return done


def stream(
    network: Network,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    into: Completions | None = None,
    sources: Sequence[Sequence[int]] | None = None,
    side: Mapping[str, Tensor] | None = None,
    taps: Taps | None = None,
    mark: Mark | None = None,
    cache: Cache | None = None,
    drafter: Drafter | None = None,
    weights: Held = "auto",
) -> Iterator[Piece]:
    """Yield text as soon as it is certain: whole characters, and nothing that may begin a stop text.

    into: completions to fill with ids, log-probabilities and reasons on the way; pieces may then be of many tokens.
    """
    if not prompts:
        return
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise InputError(f"prompt {row} has no tokens", hint="give at least one token")
    done = into if into is not None else Completions(Completion() for _ in prompts)
    longest = max(len(prompt) for prompt in prompts) + sampling.max_new_tokens
    more: dict[str, Any] = {"cache": cache, "drafter": drafter, "taps": taps, "weights": weights}
    engine = Engine(network, tokenizer, slots=min(MOST, len(prompts)), capacity=longest, keep=False, **more)
    given = _numbers(side or {}, len(prompts))
    answers = [
        engine.submit(
            Request(
                tuple(prompt),
                sampling,
                source=None if sources is None else tuple(sources[row]),
                side={name: numbers[row] for name, numbers in given.items()},
                stream=row,
                mark=mark,
                whole=into is not None,
            )
        )
        for row, prompt in enumerate(prompts)
    ]
    open_ = list(range(len(prompts)))
    while open_:
        engine.step()
        for row in list(open_):
            for piece in _new(answers[row]):
                done[row].ids += [choice.token for choice in piece.choices]
                done[row].logprobs += [choice.logprob for choice in piece.choices]
                if piece.finish is not None:
                    open_.remove(row)
                    assert piece.finish in ("stop", "end", "length")
                    done[row].finish = piece.finish
                if piece.text or piece.finish is not None:
                    yield Piece(row, piece.text, done[row].finish if piece.finish is not None else None)


def generate_beams(
    network: Network,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    asked: Beams,
    *,
    sources: Sequence[Sequence[int]] | None = None,
    side: Mapping[str, Tensor] | None = None,
    taps: Taps | None = None,
) -> list[Completions]:
    """The best `asked.returned` completions of every prompt, the best first."""
    given = _numbers(side or {}, len(prompts))
    done = []
    for row, prompt in enumerate(prompts):
        found = search(
            network,
            prompt,
            asked,
            ends=tokenizer.ends,
            source=None if sources is None else sources[row],
            side={name: numbers[row] for name, numbers in given.items()},
            taps=taps,
        )
        done.append(
            Completions(
                Completion(
                    tokenizer.decode(list(one.ids)),
                    list(one.ids),
                    list(one.logprobs),
                    "end" if one.ended else "length",
                    one.score,
                )
                for one in found
            )
        )
    return done


def _new(answer: Answer) -> Iterator[Given]:
    for piece in answer.ready():
        if piece.finish == "error":
            raise answer.failure
        yield piece


def _numbers(side: Mapping[str, Tensor], rows: int) -> dict[str, list[int]]:
    for name, tensor in side.items():
        if tensor.shape != (rows,):
            raise InputError(
                f"the side tensor '{name}' has shape {tuple(tensor.shape)}", hint=f"give one number a prompt, [{rows}]"
            )
    return {name: tensor.tolist() for name, tensor in side.items()}
