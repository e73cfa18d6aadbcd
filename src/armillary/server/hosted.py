"""One model that is served: its network on an engine, and the text around it."""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from armillary.base.errors import ArmillaryError
from armillary.engine.constraints import Busy, Grammars, Kind
from armillary.engine.core import Engine
from armillary.engine.embed import embed, texts
from armillary.engine.request import Request
from armillary.engine.sampling import Sampling
from armillary.engine.steps import Step
from armillary.nn.adapted import Change
from armillary.nn.network import Network
from armillary.server.calls import grammar
from armillary.server.errors import HTTPError
from armillary.server.limits import Client, Load
from armillary.server.protocol import Asked, Function, Message, Tools
from armillary.server.turns import Spoken, Turns
from armillary.text import Tokenizer

DEFAULT_TOKENS = 512  # of an answer, when nothing else is said
WORDS = 256  # that each thread remembers the ids of
LETTERS = 16  # for each token that a prompt may have: a longer text is first read so far


class Constrained(NamedTuple):
    """What an answer must follow, and the field of the request that says so."""

    kind: Kind
    text: str | Mapping[str, Any]
    param: str


def constrained(tools: Tools | None, schema: Mapping[str, Any] | None, param: str) -> Constrained | None:
    """What an answer must follow that may call tools, or has a schema, named by `param`, or both."""
    if tools is None:
        return None if schema is None else Constrained("json_schema", schema, param)
    functions = [(one.name, one.schema_asked) for one in tools.functions]
    try:
        text = grammar(functions, required=tools.required, parallel=tools.parallel, content=schema)
    except ArmillaryError as error:
        raise unusable(error, "tools") from None
    return Constrained("grammar", text, "tools")


def unusable(error: ArmillaryError, param: str) -> HTTPError:
    return HTTPError(400, error.what, param=param, code="invalid_constraint", hint=error.hint)


