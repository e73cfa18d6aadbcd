"""Calls of tools: the grammar that an answer follows, and the parts of an answer as they come.

The grammar is made from the tools' schemas, so arguments are valid by construction; and because the
form of a call is fixed, its parts are told apart letter by letter, long before the answer is over.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from armillary.engine.constraints import measure
from armillary.engine.writer import overlap
from armillary.text.tools import BETWEEN, CLOSE, HEAD, MIDDLE, OPEN, TAIL

CALLS = 8  # most calls in one answer
_JSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}  # as templates write it


def grammar(
    tools: Sequence[tuple[str, Mapping[str, Any]]],
    *,
    required: bool,
    parallel: bool,
    content: Mapping[str, Any] | None = None,
) -> str:
    """The grammar, in llguidance's Lark, of an answer with calls of `tools` (name, schema of the arguments).

    required: a call it must be; otherwise text, text and then calls, or calls; content: the schema of an
    answer that is no call. Raises InputError for a schema beyond the bounds.
    """
    for _, schema in tools:
        measure(schema)
    more = f" ({_quoted(BETWEEN)} call){{0,{CALLS - 1}}}" if parallel else ""
    lines = ["%llguidance {}"]
    if required:
        lines.append(f"start: call{more}")
    elif content is not None:
        measure(content)
        lines += [f"start: call{more} | content", f"content: %json {_schema(content)}"]
    else:
        # what is said ends where a call opens: the lazy form matches as soon as it can
        lines += [f"start: said_to_call rest{more} | said", "said: TEXT"]
        lines += [f"said_to_call[lazy]: TEXT {_quoted(OPEN)}", r"TEXT: /(.|\n)*/"]
    lines += [f"call: {_quoted(OPEN)} rest", "rest: " + " | ".join(f"rest_{index}" for index in range(len(tools)))]
    for index, (name, schema) in enumerate(tools):
        head = HEAD.removeprefix(OPEN) + name + MIDDLE
        lines.append(f"rest_{index}: {_quoted(head)} arguments_{index} {_quoted(TAIL)}")
        lines.append(f"arguments_{index}: %json {_schema(schema)}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return json.dumps(text)


def _schema(schema: Mapping[str, Any]) -> str:
    return json.dumps({**schema, "x-guidance": _JSON})


@dataclass(frozen=True)
class Said:
    text: str


@dataclass(frozen=True)
class Called:
    """A call begins."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class Arguments:
    """More of the JSON of a call's arguments; done: it is complete."""

    index: int
    text: str
    done: bool


Part = Said | Called | Arguments


class Parts:
    """Takes an answer apart as it comes; what may still turn into a call is held back."""

    def __init__(self) -> None:
        self.calls = 0
        self._held, self._where = "", "said"
        self._depth, self._inside, self._escaped = 0, False, False

    def push(self, text: str, last: bool = False) -> list[Part]:
        """The parts that are certain with this text; last: nothing more comes."""
        self._held += text
        found: list[Part] = []
        while self._step(found, last):
            pass
        return found

    def _step(self, found: list[Part], last: bool) -> bool:
        """One move; False when more text is needed."""
        held = self._held
        if self._where == "said":
            at = held.find(OPEN)
            cut = at if at >= 0 else len(held) - (0 if last else overlap(held, OPEN))
            if cut:
                found.append(Said(held[:cut]))
            self._held = held[cut:]
            if at >= 0:
                self._where = "head"
            return at >= 0
        if self._where == "head":
            end = held.find(MIDDLE, len(HEAD))
            if end < 0:
                return False
            found.append(Called(self.calls, f"call_{uuid.uuid4().hex}", held[len(HEAD) : end]))
            self._held, self._where = held[end + len(MIDDLE) :], "arguments"
            return True
        if self._where == "arguments":
            closing = self._closing(held)
            text = held if closing is None else held[:closing]
            if text:
                found.append(Arguments(self.calls, text, closing is not None))
            self._held = held[len(text) :]
            if closing is not None:
                self.calls += 1
                self._where = "tail"
            return closing is not None
        end = held.find(CLOSE)
        if end < 0:
            return False
        rest = held[end + len(CLOSE) :]
        if not rest:
            return False
        self._held, self._where = rest.removeprefix(BETWEEN), "said"
        return True

    def _closing(self, text: str) -> int | None:
        """Where the object closes that the arguments are, if it does in this text."""
        for place, letter in enumerate(text):
            if self._inside:
                if self._escaped:
                    self._escaped = False
                elif letter == "\\":
                    self._escaped = True
                elif letter == '"':
                    self._inside = False
            elif letter == '"':
                self._inside = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return place + 1
        return None
