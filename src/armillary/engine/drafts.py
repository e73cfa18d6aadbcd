"""Guesses of the next tokens, which the network then checks together.

The tokens are chosen by the network's own scores exactly as without guesses; a right guess only saves
a step. So no guess can change an answer, whatever its temperature.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import exp
from typing import NamedTuple, Protocol

import torch

from armillary.base.errors import InputError
from armillary.engine.choosing import guess_one
from armillary.engine.prefix import Match, Snapshot
from armillary.engine.replay import Held
from armillary.engine.sampling import Sampling, row_of
from armillary.engine.slots import Slots
from armillary.native.choice import Row
from armillary.nn.network import Network
from armillary.text import Tokenizer


class Drafter(Protocol):
    """Guesses how a sequence goes on.

    `count` says how many tokens it guesses at the most, if it has one, `nbytes` what its states can come to. One that
    has `write`, too, is asked by it, with what is known of how the tokens are chosen (`DraftModel`).
    """

    def propose(self, ids: Sequence[int], most: int) -> list[int]:
        """At most `most` tokens that may follow `ids`; none if there is no good guess."""
        ...


class PromptLookup:
    """What followed the last time that the last tokens were seen (Saxena 2023, Prompt Lookup Decoding).

    longest, shortest: how many of the last tokens must agree; count: tokens guessed.
    """

    def __init__(self, count: int = 6, longest: int = 4, shortest: int = 2) -> None:
        self.count, self.longest, self.shortest = count, longest, shortest

    def propose(self, ids: Sequence[int], most: int) -> list[int]:
        numbers = array("q", ids)
        unit, text = numbers.itemsize, numbers.tobytes()
        for size in range(min(self.longest, len(ids) - 1), self.shortest - 1, -1):
            wanted, stop = text[-size * unit :], len(text) - unit
            while (at := text.rfind(wanted, 0, stop)) >= 0:
                if at % unit == 0:
                    start = at // unit + size
                    return list(ids[start : start + min(self.count, most)])
                stop = at + len(wanted) - 1  # it lay across tokens
        return []


class Manner(NamedTuple):
    """How the tokens of an answer are chosen: what is asked, and the draws of the next ones. A guess is worth making if
    that power of its probability, times that of those before it, is no less than `least`."""

    sampling: Sampling
    draws: Sequence[float]
    least: float = 0.0
    power: float = 1.0


GREEDY = Sampling(temperature=0)


@dataclass
class _Row:
    """What the draft has read in one of its places: `ids`, the first `sure` of which were no guesses."""

    ids: list[int] = field(default_factory=list)
    sure: int = 0
    before: Snapshot = field(default_factory=dict)  # of the states that cannot be cut, after the sure ones


class DraftModel:
    """A small network with the same vocabulary writes on (Leviathan, Kalman & Matias 2023, Fast Inference from
    Transformers via Speculative Decoding). Where tokens are drawn it draws by the same numbers, so that it lands on the
    same token where the two distributions are alike.

    count: most tokens guessed; sure: it stops guessing where its own token has less than this probability; rows:
    sequences whose states it keeps; weights: how they are held (`Engine`): no loss in them can change an answer, so
    that auto is bf16 or int8, whichever is quicker; vocabulary: entries that may be guessed, where the draft has more
    of them (padding).
    """

    def __init__(
        self,
        network: Network,
        count: int = 6,
        sure: float = 0.0,
        *,
        rows: int = 16,
        weights: Held = "auto",
        vocabulary: int | None = None,
    ) -> None:
        _check_form(network.settings.form)
        self.network, self.count, self.sure, self.vocabulary = network, count, sure, vocabulary
        self._known = network.settings.vocabulary or 0
        self._slots = Slots(network, rows, network.settings.context, weights=weights, loose=True)
        self._rows = {place: _Row() for place in range(rows)}  # the one used longest ago first
        self._lock = threading.Lock()  # several engines may ask

    @property
    def nbytes(self) -> int:
        """What its states can come to."""
        slots = self._slots
        return slots.count * (slots.fixed + slots.each * slots.capacity)

    def propose(self, ids: Sequence[int], most: int) -> list[int]:
        return self.write(ids, most, Manner(GREEDY, [0.0] * most))[0]

    def write(self, ids: Sequence[int], most: int, manner: Manner) -> tuple[list[int], list[float]]:
        """As `propose`, for tokens that are chosen like this, and what probability it gives each."""
        with self._lock, torch.no_grad():
            return self._write(ids, most, manner)

    def _write(self, ids: Sequence[int], most: int, manner: Manner) -> tuple[list[int], list[float]]:
        text, most = list(ids), min(most, self.count, len(manner.draws))
        # the last guess is not read before it is known to be right
        if most < 1 or len(text) + most - 1 > self._slots.capacity:
            return [], []
        place = self._resumed(text)
        row = self._rows[place]
        unread = text[len(row.ids) :]
        if max(unread) >= self._known:  # an entry that no text has: the model's own padding
            return [], []
        draws, choice = manner.draws[:most], row_of(manner.sampling)
        if self._slots.divisible and self._slots.replay is not None:
            found = self._slots.replay.go_on(
                place, unread, choice, draws, bounds=(self.sure, *manner[2:]), vocabulary=self.vocabulary
            )
            if found is not None:
                row.ids, row.sure = text + found[0][: most - 1], len(text)
                return found
        return self._step_by_step(place, text, unread, choice, manner._replace(draws=draws))

    def _step_by_step(
        self, place: int, text: list[int], unread: list[int], choice: Row, manner: Manner
    ) -> tuple[list[int], list[float]]:
        """As `Replay.go_on` does, in plain steps."""
        row, found, sure = self._rows[place], list[int](), list[float]()
        logits = self._slots.extend([place], [unread])[0]
        row.ids, row.sure, chance = text, len(text), 1.0
        if not self._slots.divisible:
            row.before = self._slots.snapshot(place)
        for draw in manner.draws:
            if found:
                logits = self._slots.extend([place], [found[-1:]])[0]
                row.ids = [*row.ids, found[-1]]
            token, logprob = guess_one(logits, manner.sampling, choice, draw, self.vocabulary)
            chance *= exp(logprob)
            if exp(logprob) < self.sure or chance**manner.power < manner.least:
                break
            found.append(token)
            sure.append(exp(logprob))
        return found, sure

    def _resumed(self, text: list[int]) -> int:
        """The place with the longest beginning of the text, and no more than that, in its state."""
        best = 0
        chosen = next(iter(self._rows))
        for place, row in self._rows.items():
            if best < row.sure < len(text) and text[: row.sure] == row.ids[: row.sure]:
                best, chosen = row.sure, place
        row = self._rows[chosen]
        del self._rows[chosen]
        self._rows[chosen] = row
        if not best:
            self._slots.begin(chosen, Match())
            row.ids, row.sure = [], 0
            return chosen
        same = best  # with the guesses that turned out right
        while same < min(len(row.ids), len(text) - 1) and row.ids[same] == text[same]:
            same += 1
        if same < len(row.ids):
            if not self._slots.divisible:
                same = best
            self._slots.go_back(chosen, same, row.before)
            row.ids = row.ids[:same]
        return chosen


def _check_form(form: str, where: str | None = None) -> None:
    if form != "decoder":
        raise InputError(f"a network of form '{form}' cannot guess", where=where, hint="take a decoder")


def check_draft(form: str, own: Tokenizer, draft: Tokenizer | None, where: str | None = None) -> None:
    """Raises InputError for a draft (its network's form, its tokenizer) that cannot guess for a model with the
    tokenizer `own`: a guess is a number, which must mean the same in both. where: names the draft."""
    _check_form(form, where)
    if draft is None:
        raise InputError("this model has no tokenizer, so it is not known what its guesses mean", where=where)
    if own.fingerprint == draft.fingerprint:
        return
    hint = "a draft needs the vocabulary of the model that it guesses for"
    if own.size != draft.size:
        what = f"this draft has a vocabulary of {draft.size} tokens, and the model one of {own.size}"
        raise InputError(what, where=where, hint=hint)
    for id in range(own.size):
        ours, theirs = own.token_bytes(id), draft.token_bytes(id)
        if ours != theirs or own.is_special(id) != draft.is_special(id):
            what = f"token {id} is {theirs!r} in this draft and {ours!r} in the model"
            raise InputError(what, where=where, hint=hint)
