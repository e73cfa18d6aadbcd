"""Decoding through the network's state: batches of ragged prompts, streaming, stop strings.

`stream` yields pieces of text as they are certain; `generate` gathers them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from armillary.base.errors import InputError
from armillary.engine.sampling import Sampler, Sampling
from armillary.nn.network import Network
from armillary.nn.positions.learned import LearnedPosition
from armillary.nn.taps import Taps
from armillary.text import StreamDecoder, Tokenizer

Finish = Literal["stop", "end", "length"]


@dataclass
class Completion:
    """text: what was generated; ids: its tokens; logprobs: the log-probability of each, in nats, under
    the network's own distribution; finish: why it ended (a stop text, the end token, the length)."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: Finish = "length"


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
    side: Mapping[str, Tensor] | None = None,
    taps: Taps | None = None,
) -> Completions:
    """Complete every prompt (token ids); side: named tensors that mechanisms take, a row for each prompt."""
    done = Completions(Completion() for _ in prompts)
    for piece in stream(network, tokenizer, prompts, sampling, into=done, side=side, taps=taps):
        done[piece.row].text += piece.text
    return done


@torch.no_grad()
def stream(
    network: Network,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    into: Completions | None = None,
    side: Mapping[str, Tensor] | None = None,
    taps: Taps | None = None,
) -> Iterator[Piece]:
    """Yield text as soon as it is certain: whole characters, and nothing that may begin a stop text.

    into: completions to fill with ids, log-probabilities and reasons on the way.
    """
    starts = [list(prompt) for prompt in prompts]
    if not starts:
        return
    _check(network, starts, sampling)
    device = network.device
    side = {name: tensor.to(device) for name, tensor in (side or {}).items()}
    done = into if into is not None else Completions(Completion() for _ in starts)
    sampler = Sampler(sampling, starts, network.settings.vocabulary or 0, device)
    writers = [_Writer(tokenizer.stream(), sampling.stop) for _ in starts]
    longest = max(len(prompt) for prompt in starts)
    ids = torch.zeros(len(starts), longest, dtype=torch.int64)
    for row, prompt in enumerate(starts):
        ids[row, : len(prompt)] = torch.tensor(prompt, dtype=torch.int64)
    ragged = any(len(prompt) < longest for prompt in starts)
    lengths = torch.tensor([len(prompt) for prompt in starts], device=device) if ragged else None
    state = network.init_state(len(starts), longest + sampling.max_new_tokens)
    logits = network.extend(ids.to(device), state, lengths=lengths, side=side, last=True, taps=taps)[:, 0]
    rows = list(range(len(starts)))
    for step in range(sampling.max_new_tokens):
        tokens, logprobs = sampler.pick(logits, rows)
        keep: list[int] = []
        for place, (row, token, logprob) in enumerate(zip(rows, tokens.tolist(), logprobs.tolist(), strict=True)):
            writer, one = writers[row], done[row]
            if token == tokenizer.eos:
                one.finish = "end"
                yield Piece(row, writer.close(), "end")
                continue
            one.ids.append(token)
            one.logprobs.append(logprob)
            text = writer.push(token)
            if writer.stopped:
                one.finish = "stop"
                yield Piece(row, text, "stop")
            elif step + 1 == sampling.max_new_tokens:
                rest = writer.close()
                one.finish = "stop" if writer.stopped else "length"
                yield Piece(row, text + rest, one.finish)
            else:
                keep.append(place)
                if text:
                    yield Piece(row, text)
        if not keep or step + 1 == sampling.max_new_tokens:
            return
        if len(keep) < len(rows):
            picked = torch.tensor(keep, device=device)
            state, tokens = state.select(picked), tokens[picked]
            rows = [rows[place] for place in keep]
            side = {name: tensor[picked] for name, tensor in side.items()}
        logits = network.extend(tokens[:, None], state, side=side, taps=taps)[:, 0]


class _Writer:
    """Text of one row: holds back what may still turn into a stop text."""

    def __init__(self, decoder: StreamDecoder, stops: Sequence[str]) -> None:
        self.decoder, self.stops = decoder, [stop for stop in stops if stop]
        self.held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        return self._settle(self.decoder.push(token), last=False)

    def close(self) -> str:
        return "" if self.stopped else self._settle(self.decoder.finish(), last=True)

    def _settle(self, text: str, last: bool) -> str:
        self.held += text
        found = [at for at in (self.held.find(stop) for stop in self.stops) if at >= 0]
        if found:
            self.stopped = True
            text, self.held = self.held[: min(found)], ""
            return text
        waiting = 0 if last else max((_overlap(self.held, stop) for stop in self.stops), default=0)
        cut = len(self.held) - waiting
        text, self.held = self.held[:cut], self.held[cut:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0


def _check(network: Network, prompts: list[list[int]], sampling: Sampling) -> None:
    vocabulary = network.settings.vocabulary or 0
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise InputError(f"prompt {row} has no tokens", hint="give at least one token")
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            raise InputError(f"prompt {row} holds an id outside the vocabulary of {vocabulary}")
    if isinstance(network.position, LearnedPosition):
        needed = max(len(prompt) for prompt in prompts) + sampling.max_new_tokens
        if needed > network.position.length:
            raise InputError(
                f"prompt and completion need {needed} positions, but {network.position.length} were learned",
                hint="shorten the prompt or max_new_tokens",
            )