class Hosted:
    """name: what requests call it; engine: running on its own thread; parent, adapter: of a model with an adapter
    (see `adapted`)."""

    def __init__(
        self,
        name: str,
        network: Network,
        tokenizer: Tokenizer,
        engine: Engine | None,
        load: Load,
        *,
        parent: Hosted | None = None,
        adapter: str | None = None,
    ) -> None:
        self.name, self.network, self.tokenizer, self.load = name, network, tokenizer, load
        self.parent, self.adapter = parent, adapter
        self.created = int(time.time())
        self._engine = engine
        self._grammars: Grammars | None = None
        self._making = threading.Lock()
        self.turns = Turns()
        if parent is None:
            tokenizer.remember(WORDS)

    def adapted(self, name: str, changes: Mapping[str, Change]) -> Hosted:
        """With an adapter, as `model:adapter`: it shares engine, places and bounds. Raises ArmillaryError."""
        adapter = self.engine.adapters.load(name, changes)
        more: dict[str, Any] = {"parent": self, "adapter": name}
        return Hosted(f"{self.name}:{name}", adapter.network, self.tokenizer, self.engine, self.load, **more)

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            raise HTTPError(
                400, f"'{self.name}' does not generate text", param="model", hint="it serves /v1/embeddings"
            )
        return self._engine

    @property
    def generates(self) -> bool:
        return self._engine is not None

    def admit(self) -> None:
        """One more request, before anything is done for it. Raises HTTPError 429 or 503 (`Load.admit`)."""
        self.load.admit(1, 0, self.engine.pace.token if self.generates else 0.0)

    # -- text

    def prompts(self, given: str | Sequence[Any]) -> list[list[int]]:
        """Texts or ids, one or several → ids of each, with the token that texts begin with."""
        begin = [] if self.tokenizer.begin is None else [self.tokenizer.begin]
        for text in (given,) if isinstance(given, str) else given:
            self._fits(text, "prompt")
        if isinstance(given, str):
            return [[*begin, *self.tokenizer.encode(given)]]
        if all(isinstance(item, str) for item in given):
            return [[*begin, *ids] for ids in self.tokenizer.encode_batch(list(given))]
        return self._known(given, "prompt")

    def alone(self, given: str | Sequence[Any]) -> list[list[int]]:
        """Inputs that stand alone, texts or ids, one or several → ids of each, as `Model.embed` reads them."""
        many = [given] if isinstance(given, str) else list(given)
        if not all(isinstance(item, str) for item in many):
            return self._known(given, "input")
        for text in many:
            self._fits(text, "input")
        try:
            return texts(self.network, self.tokenizer, many)
        except ArmillaryError as error:
            raise HTTPError(400, error.what, param="input", hint=error.hint) from None

    @property
    def _most(self) -> int:
        """Tokens of a prompt."""
        return self.network.settings.context if self._engine is None else self._engine.capacity

    def _fits(self, text: Any, param: str) -> None:
        """Raises HTTPError for a text that is sure to be too long, before all of it is encoded: megabytes take seconds
        and hundreds of times their size."""
        most = self._most
        if not isinstance(text, str) or len(text) <= LETTERS * most:
            return
        count = len(self.tokenizer.encode(text[: LETTERS * most]))
        if count > 2 * most:  # where the text was cut, a token or two may differ
            raise HTTPError(
                400,
                f"the text has more than {count - 1} tokens, and {most} is the most",
                param=param,
                code="context_length_exceeded",
            )

    def _known(self, given: Sequence[Any], param: str) -> list[list[int]]:
        rows = [list(given)] if all(isinstance(item, int) for item in given) else [list(row) for row in given]
        for row in rows:
            if min(row) < 0 or max(row) >= self.tokenizer.size:
                raise HTTPError(
                    400, f"the {param} holds an id outside the vocabulary of {self.tokenizer.size}", param=param
                )
        return rows

    def conversation(
        self,
        messages: Sequence[Message],
        tools: Sequence[Function] = (),
        space: str = "",
        param: str = "messages",
    ) -> Spoken:
        """A conversation that an answer follows; space: whose it is; param: the field that holds it."""
        plain = [message.plain() for message in messages]
        known = [
            {"type": "function", "function": tool.model_dump(exclude_none=True, exclude={"strict"})} for tool in tools
        ] or None
        words = sum(len(message.text) for message in messages) + (0 if known is None else len(json.dumps(known)))
        long = words > LETTERS * self._most
        try:
            if long:  # a template may leave out most of it, so what it makes of the words is judged
                self._fits(self.tokenizer.chat(plain, tools=known), param)
            ids = self.tokenizer.encode_chat(plain, tools=known)
        except HTTPError:
            raise
        except ArmillaryError as error:
            raise HTTPError(400, error.what, param=param, hint=error.hint) from None
        ends = set()
        # the system's words, what came before the last message, and the last message
        counts = {1 if messages[0].role in ("system", "developer") else 0, len(plain) - 1, len(plain)}
        for count in counts if known else counts - {0}:
            try:
                if long:
                    self._fits(self.tokenizer.chat(plain[:count], generate=False, tools=known), param)
                part = self.tokenizer.encode_chat(plain[:count], generate=False, tools=known)
            except ArmillaryError:  # a template may refuse a part of a conversation, or leave in what the whole has not
                continue
            same = 0
            while same < min(len(part), len(ids)) and part[same] == ids[same]:
                same += 1
            ends.add(same)
        spoken = Spoken(tuple(ids), tuple(ids), tuple(sorted(end for end in ends if 0 < end < len(ids))))
        return spoken if long else self._recalled(spoken, plain, known, space)

    def _recalled(self, spoken: Spoken, messages: list[dict[str, Any]], tools: Any, space: str) -> Spoken:
        """With the latest answer, and all before it, in the tokens in which it was given, if they are known."""
        last = next((at for at in reversed(range(len(messages))) if messages[at]["role"] == "assistant"), None)
        if not last or not messages[last]["content"] or messages[last].get("tool_calls"):
            return spoken
        try:
            before = tuple(self.tokenizer.encode_chat(messages[:last], tools=tools))
        except ArmillaryError:  # a template may refuse a part of a conversation
            return spoken
        text = messages[last]["content"]
        whole = (*before, *self.tokenizer.encode(text))
        found = self.turns.find(space, before, text)
        if found is None or spoken.plain[: len(whole)] != whole:
            return spoken
        moved = len(found) - len(whole)
        ends = tuple(end + moved for end in spoken.ends if end > len(whole))
        return Spoken(spoken.plain, found + spoken.plain[len(whole) :], ends)

    # -- answers

    def requests(
        self,
        asked: Asked,
        ids: Sequence[int],
        *,
        most: int | None,
        alternatives: int,
        client: Client,
        copies: int = 1,
        boundaries: tuple[int, ...] = (),
        prompt_logprobs: bool = False,
        constraint: Constrained | None = None,
        field: str = "max_tokens",
        prompt_field: str | None = None,
    ) -> list[Request]:
        """The engine's requests for the copies of one answer. Raises HTTPError naming the field."""
        room = self.engine.capacity - len(ids)
        if room < 1:
            raise HTTPError(
                400,
                f"the prompt has {len(ids)} tokens, and {self.engine.capacity} is the most, answer included",
                param=prompt_field or ("messages" if boundaries else "prompt"),
                code="context_length_exceeded",
            )
        if most is not None and most > room:
            raise HTTPError(
                400,
                f"'{field}' is {most}, but the prompt of {len(ids)} tokens leaves room for {room}",
                param=field,
                code="context_length_exceeded",
            )
        bias = {}
        for token, amount in (asked.logit_bias or {}).items():
            known = token.isascii() and token.isdecimal() and len(token) < 19
            if not known or int(token) >= self.tokenizer.size:
                raise HTTPError(400, f"'logit_bias' names '{token[:40]}', which is no token id", param="logit_bias")
            bias[int(token)] = amount
        limit = most or min(room, DEFAULT_TOKENS)
        for name in ("min_tokens", "target_tokens"):
            if (getattr(asked, name) or 0) > limit:
                raise HTTPError(400, f"'{name}' is more than the {limit} tokens that the answer may have", param=name)
        sampling = _sampling(
            max_new_tokens=limit,
            min_new_tokens=limit if asked.ignore_eos else asked.min_tokens,
            target_new_tokens=asked.target_tokens,
            temperature=asked.temperature,
            top_k=asked.top_k,
            top_p=None if asked.top_p == 1 else asked.top_p,
            min_p=asked.min_p,
            repetition_penalty=asked.repetition_penalty,
            presence_penalty=asked.presence_penalty,
            frequency_penalty=asked.frequency_penalty,
            logit_bias=bias,
            alternatives=alternatives,
            stop=asked.stops,
            seed=asked.seed if asked.seed is not None else secrets.randbits(31),
        )
        return [
            Request(
                tuple(ids),
                sampling,
                key=client.name,
                space=client.name,
                priority=asked.priority,
                timeout=asked.timeout,
                boundaries=boundaries,
                stream=copy,
                prompt_logprobs=prompt_logprobs,
                steps=self._steps(asked, constraint),
                adapter=self.adapter,
                whole=not asked.stream,
            )
            for copy in range(copies)
        ]

    def _steps(self, asked: Asked, constraint: Constrained | None) -> tuple[Step, ...]:
        """Fresh constraints for one answer. Raises HTTPError for one that cannot be used."""
        if constraint is None and asked.regex is not None:
            constraint = Constrained("regex", asked.regex, "regex")
        elif constraint is None and asked.grammar is not None:
            constraint = Constrained("grammar", asked.grammar, "grammar")
        if constraint is None:
            return ()
        try:
            return (self.grammars.constraint(constraint.kind, constraint.text, constraint.param),)
        except Busy as error:
            raise HTTPError(429, error.what, code="overloaded", retry=error.seconds) from None
        except ArmillaryError as error:
            raise unusable(error, constraint.param) from None

    @property
    def grammars(self) -> Grammars:
        if self.parent is not None:
            return self.parent.grammars
        with self._making:
            if self._grammars is None:
                self._grammars = Grammars(self.tokenizer, self.network.settings.vocabulary)
            return self._grammars

    def warm(self) -> None:
        """Prepare in the background what the first requests would have to wait for."""
        if self.parent is None and self._engine is not None and self.tokenizer.ends:
            self.grammars.warm()

    def close(self) -> None:
        """Answers that are under way end."""
        if self.parent is not None:
            return
        if self._engine is not None:
            self._engine.close()
        if self._grammars is not None:
            self._grammars.close()

    def embed(self, rows: Sequence[Sequence[int]]) -> list[list[float]]:
        """One vector per row of ids, as `Model.embed` makes them."""
        found: list[list[float]] = embed(self.network, rows).tolist()
        return found


def _sampling(**asked: Any) -> Sampling:
    """Only what is not as it is by default is looked at: each field costs some µs."""
    defaults = Sampling.model_fields
    return Sampling(**{name: value for name, value in asked.items() if value != defaults[name].default})
