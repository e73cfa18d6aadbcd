"""What clients send to /v1/responses, and what is kept of what they got: items, conversations, a store."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, TypeAdapter, model_validator

from armillary.server.protocol import (
    TOOLS,
    CalledFunction,
    Form,
    Function,
    JsonSchema,
    Many,
    Message,
    Name,
    ToolCall,
    Tools,
    usable,
)

KEPT = 1024  # responses of one key that can be gone on from
BYTES = 16 * 2**20  # that they may take together


class InputText(Form):
    type: Literal["input_text", "output_text"]
    text: str
    annotations: Many[Any] = Field([], max_length=0)
    logprobs: Many[Any] = Field([], max_length=0)


class MessageItem(Form):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Many[InputText]
    id: str | None = None
    status: str | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class CallItem(Form):
    type: Literal["function_call"]
    call_id: str
    name: Name
    arguments: str
    id: str | None = None
    status: str | None = None


class ResultItem(Form):
    type: Literal["function_call_output"]
    call_id: str
    output: str | Many[InputText]
    id: str | None = None
    status: str | None = None

    @property
    def text(self) -> str:
        return self.output if isinstance(self.output, str) else "".join(part.text for part in self.output)


def kind_of(item: Any) -> str:
    """The tag of a union's member: with a space in it, as no field of what is sent has (`body._path`)."""
    return f"a {item.get('type') if isinstance(item, dict) else getattr(item, 'type', None)}"


def _kind(item: Any) -> str:
    return kind_of({"type": "message"} | item if isinstance(item, dict) else item)


Item = Annotated[
    Annotated[MessageItem, Tag("a message")]
    | Annotated[CallItem, Tag("a function_call")]
    | Annotated[ResultItem, Tag("a function_call_output")],
    Discriminator(_kind),
]


class FunctionTool(Function):
    """A tool of this API: the function's fields beside its type."""

    type: Literal["function"]


class NamedTool(Form):
    type: Literal["function"]
    name: Name


class TextFormat(Form):
    type: Literal["text", "json_object"]

    @property
    def schema_asked(self) -> dict[str, Any] | None:
        return {"type": "object"} if self.type == "json_object" else None


class SchemaFormat(JsonSchema):
    type: Literal["json_schema"]

    @property
    def schema_asked(self) -> dict[str, Any] | None:
        return self.schema_


Format = Annotated[
    Annotated[TextFormat, Tag("a text")]
    | Annotated[TextFormat, Tag("a json_object")]
    | Annotated[SchemaFormat, Tag("a json_schema")],
    Discriminator(kind_of),
]


class TextAsked(Form):
    format: Format = TextFormat(type="text")


class ResponsesRequest(Form):
    """POST /v1/responses"""

    model: str
    input: str | Annotated[Many[Item], Field(min_length=1, max_length=2048)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, gt=0)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    tools: Many[FunctionTool] = Field([], max_length=TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool = "auto"
    parallel_tool_calls: bool = True
    text: TextAsked = TextAsked()
    stream: bool = False
    previous_response_id: str | None = Field(None, max_length=64)
    store: bool = True
    truncation: Literal["disabled"] = "disabled"
    include: Many[Any] = Field([], max_length=0)
    metadata: Annotated[dict[str, Annotated[str, Field(max_length=512)]], Field(max_length=16)] | None = None
    user: str | None = Field(None, max_length=256)

    @model_validator(mode="after")
    def _asks(self) -> ResponsesRequest:
        _ = self.usable  # what is wrong with the tools is said now
        return self

    @property
    def usable(self) -> Tools | None:
        functions = list[Function](self.tools)
        if isinstance(self.tool_choice, NamedTool):
            return usable(functions, "", self.tool_choice.name, False)
        return usable(functions, self.tool_choice, None, self.parallel_tool_calls)


def messages(given: str | Sequence[MessageItem | CallItem | ResultItem]) -> list[Message]:
    """Items as a conversation: what the assistant said and called in one turn is one message."""
    if isinstance(given, str):
        return [Message(role="user", content=given)]
    found: list[Message] = []
    for item in given:
        if isinstance(item, CallItem):
            call = ToolCall(id=item.call_id, function=CalledFunction(name=item.name, arguments=item.arguments))
            before = found[-1] if found and found[-1].role == "assistant" else None
            if before is None:
                found.append(Message(role="assistant", tool_calls=[call]))
            else:
                calls = [*(before.tool_calls or ()), call]
                found[-1] = Message(role="assistant", content=before.content, tool_calls=calls)
        elif isinstance(item, ResultItem):
            found.append(Message(role="tool", tool_call_id=item.call_id, content=item.text))
        else:
            found.append(Message(role=item.role, content=item.text))
    return found


class Kept:
    """Responses that can be gone on from, the latest of each key, as the bytes of their JSON: as objects they take
    five times as much. Safe from several threads."""

    def __init__(self, most: int = KEPT, size: int = BYTES) -> None:
        self.most, self.size = most, size
        self._of: dict[str, OrderedDict[str, tuple[bytes, bytes]]] = {}
        self._taken: dict[str, int] = {}
        self._lock = threading.Lock()

    def put(self, key: str, response: dict[str, Any], conversation: list[Message]) -> None:
        one = json.dumps(response).encode(), _CONVERSATION.dump_json(conversation, exclude_none=True)
        with self._lock:
            mine = self._of.setdefault(key, OrderedDict())
            mine[response["id"]] = one
            self._taken[key] = self._taken.get(key, 0) + _size(one)
            while len(mine) > self.most or self._taken[key] > self.size:
                self._taken[key] -= _size(mine.popitem(last=False)[1])

    def get(self, key: str, id: str) -> tuple[dict[str, Any], list[Message]] | None:
        with self._lock:
            found = self._of.get(key, OrderedDict()).get(id)
        return None if found is None else (json.loads(found[0]), _CONVERSATION.validate_json(found[1]))

    def forget(self, key: str, id: str) -> bool:
        with self._lock:
            found = self._of.get(key, OrderedDict()).pop(id, None)
            if found is not None:
                self._taken[key] -= _size(found)
            return found is not None


_CONVERSATION = TypeAdapter(list[Message])


def _size(one: tuple[bytes, bytes]) -> int:
    return sum(map(len, one))
