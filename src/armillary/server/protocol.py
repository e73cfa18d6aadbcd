"""What clients send, field by field. A field that is not here is refused by its name."""

from __future__ import annotations

import contextlib
import json
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

COPIES = 8  # most answers to one prompt
PROMPTS = 64  # most prompts in one request
STOPS = 16
STOP = 256  # most characters of a text that ends an answer
TOOLS = 128
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]

T = TypeVar("T")
# of a million wrong items the first is told, and none looked at behind it
Many = Annotated[list[T], Field(fail_fast=True)]
Stop = Annotated[str, Field(min_length=1, max_length=STOP)]


def wrong(param: str, what: str) -> PydanticCustomError:
    """A mistake that takes more than one field to see, and the field that is to blame."""
    return PydanticCustomError("wrong", "{what}", {"what": what, "param": param})


class Form(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Form):
    include_usage: bool = False
    continuous_usage_stats: bool = False  # vLLM's: the usage so far, with every event


class Asked(Form):
    """What every request for text may ask."""

    model: str
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int | None = Field(None, gt=0)
    min_p: float | None = Field(None, gt=0, le=1)
    n: int = Field(1, ge=1, le=COPIES)
    stop: Stop | Annotated[Many[Stop], Field(max_length=STOPS)] | None = None
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=1024)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool = False
    stream_options: StreamOptions | None = None
    min_tokens: int = Field(0, ge=0)
    ignore_eos: bool = False  # vLLM's, of load tools: the answer does not end before max_tokens
    target_tokens: int | None = Field(None, gt=0)
    priority: int = Field(0, ge=-10, le=0)  # who asks may step back behind others, not push them aside
    timeout: float | None = Field(None, gt=0, le=3600)
    user: str | None = Field(None, max_length=256)
    regex: str | None = Field(None, min_length=1)
    grammar: str | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _coherent(self) -> Asked:
        if self.regex is not None and self.grammar is not None:
            raise wrong("grammar", "give regex or grammar, not both")
        if self.ignore_eos and self.target_tokens is not None:
            raise wrong("target_tokens", "give ignore_eos or target_tokens, not both")
        if self.stream_options is not None and not self.stream:
            raise wrong("stream_options", "stream_options go with stream: true")
        return self

    @property
    def counts(self) -> bool:
        """Whether every event of the stream says what was used so far."""
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    @property
    def stops(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class TextPart(Form):
    type: Literal["text"]
    text: str


class CalledFunction(Form):
    name: Name
    arguments: str


class ToolCall(Form):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction

    def plain(self) -> dict[str, Any]:
        """As chat templates take it: arguments as data, or as text where they are no JSON."""
        arguments: Any = self.function.arguments
        with contextlib.suppress(ValueError, RecursionError):
            arguments = json.loads(arguments)
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": self.type, "function": function}


class Function(Form):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None  # always so

    @property
    def schema_asked(self) -> dict[str, Any]:
        """What the arguments must follow: an object in any case."""
        return {"type": "object"} | (self.parameters or {"properties": {}, "additionalProperties": False})

    @model_validator(mode="after")
    def _object(self) -> Function:
        if self.schema_asked["type"] != "object":
            raise wrong("parameters", "parameters are the schema of an object")
        return self


class Tool(Form):
    type: Literal["function"]
    function: Function


class Chosen(Form):
    name: Name


class ToolChoice(Form):
    type: Literal["function"]
    function: Chosen


class Tools(NamedTuple):
    """What may be called in an answer. required: something must be; parallel: several."""

    functions: list[Function]
    required: bool
    parallel: bool


def usable(functions: list[Function], choice: str, named: str | None, parallel: bool) -> Tools | None:
    """The tools that an answer may call: none, some or the one that is named. Raises what
    `wrong` makes."""
    names = [function.name for function in functions]
    if len(set(names)) < len(names):
        raise wrong("tools", "two tools have one name")
    if named is not None:
        if named not in names:
            raise wrong("tool_choice", f"tool_choice names '{named}', which is none of the tools")
        return Tools([functions[names.index(named)]], True, False)
    if not functions:
        if choice == "required":
            raise wrong("tool_choice", "tool_choice: required needs tools")
        return None
    return None if choice == "none" else Tools(functions, choice == "required", parallel)


class Message(Form):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Many[TextPart] | None = None
    name: str | None = None
    tool_calls: Annotated[Many[ToolCall], Field(min_length=1, max_length=TOOLS)] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _said(cls, data: Any) -> Any:
        """Answers come back with fields that say nothing, "refusal": null and the like."""
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _of_its_role(self) -> Message:
        if self.tool_calls is not None and self.role != "assistant":
            raise wrong("tool_calls", "tool_calls are the assistant's")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise wrong("tool_call_id", "tool_call_id goes with role: tool, and is needed there")
        if self.content is None and self.role != "assistant":
            raise wrong("content", "content is missing")
        return self

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""

    def plain(self) -> dict[str, Any]:
        """As a chat template takes it."""
        found: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": self.text}
        for name in ("name", "tool_call_id"):
            if getattr(self, name) is not None:
                found[name] = getattr(self, name)
        if self.tool_calls is not None:
            found["tool_calls"] = [call.plain() for call in self.tool_calls]
        return found


class JsonSchema(Form):
    name: Name
    description: str | None = None
    schema_: dict[str, Any] = Field({"type": "object"}, alias="schema")
    strict: bool | None = None


class ResponseFormat(Form):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _both(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise wrong("json_schema", "type: json_schema and json_schema go together")
        return self

    @property
    def schema_asked(self) -> dict[str, Any] | None:
        """The schema that an answer must follow, or None."""
        if self.type == "json_object":
            return {"type": "object"}
        return None if self.json_schema is None else self.json_schema.schema_


class ChatRequest(Asked):
    """POST /v1/chat/completions"""

    messages: Many[Message] = Field(min_length=1, max_length=2048)
    max_tokens: int | None = Field(None, gt=0)
    max_completion_tokens: int | None = Field(None, gt=0)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: Many[Tool] | None = Field(None, max_length=TOOLS)
    tool_choice: Literal["none", "auto", "required"] | ToolChoice = "auto"
    parallel_tool_calls: bool = True

    @model_validator(mode="after")
    def _asks(self) -> ChatRequest:
        if self.usable is not None and (self.regex is not None or self.grammar is not None):
            raise wrong("tools", "regex and grammar do not go with tools")
        if self.top_logprobs is not None and not self.logprobs:
            raise wrong("top_logprobs", "top_logprobs go with logprobs: true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise wrong("max_tokens", "give max_completion_tokens or max_tokens, not both")
        return self

    @property
    def most(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def usable(self) -> Tools | None:
        functions = [tool.function for tool in self.tools or ()]
        if isinstance(self.tool_choice, ToolChoice):
            return usable(functions, "", self.tool_choice.function.name, False)
        return usable(functions, self.tool_choice, None, self.parallel_tool_calls)


class CompletionRequest(Asked):
    """POST /v1/completions"""

    prompt: (
        str
        | Annotated[Many[str], Field(min_length=1, max_length=PROMPTS)]
        | Annotated[Many[int], Field(min_length=1)]
        | Annotated[Many[Annotated[Many[int], Field(min_length=1)]], Field(min_length=1, max_length=PROMPTS)]
    )
    max_tokens: int | None = Field(None, gt=0)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False
    best_of: int | None = Field(None, ge=1, le=COPIES)

    @model_validator(mode="after")
    def _asks(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of < self.n:
            raise wrong("best_of", f"best_of is {self.best_of}, less than n, {self.n}")
        if self.best_of is not None and self.stream:
            raise wrong("best_of", "best_of is known at the end only, so it does not go with stream: true")
        if self.stream and self.echo:
            raise wrong("echo", "echo does not go with stream: true")
        return self


class EmbeddingRequest(Form):
    """POST /v1/embeddings"""

    model: str
    input: (
        str
        | Annotated[Many[str], Field(min_length=1, max_length=PROMPTS)]
        | Annotated[Many[int], Field(min_length=1)]
        | Annotated[Many[Annotated[Many[int], Field(min_length=1)]], Field(min_length=1, max_length=PROMPTS)]
    )
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, gt=0)
    user: str | None = Field(None, max_length=256)


class TokenizeRequest(Form):
    """POST /tokenize: the ids of a text, or of a conversation through the chat template."""

    model: str
    text: str | None = Field(None, max_length=1_000_000)
    messages: Many[Message] | None = Field(None, min_length=1, max_length=2048)

    @model_validator(mode="after")
    def _one(self) -> TokenizeRequest:
        if (self.text is None) == (self.messages is None):
            raise wrong("text", "give text or messages")
        return self


class DetokenizeRequest(Form):
    """POST /detokenize: the text of ids."""

    model: str
    ids: Many[Annotated[int, Field(ge=0)]] = Field(max_length=1_000_000)
