"""What a person sees of a run."""

from __future__ import annotations

import io

from armillary.train import Evaluated, Finished, Line, Notice, Preparing, Sampled, Started, Stepped


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def show(stream: io.StringIO, every: float = 0.0) -> str:
    with Line(stream, every=every) as line:
        line(Preparing("reading", 0.5))
        line(Started(0, 10, 33_100, "runs/x"))
        line(Evaluated(1, 2.0, 1.75))
        line(Stepped(1, 10, 2.5, 1.9, 12345.6, 65.0))
        line(Stepped(2, 10, 2.25, None, 999.0, None))
        line(Sampled(2, "the ", "dog\x1b[2J\n"))
        line(Notice("careful"))
        line(Finished(10, 10, False, 3725.0))
    return stream.getvalue()


def test_plain_lines() -> None:
    assert show(io.StringIO()).splitlines() == [
        "reading 50%",
        "training begins: 33.1 k parameters, 10 steps, into runs/x",
        "step 1/10 · loss 2.500 · 1.900 bits per byte · held out 1.750 · 12,346 tokens/s · 1:05 left",
        "step 2/10 · loss 2.250 · held out 1.750 · 999 tokens/s",
        "sample at step 2: the dog\ufffd[2J",
        "",
        "careful",
        "done at step 10 of 10 after 1:02:05",
    ]


def test_plain_lines_are_not_too_many() -> None:
    out = show(io.StringIO(), every=1000.0)
    assert "reading 50%" in out and "step 1/10" not in out and "careful" in out


def test_a_terminal_has_one_live_line_and_no_commands_of_the_model() -> None:
    out = show(Terminal())
    assert "careful" in out and "done at step 10" in out and "\x1b[2J" not in out
