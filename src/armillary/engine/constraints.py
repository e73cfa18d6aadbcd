"""Answers that follow a JSON Schema, a regular expression or a grammar: no token that breaks it can be chosen.

The automata are llguidance's. A grammar from outside is measured first, then tried in a helper process,
and only then compiled here; what fails on the way is an error of the request, never an answer without
its constraint.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from armillary.base.errors import InputError
from armillary.engine.choosing import choose
from armillary.engine.sampling import Choice, Chooser, Sampling
from armillary.text import Tokenizer

log = logging.getLogger("armillary.engine")

Kind = Literal["json_schema", "regex", "grammar"]
SIZE = 64 * 1024  # characters of a schema or grammar
DEPTH = 32
REFERENCES = 256
PATTERN = 1024  # characters
VALUES = 2000  # of an enumeration
KEPT = 64  # compiled grammars
FORCED, FORCED_LENGTH = 8192, 256  # texts whose tokens are kept, and the longest of them
WAITING = 8  # callers at a time
WARMING = {
    "type": "object",
    "properties": {
        "a": {"type": "string", "maxLength": 3},
        "b": {"enum": ["c", "d"]},
        "e": {"type": "array", "items": {"type": "integer"}, "maxItems": 1},
        "f": {"type": "number"},
        "g": {"type": ["boolean", "null"]},
    },
    "required": ["a", "b", "e", "f", "g"],
    "additionalProperties": False,
}
WALKED = 64  # tokens
CLOSED = "constraints are no longer compiled: what served them is closed"
WAIT = 10.0  # seconds for the trial: its own limit is on time of the processor


class Busy(InputError):
    """Too many constraints are waited for; after `seconds` there may be room."""

    def __init__(self) -> None:
        super().__init__("too many constraints are being compiled", hint="try again later")
        self.seconds = WAIT


class Constraint:
    """A step of the choice (see `steps.Sieve`): what the automaton forbids becomes impossible. name: what errors
    call it.

    Right after a step nothing of PyTorch is in the processor's caches, and each of its operations costs tens of
    microseconds, a call of NumPy some: for a vocabulary of bytes that is more than the automaton takes. So where the C
    library chooses it reads the bits itself.
    """

    def __init__(self, matcher: Any, vocabulary: int, name: str = "constraint") -> None:
        self._matcher, self.tokens, self.name = matcher, vocabulary, name
        self._bits = np.zeros(-(-vocabulary // 32), np.uint32)
        self.address, self._size = self._bits.ctypes.data, self._bits.nbytes

    def look(self) -> None:
        self._matcher.unsafe_compute_mask_ptr(self.address, self._size)
        self._check()

    @property
    def over(self) -> bool:
        stopped: bool = self._matcher.is_stopped()
        return stopped and not self._matcher.is_error()

    def forced(self) -> list[int]:
        tokens: list[int] = self._matcher.compute_ff_tokens()
        return tokens

    def why_nothing(self) -> InputError | None:
        some = self._bits.any()
        return None if some else InputError(f"the answer came to where its '{self.name}' allows no token at all")

    def apply(self, scores: Tensor, ids: Sequence[int]) -> Tensor:
        """Scores [V] float32, changed in place."""
        self.look()
        allowed = np.unpackbits(self._bits.view(np.uint8), count=min(len(scores), self.tokens), bitorder="little")
        forbidden = torch.ones(len(scores), dtype=torch.bool)
        forbidden[: len(allowed)] = torch.from_numpy(allowed == 0)
        if forbidden.all() and (problem := self.why_nothing()) is not None:
            raise problem
        return scores.masked_fill_(forbidden.to(scores.device), -torch.inf)

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise InputError(f"the answer could not follow its '{self.name}': {_reason(self._matcher.get_error())}")


class Grammars:
    """Compiles constraints for one tokenizer; safe to use from several threads.

    vocabulary: entries of the network's embedding, when there are more than the tokenizer knows.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary: int | None = None) -> None:
        if not tokenizer.ends:
            raise InputError("the tokenizer has no end token, so a constrained answer could not end")
        self._tokenizer, self.vocabulary = tokenizer, vocabulary or tokenizer.size
        self._kept: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()
        self._places = threading.Semaphore(WAITING)
        self._tokens: Any = None
        self._trial: subprocess.Popen[str] | None = None
        self._closed = False
        self._warming: threading.Thread | None = None

    def warm(self) -> None:
        """Do in the background what the first constraint would have to wait for: the helper process starts, the
        vocabulary is read, and an answer is chosen. Does nothing where constraints cannot be compiled; the first one
        will say so."""
        if self._warming is None:
            self._warming = threading.Thread(target=self._warm, name="armillary-grammars", daemon=True)
            self._warming.start()

    def _warm(self) -> None:
        try:
            following = self.constraint("json_schema", WARMING)
            chooser = Chooser(Sampling(temperature=0), (), ends=self._tokenizer.ends, steps=(following,))
            for _ in range(WALKED):  # what is used for the first time is read from the disk, and finds itself a place
                (chosen,) = choose(torch.zeros(1, self.vocabulary), [chooser])
                if not isinstance(chosen, Choice) or chosen.token in chooser.ends:
                    break
        except ImportError:
            pass
        except Exception:
            if not self._closed:
                log.exception("constraints could not be prepared")

    def constraint(self, kind: Kind, text: str | Mapping[str, Any], name: str | None = None) -> Constraint:
        """A fresh constraint; name: what errors call it, by default its kind. Raises InputError for one that is too
        large, wrong, or cannot be tried."""
        grammar = _grammar(kind, text)
        key = hashlib.sha256(grammar.encode()).hexdigest()
        with self._turn(), self._lock:
            compiled = self._kept.get(key)
            if compiled is None:
                self._try(grammar)
                compiled = self._compiled(grammar)
                self._kept[key] = compiled
                if len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
            return Constraint(compiled.deep_copy(), self.vocabulary, name or kind)

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Raises Busy when too many wait: each may take the time of a trial."""
        if not self._places.acquire(blocking=False):
            raise Busy
        try:
            yield
        finally:
            self._places.release()

    def close(self) -> None:
        """End the helper process; no constraint is compiled after this."""
        self._closed = True
        self._stop()  # who waits for a trial gets an error at once
        with self._lock:
            self._stop()  # of one that was started meanwhile
        if self._warming is not None:
            self._warming.join()

    def _stop(self) -> None:
        trial = self._trial
        if trial is not None:
            trial.kill()
            trial.wait()

    def _compiled(self, grammar: str) -> Any:
        from llguidance import LLMatcher

        if self._tokens is None:
            self._tokens = _tokens(self._tokenizer, self.vocabulary)
        matcher = LLMatcher(self._tokens, grammar, log_level=0)
        if matcher.is_error():
            raise InputError(f"the constraint cannot be used: {_reason(matcher.get_error())}")
        return matcher

    def _try(self, grammar: str) -> None:
        """In the helper process; it is started again when a grammar broke it."""
        if self._closed:
            raise InputError(CLOSED)
        if self._trial is None or self._trial.poll() is not None:
            script = Path(__file__).with_name("trial.py")
            pipe = subprocess.PIPE
            self._trial = subprocess.Popen(
                [sys.executable, "-I", str(script)], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
            )
        answer: list[str] = []
        told, heard = self._trial.stdin, self._trial.stdout
        assert told is not None and heard is not None

        def ask() -> None:
            with contextlib.suppress(BrokenPipeError, ValueError):
                told.write(json.dumps(grammar) + "\n")
                told.flush()
                answer.append(heard.readline())

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(WAIT)
        if not answer or not answer[0]:
            self._stop()
            if self._closed:  # which is what ended it
                raise InputError(CLOSED)
            raise InputError("the constraint takes too much time, memory or depth to compile")
        error = json.loads(answer[0])
        if error:
            raise InputError(f"the constraint cannot be used: {_reason(error)}")


def _grammar(kind: Kind, text: str | Mapping[str, Any]) -> str:
    from llguidance import LLMatcher

    size = len(text) if isinstance(text, str) else len(json.dumps(text))
    if size > SIZE:
        raise InputError(f"the {kind} has {size} characters, and {SIZE} is the most")
    if kind == "regex":
        assert isinstance(text, str)
        if len(text) > PATTERN:
            raise InputError(f"the pattern has {len(text)} characters, and {PATTERN} is the most")
        made: str = LLMatcher.grammar_from_regex(text)
    elif kind == "grammar":
        assert isinstance(text, str)
        made = LLMatcher.grammar_from_lark(text)
    else:
        schema = json.loads(text) if isinstance(text, str) else dict(text)
        measure(schema)
        made = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})
    return made


def measure(schema: Any) -> None:
    """Raises InputError for a schema beyond the bounds, or one that refers to somewhere else."""
    references, open_ = 0, [(schema, 1)]
    while open_:
        item, depth = open_.pop()
        if depth > DEPTH:
            raise InputError(f"the schema is nested deeper than {DEPTH}")
        if isinstance(item, Mapping):
            if "x-guidance" in item:
                raise InputError("the schema holds 'x-guidance', which is not for requests")
            reference = item.get("$ref")
            if isinstance(reference, str):
                references += 1
                if not reference.startswith("#"):
                    raise InputError(f"the schema refers to '{reference[:100]}'", hint="only # can be referred to")
            if isinstance(item.get("pattern"), str) and len(item["pattern"]) > PATTERN:
                raise InputError(f"a pattern has {len(item['pattern'])} characters, and {PATTERN} is the most")
            if isinstance(item.get("enum"), Sequence) and len(item["enum"]) > VALUES:
                raise InputError(f"an enum has {len(item['enum'])} values, and {VALUES} is the most")
            open_ += [(value, depth + 1) for value in item.values()]
        elif isinstance(item, (list, tuple)):
            open_ += [(value, depth + 1) for value in item]
    if references > REFERENCES:
        raise InputError(f"the schema has {references} references, and {REFERENCES} is the most")


def _tokens(tokenizer: Tokenizer, vocabulary: int) -> Any:
    from llguidance import LLTokenizer

    class Wrapped:
        is_tokenizer_wrapper = True

        def __init__(self) -> None:
            self.eos_token_id, self.bos_token_id = tokenizer.ends[0], tokenizer.bos
            self.tokens = [tokenizer.token_bytes(id) for id in range(tokenizer.size)]
            self.tokens += [b""] * (vocabulary - tokenizer.size)
            self.special_token_ids = [id for id in range(tokenizer.size) if tokenizer.is_special(id)]

            self._known = functools.lru_cache(FORCED)(self._ids)

        def __call__(self, text: bytes | str) -> list[int]:
            # What can only go on in one way is asked for at every token of it, in every answer to a schema: right after
            # a step a tokenizer takes half a millisecond for that.
            return list(self._known(text) if len(text) <= FORCED_LENGTH else self._ids(text))

        def _ids(self, text: bytes | str) -> tuple[int, ...]:
            return tuple(tokenizer.encode(text if isinstance(text, str) else text.decode("utf-8", "replace")))

    return LLTokenizer(Wrapped(), n_vocab=vocabulary, eos_token=list(tokenizer.ends))  # type: ignore[arg-type]


def _reason(text: str) -> str:
    """What is said of a failure, in one line: its first, and of a pattern what is wrong with it, too."""
    lines = text.strip().splitlines() or ["no reason given"]
    if lines[0] == "NoExtensionBias":
        return "nothing matches it"
    more = next((line for line in lines[1:] if line.startswith("error: ")), "")
    return " ".join(filter(None, (lines[0], more.removeprefix("error: "))))[:200]
