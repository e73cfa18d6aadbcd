"""How many prompt tokens a step takes: as many as the running answers' own time allows.

A prompt may make a step of running answers up to SHARE longer than it is without: steps vary, and no gap between their
tokens shall double. What that comes to is learnt from the steps. There are two ways to read a piece of a prompt: in
one call with the answers' tokens, where a native step takes both, or by itself with PyTorch's products, which
is quicker for many tokens and slow for a few: then LEAST are read, however long they take, or as many as take SHORT, so
that next to short steps the bound of SHARE does not hold.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence

WHOLE = 2048  # prompt tokens in a step, at the most
FIRST = 256  # while it is not known how long a token takes
LEAST = 48  # by themselves, however slow: fewer take nearly as long
MANY = 4 * LEAST  # from here on the time of a token by itself says what others would take
FEWEST = 8  # in one call with the answers, however slow: fewer take nearly as long
SHARE = 0.4  # of the time of a step of running answers: what a prompt may add to it
SHORT = 0.03  # seconds that tokens read by themselves may add in any case
LONGEST = 5.0  # seconds of a step where nobody waits for the next token
RECENT = 0.3  # weight of the last time in what is learnt
FRESH = 32  # steps with pieces after which one goes without, so that its own time stays known
KNOWN = 3  # steps without pieces after which their time counts as known
PATIENT = 4  # steps with pieces between steps that go without because their time is not known
GROWTH = 1.25  # times as many tokens as the longest of the last pieces, at the most: a quick step may be by chance


class Beside:
    """What a token of a prompt adds to a step that computes it in one call with its answers, by how many came before
    it, in powers of two: the median of what the last pieces there added, each by its number of tokens.

    The times of steps are rough: most are held up a little, a few by a multiple, and a machine is now quicker, now
    slower. So nothing is fitted to them. What pieces grow by is small, and what was too much is taken back at once,
    since only pieces about as long as the longest ones count.
    """

    LAST, NEAR = 5, 512  # pieces that count; tokens between which it makes little difference

    def __init__(self) -> None:
        self._seen: dict[int, deque[tuple[int, float]]] = {}  # by context: tokens, and seconds for each

    def saw(self, tokens: int, context: int, seconds: float) -> None:
        self._seen.setdefault((context // self.NEAR).bit_length(), deque(maxlen=self.LAST)).append(
            (tokens, seconds / tokens)
        )

    def known(self, context: int) -> tuple[int, float]:
        """Tokens of the longest piece of late, and seconds of a token; (0, 0) where nothing is known."""
        if not self._seen:
            return 0, 0.0
        # where there is nothing from there, what is known of the nearest context before it, or else behind it
        wanted = (context // self.NEAR).bit_length()
        seen = self._seen[min(self._seen, key=lambda at: (at > wanted, abs(at - wanted)))]
        longest = max(tokens for tokens, _ in seen)
        return longest, statistics.median(each for tokens, each in seen if 2 * tokens >= longest)


class Pace:
    """token: seconds of a prompt token read by itself, 0 until known."""

    def __init__(self) -> None:
        self.token = 0.0
        self.beside = Beside()
        self._steps: dict[int, deque[float]] = {}  # by the number of answers: the last times
        self._pieces = PATIENT  # steps with pieces since the last one without
        self._doubt = False  # whether what a step takes without pieces may have changed since it was seen

    def read(self, tokens: int, seconds: float) -> None:
        """Tokens of prompts were read by themselves; a few say nothing of what many cost."""
        if tokens >= LEAST:
            self.token = seconds / tokens if self.token == 0 else _learnt(self.token, seconds / tokens)

    def went(self, answers: int, seconds: float) -> None:
        """So many running answers went a step on, without any piece."""
        self._steps.setdefault(answers, deque(maxlen=5)).append(seconds)
        self._pieces, self._doubt = 0, False

    def joined(self, answers: int, pieces: Sequence[tuple[int, int]], seconds: float) -> None:
        """So many answers went on, and pieces were read in the same call; pieces: tokens, and how many came
        before them."""
        own, tokens = self.step(answers), sum(count for count, _ in pieces)
        if own == 0:  # what they added cannot be told
            return
        if seconds < own:  # without pieces the step would not have taken longer
            self._steps.setdefault(answers, deque(maxlen=5)).append(seconds)
            self._doubt = True
        elif tokens <= FEWEST and seconds > (1 + SHARE) * own:
            self._doubt = True
        self.beside.saw(tokens, max(context for _, context in pieces), max(0.0, seconds - own))

    def step(self, answers: int) -> float:
        """Seconds of a step of so many answers, or of the nearest number that was seen; 0 when none was."""
        if not self._steps:
            return 0.0
        return statistics.median(self._steps[min(self._steps, key=lambda seen: abs(seen - answers))])

    def budget(self, answers: int, context: int = 0, most: int = 0) -> int:
        """Prompt tokens of the next step; answers: how many go on in it; context: tokens before the piece; most: how
        many tokens one call takes with those of the answers, 0 where prompts are read by themselves."""
        if not answers:
            return FIRST if self.token == 0 else max(LEAST, min(WHOLE, int(LONGEST / self.token)))
        seconds = SHARE * self.step(answers)
        if most <= 0:
            if self.token == 0:
                return FIRST
            return max(LEAST, min(WHOLE, int(max(SHORT, seconds) / self.token)))
        self._pieces += 1
        known = len(self._steps.get(answers, ())) >= KNOWN and not self._doubt
        if self._pieces > (FRESH if known else PATIENT):
            self._pieces = 0
            return 0
        alone = int(seconds / self.token) if self.token else 0
        if alone > max(most, MANY):  # long steps, in which PyTorch's products read more
            return min(WHOLE, alone)
        longest, each = self.beside.known(context)
        fitting = int(seconds / each) if each > 0 else most
        if longest == 0:
            return min(FEWEST, most)
        grown = max(longest + 1, int(GROWTH * longest))
        return max(min(FEWEST, most), min(fitting, grown, most))


def _learnt(before: float, now: float) -> float:
    return (1 - RECENT) * before + RECENT * now
