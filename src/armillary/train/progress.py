"""What a run tells whoever watches it, and a line on a terminal that shows it.

A progress function takes events, one dataclass each; `Line` is the one that the command line uses.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

from armillary.base.words import amount, clock, printable


@dataclass(frozen=True)
class Event:
    """Base of everything a run tells."""


@dataclass(frozen=True)
class Preparing(Event):
    """Data and tokenizer are being prepared: what is done, and how far it is (0 to 1)."""

    stage: str
    fraction: float


@dataclass(frozen=True)
class Started(Event):
    """Training begins (or goes on) after `step` of `steps`; parameters: how many the model has."""

    step: int
    steps: int
    parameters: int
    folder: str


@dataclass(frozen=True)
class Stepped(Event):
    """An update is done. loss: smoothed nats per token; bits_per_byte: of the training text, None when
    the objective has none; seconds_left: None until it can be told."""

    step: int
    steps: int
    loss: float
    bits_per_byte: float | None
    tokens_per_second: float
    seconds_left: float | None


@dataclass(frozen=True)
class Evaluated(Event):
    """The held-out text was measured."""

    step: int
    loss: float
    bits_per_byte: float | None


@dataclass(frozen=True)
class Sampled(Event):
    """A sample text was written."""

    step: int
    prompt: str
    text: str


@dataclass(frozen=True)
class Saved(Event):
    """A checkpoint is on the disk."""

    step: int
    folder: str


@dataclass(frozen=True)
class Notice(Event):
    """Something the user should know."""

    text: str


@dataclass(frozen=True)
class Finished(Event):
    """Training is over, or was stopped by a signal or a limit; `seconds` counts training only."""

    step: int
    steps: int
    stopped: bool
    seconds: float


Progress = Callable[[Event], None]


class Line:
    """Shows events: one live line on a terminal, elsewhere a plain line every `every` seconds.

    Use as a context manager, so that the terminal is left as it was.
    """

    def __init__(self, stream: IO[str] | None = None, *, every: float = 5.0) -> None:
        self.stream = stream or sys.stderr
        self.every = every
        self._live: Any = None
        self._said = -float("inf")
        self._stage = ""
        self._heldout = ""

    def __enter__(self) -> Line:
        if self.stream.isatty():
            from rich.console import Console
            from rich.live import Live
            from rich.text import Text

            self._text = Text
            self._live = Live(console=Console(file=self.stream), refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __call__(self, event: Event) -> None:
        match event:
            case Preparing(stage, fraction):
                self._show(f"{stage} {100 * fraction:.0f}%" if 0 < fraction < 1 else stage, fresh=stage != self._stage)
                self._stage = stage
            case Started(step, steps, parameters, folder):
                begin = f"goes on after step {step}" if step else "begins"
                self._say(f"training {begin}: {amount(parameters)} parameters, {steps} steps, into {folder}")
            case Stepped():
                self._show(self._step_line(event), fresh=event.step == event.steps)
            case Evaluated(_, loss, bits):
                self._heldout = f"{bits:.3f}" if bits is not None else f"loss {loss:.3f}"
            case Sampled(step, prompt, text):
                self._say(f"sample at step {step}: {printable(prompt + text)}")
            case Notice(text):
                self._say(text)
            case Finished(step, steps, stopped, seconds):
                how = "stopped" if stopped else "done"
                self._say(f"{how} at step {step} of {steps} after {clock(seconds)}")

    def _step_line(self, event: Stepped) -> str:
        parts = [f"step {event.step}/{event.steps}", f"loss {event.loss:.3f}"]
        if event.bits_per_byte is not None:
            parts.append(f"{event.bits_per_byte:.3f} bits per byte")
        if self._heldout:
            parts.append(f"held out {self._heldout}")
        parts.append(f"{event.tokens_per_second:,.0f} tokens/s")
        if event.seconds_left is not None:
            parts.append(f"{clock(event.seconds_left)} left")
        return " · ".join(parts)

    def _show(self, text: str, *, fresh: bool) -> None:
        """A state that the next one replaces."""
        if self._live is not None:
            self._live.update(self._text(text, no_wrap=True, overflow="ellipsis"))
        elif fresh or time.monotonic() - self._said >= self.every:
            self._said = time.monotonic()
            print(text, file=self.stream, flush=True)

    def _say(self, text: str) -> None:
        """Something that stays to be read."""
        if self._live is not None:
            self._live.console.print(self._text(text))
        else:
            print(text, file=self.stream, flush=True)
