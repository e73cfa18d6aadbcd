"""POST /v1/chat/completions: conversations."""

from __future__ import annotations

import uuid
from typing import Any

from armillary.engine.request import Answer, Finish, Piece
from armillary.engine.sampling import Choice
from armillary.server.answering import Answered, Context, Form, Job, now, used
from armillary.server.calls import Called, Part, Parts, Said
from armillary.server.hosted import Hosted, constrained
from armillary.server.limits import Client
from armillary.server.protocol import ChatRequest
from armillary.text import Tokenizer

FINISH = {"stop": "stop", "end": "stop", "length": "length"}  # what else there is, is an error


def answer(context: Context, hosted: Hosted, client: Client, asked: ChatRequest, headers: dict[str, str]) -> Answered:
    spoken = hosted.conversation(asked.messages, [tool.function for tool in asked.tools or ()], client.name)
    tools = asked.usable
    schema = None if asked.response_format is None else asked.response_format.schema_asked
    alternatives = max(1, asked.top_logprobs or 0) if asked.logprobs else 0
    requests = hosted.requests(
        asked,
        spoken.ids,
        most=asked.most,
        alternatives=alternatives,
        client=client,
        copies=asked.n,
        boundaries=spoken.ends,
        constraint=constrained(tools, schema, "response_format"),
        field="max_tokens" if asked.max_tokens is not None else "max_completion_tokens",
    )
    job = Job(hosted, client, [requests], spoken)
    base = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": now(), "model": hosted.name}
    if not asked.stream:

        def whole(answers: list[Answer]) -> dict[str, Any]:
            choices = [
                _choice(place, one, asked, tools is not None, hosted.tokenizer) for place, one in enumerate(answers)
            ]
            return base | {
                "object": "chat.completion",
                "choices": choices,
                "usage": usage(answers, len(requests[0].ids)),
            }

        return Answered(context, job, whole=whole, headers=headers)

    def chunk(choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return base | {"object": "chat.completion.chunk", "choices": choices} | more

    def delta(place: int, given: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        return {"index": place, "delta": given, "finish_reason": finish}

    def first() -> list[Any]:
        opening = {"role": "assistant", "content": ""}
        return [chunk([delta(place, opening)], **so_far()) for place in range(asked.n)]

    forms: dict[int, Form] = {}
    parts = [Parts() for _ in range(asked.n)]
    generated = 0

    def so_far() -> dict[str, Any]:
        return {"usage": used(len(requests[0].ids), generated)} if asked.counts else {}

    def piece(place: int, given: Piece, _: Answer) -> list[Any]:
        nonlocal generated
        generated += len(given.choices)
        if tools is None and given.finish is None and not asked.logprobs and not asked.counts:
            if not given.text:
                return []
            if place not in forms:
                forms[place] = Form(lambda text: chunk([delta(place, {"content": text})]))
            return [forms[place].written(given.text)]
        deltas: list[dict[str, Any]] = []
        if tools is None:
            deltas += [{"content": given.text}] if given.text else []
        else:
            deltas += [_delta(part) for part in parts[place].push(given.text, given.finish is not None)]
        if asked.logprobs and given.choices and not deltas:
            deltas.append({})
        found = [delta(place, one) for one in deltas]
        if asked.logprobs and given.choices:
            found[0]["logprobs"] = logprobs(given.choices, asked.top_logprobs or 0, hosted.tokenizer)
        if given.finish is not None:
            reason = _reason(given.finish, parts[place].calls)
            found.append(delta(place, {}, reason))
        return [chunk([one], **so_far()) for one in found]

    def last(answers: list[Answer]) -> list[Any]:
        wanted = asked.stream_options is not None and asked.stream_options.include_usage
        return [chunk([], usage=usage(answers, len(requests[0].ids)))] if wanted else []

    return Answered(context, job, first=first, piece=piece, last=last, headers=headers)


def usage(answers: list[Answer], prompt: int) -> dict[str, Any]:
    details = {"cached_tokens": answers[0].reused if answers else 0}
    return used(prompt, sum(len(one.choices) for one in answers)) | {"prompt_tokens_details": details}


def logprobs(choices: tuple[Choice, ...] | list[Choice], top: int, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "content": [
            token(one.token, one.logprob, tokenizer)
            | {"top_logprobs": [token(id, logprob, tokenizer) for id, logprob in one.top[:top]]}
            for one in choices
        ],
        "refusal": None,
    }


def token(id: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    """A token as the wire has it: what of its bytes is text, the bytes themselves, its log-probability."""
    data = tokenizer.token_bytes(id)
    # JSON has no −∞: what cannot come has a number that nothing else reaches
    return {"token": data.decode("utf-8", "replace"), "bytes": list(data), "logprob": max(logprob, -9999.0)}


def _delta(part: Part) -> dict[str, Any]:
    if isinstance(part, Said):
        return {"content": part.text}
    if isinstance(part, Called):
        function = {"name": part.name, "arguments": ""}
        return {"tool_calls": [{"index": part.index, "id": part.id, "type": "function", "function": function}]}
    return {"tool_calls": [{"index": part.index, "function": {"arguments": part.text}}]}


def _reason(finish: Finish, calls: int) -> str:
    return "tool_calls" if calls and finish == "end" else FINISH[finish]


def _choice(place: int, one: Answer, asked: ChatRequest, calling: bool, tokenizer: Tokenizer) -> dict[str, Any]:
    assert one.finish is not None
    message: dict[str, Any] = {"role": "assistant", "content": one.text, "refusal": None}
    parts = Parts()
    if calling:
        calls: dict[int, dict[str, Any]] = {}
        message["content"] = None
        for part in parts.push(one.text, last=True):
            if isinstance(part, Said):
                message["content"] = (message["content"] or "") + part.text
            elif isinstance(part, Called):
                function = {"name": part.name, "arguments": ""}
                calls[part.index] = {"id": part.id, "type": "function", "function": function}
            else:
                calls[part.index]["function"]["arguments"] += part.text
        if calls:
            message["tool_calls"] = list(calls.values())
        elif message["content"] is None:
            message["content"] = ""
    return {
        "index": place,
        "message": message,
        "logprobs": logprobs(one.choices, asked.top_logprobs or 0, tokenizer) if asked.logprobs else None,
        "finish_reason": _reason(one.finish, parts.calls),
    }
