"""POST /v1/responses: conversations as items, with events of their own, and going on from an earlier one."""

from __future__ import annotations

import uuid
from typing import Any

from armillary.engine.request import Answer, Piece
from armillary.server.answering import Answered, Context, Job, now
from armillary.server.calls import Arguments, Called, Part, Parts, Said
from armillary.server.errors import HTTPError
from armillary.server.hosted import Hosted, constrained
from armillary.server.items import CallItem, Kept, MessageItem, ResponsesRequest, messages
from armillary.server.limits import Client
from armillary.server.protocol import Asked, Message

Event = dict[str, Any]


def answer(
    context: Context, hosted: Hosted, client: Client, asked: ResponsesRequest, kept: Kept, headers: dict[str, str]
) -> Answered:
    conversation = messages(asked.input)
    if asked.previous_response_id is not None:
        before = kept.get(client.name, asked.previous_response_id)
        if before is None:
            raise HTTPError(
                404,
                f"there is no response '{asked.previous_response_id}'",
                param="previous_response_id",
                code="previous_response_not_found",
                hint="the latest of each key are kept; send the whole conversation as input",
            )
        conversation = [*before[1], *conversation]
    told = [] if asked.instructions is None else [Message(role="system", content=asked.instructions)]
    spoken = hosted.conversation([*told, *conversation], asked.tools, client.name, "input")
    tools = asked.usable
    requests = hosted.requests(
        Asked(model=asked.model, temperature=asked.temperature, top_p=asked.top_p, seed=asked.seed),
        spoken.ids,
        most=asked.max_output_tokens,
        alternatives=0,
        client=client,
        boundaries=spoken.ends,
        constraint=constrained(tools, asked.text.format.schema_asked, "text.format"),
        field="max_output_tokens",
        prompt_field="input",
    )
    output = Output(_base(hosted, asked), len(spoken.ids), calling=tools is not None)

    def finished(answers: list[Answer]) -> list[Event]:
        events = output.close(answers[0])
        if asked.store and output.response["status"] in ("completed", "incomplete"):
            kept.put(client.name, output.response, [*conversation, *output.messages])
        return events

    def whole(answers: list[Answer]) -> dict[str, Any]:
        output.push(answers[0].text)
        finished(answers)
        return output.response

    def piece(_: int, given: Piece, one: Answer) -> list[Any]:
        return output.push(given.text)

    job = Job(hosted, client, [requests], spoken)
    if not asked.stream:
        return Answered(context, job, whole=whole, headers=headers)
    return Answered(
        context, job, first=output.begin, piece=piece, last=finished, failed=output.fail, done=False, headers=headers
    )


def _base(hosted: Hosted, asked: ResponsesRequest) -> dict[str, Any]:
    """What a response says of its request."""
    shown = {"temperature", "top_p", "max_output_tokens", "parallel_tool_calls", "previous_response_id", "store"}
    shown |= {"instructions", "tools", "tool_choice", "text", "truncation", "metadata", "user"}
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": now(),
        "model": hosted.name,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "output": [],
        "usage": None,
        **asked.model_dump(include=shown, by_alias=True),
    }


class Output:
    """A response as it grows, and the events that tell of it."""

    def __init__(self, response: dict[str, Any], prompt: int, calling: bool) -> None:
        self.response, self._prompt = response, prompt
        self._parts = Parts() if calling else None
        self._number = 0
        self._open: dict[str, Any] | None = None

    @property
    def items(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.response["output"]
        return found

    @property
    def messages(self) -> list[Message]:
        """The output as part of a conversation."""
        forms: dict[str, type[MessageItem] | type[CallItem]] = {"message": MessageItem, "function_call": CallItem}
        return messages([forms[item["type"]].model_validate(item) for item in self.items])

    def begin(self) -> list[Event]:
        return [self._told("created"), self._told("in_progress")]

    def push(self, text: str, last: bool = False) -> list[Event]:
        if self._parts is not None:
            parts = self._parts.push(text, last)
        else:
            parts = list[Part]([Said(text)] if text else [])
        return [event for part in parts for event in self._part(part)]

    def close(self, one: Answer) -> list[Event]:
        """No more comes."""
        if one.finish == "error" or self.response["status"] == "failed":
            return []  # told already
        events = self.push("", last=True)
        if not self.items:
            events += self._begin_message()
        complete = one.finish in ("stop", "end")
        events += self._end("completed" if complete else "incomplete")
        generated = len(one.choices)
        self.response["status"] = "completed" if complete else "incomplete"
        if not complete:
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        self.response["usage"] = {
            "input_tokens": self._prompt,
            "input_tokens_details": {"cached_tokens": one.reused, "cache_write_tokens": 0},
            "output_tokens": generated,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self._prompt + generated,
        }
        return [*events, self._told(self.response["status"])]

    def fail(self, problem: HTTPError) -> list[Event]:
        self.response["status"] = "failed"
        code = "invalid_prompt" if problem.status == 400 else "server_error"  # of the words that clients know
        self.response["error"] = {"code": code, "message": problem.what}
        return [self._told("failed")]

    # -- events

    def _event(self, kind: str, **fields: Any) -> Event:
        self._number += 1
        return {"type": f"response.{kind}", "sequence_number": self._number - 1, **fields}

    def _told(self, kind: str) -> Event:
        return self._event(kind, response={**self.response, "output": list(self.items)})

    def _of(self, kind: str, **fields: Any) -> Event:
        """About the item that is open."""
        assert self._open is not None
        return self._event(kind, item_id=self._open["id"], output_index=len(self.items) - 1, **fields)

    def _part(self, part: Part) -> list[Event]:
        if isinstance(part, Said):
            events = [] if self._open is not None else self._begin_message()
            assert self._open is not None
            self._open["content"][0]["text"] += part.text
            return [*events, self._of("output_text.delta", content_index=0, delta=part.text, logprobs=[])]
        if isinstance(part, Called):
            item = {"type": "function_call", "id": f"fc_{uuid.uuid4().hex}", "call_id": part.id, "name": part.name}
            return [*self._end("completed"), *self._begin(item | {"arguments": "", "status": "in_progress"})]
        assert isinstance(part, Arguments) and self._open is not None
        self._open["arguments"] += part.text
        events = [self._of("function_call_arguments.delta", delta=part.text)]
        return [*events, *self._end("completed")] if part.done else events

    def _begin(self, item: dict[str, Any]) -> list[Event]:
        self._open = item
        self.items.append(item)
        shown = item | ({"content": []} if "content" in item else {})
        return [self._event("output_item.added", output_index=len(self.items) - 1, item=shown)]

    def _begin_message(self) -> list[Event]:
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        item = {"type": "message", "id": f"msg_{uuid.uuid4().hex}", "role": "assistant", "status": "in_progress"}
        events = self._begin(item | {"content": [part]})
        return [*events, self._of("content_part.added", content_index=0, part=dict(part))]

    def _end(self, status: str) -> list[Event]:
        """The open item, if there is one, is over."""
        if self._open is None:
            return []
        item, events = self._open, []
        item["status"] = status
        if item["type"] == "message":
            part = item["content"][0]
            events.append(self._of("output_text.done", content_index=0, text=part["text"], logprobs=[]))
            events.append(self._of("content_part.done", content_index=0, part=part))
        else:
            done = {"name": item["name"], "arguments": item["arguments"]}
            events.append(self._of("function_call_arguments.done", **done))
        events.append(self._event("output_item.done", output_index=len(self.items) - 1, item=item))
        self._open = None
        return events
