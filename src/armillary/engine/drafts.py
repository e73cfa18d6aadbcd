"""Guesses of the next tokens, which the network then checks together.

The tokens are chosen by the network's own scores exactly as without guesses; a right guess only saves
a step. So no guess can change an answer, whatever its temperature.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from armillary.nn.network import Network
from armillary.nn.network_state import NetworkState


class Drafter(Protocol):
    """Guesses how a sequence goes on."""

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
        text = list(ids)
        for size in range(min(self.longest, len(text) - 1), self.shortest - 1, -1):
            wanted = text[-size:]
            for start in range(len(text) - size - 1, -1, -1):
                if text[start] == wanted[0] and text[start : start + size] == wanted:
                    return text[start + size : start + size + min(self.count, most)]
        return []


class DraftModel:
    """A small network with the same vocabulary writes on greedily (Leviathan, Kalman & Matias 2023, Fast
    Inference from Transformers via Speculative Decoding).

    sure: it stops guessing where its own likeliest token has less than this probability.
    """

    def __init__(self, network: Network, count: int = 4, sure: float = 0.3) -> None:
        self.network, self.count, self.sure = network, count, sure
        self._known: list[tuple[list[int], NetworkState]] = []

    @torch.no_grad()
    def propose(self, ids: Sequence[int], most: int) -> list[int]:
        text = list(ids)
        state, at = self._resume(text)
        logits = self.network.extend(torch.tensor([text[at:]]), state, last=True)[0, 0]
        self._known.append((text, state.snapshot()))
        del self._known[:-32]
        found: list[int] = []
        while len(found) < min(self.count, most):
            chances = torch.softmax(logits.float(), -1)
            token = int(chances.argmax())
            if float(chances[token]) < self.sure:
                break
            found.append(token)
            if len(found) < min(self.count, most):
                logits = self.network.extend(torch.tensor([[token]]), state, last=True)[0, 0]
        return found

    def _resume(self, text: list[int]) -> tuple[NetworkState, int]:
        """The state of the longest beginning that was seen before, taken out of what is known."""
        best = None
        for place, (ids, _) in enumerate(self._known):
            if (
                len(ids) < len(text)
                and text[: len(ids)] == ids
                and (best is None or len(ids) > len(self._known[best][0]))
            ):
                best = place
        if best is None:
            return self.network.init_state(1, len(text) + 64), 0
        ids, state = self._known.pop(best)
        return state, len(ids)
