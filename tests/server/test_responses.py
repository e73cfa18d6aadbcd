"""/v1/responses through the official client: whole and streamed, tools, going on from an earlier response."""

from __future__ import annotations

import json

import openai
import pytest
from server_parts import TOOLS, Served, after_the_first, extending, hosted

from armillary.server import Server
from armillary.server.items import Kept
from armillary.server.protocol import Message

FLAT = [{"type": "function", **tool["function"]} for tool in TOOLS]
ASK = {"model": "tiny", "input": "hello", "temperature": 0, "max_output_tokens": 12}


def test_text_is_what_chat_says(served) -> None:
    client = served.client()
    found = client.responses.create(**ASK, instructions="be brief", metadata={"a": "b"})
    chat = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}],
        max_tokens=12,
        temperature=0,
    )
    assert found.output_text == chat.choices[0].message.content
    assert found.usage.output_tokens == chat.usage.completion_tokens
    assert found.usage.input_tokens == chat.usage.prompt_tokens
    assert found.metadata == {"a": "b"}
    if chat.choices[0].finish_reason == "length":
        assert found.status == "incomplete"
        assert found.incomplete_details.reason == "max_output_tokens"
    else:
        assert found.status == "completed"


def test_streamed_text(served) -> None:
    whole = served.client().responses.create(**ASK)
    events = list(served.client().responses.create(**ASK, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:-1] == ["response.output_text.done", "response.content_part.done", "response.output_item.done"]
    assert kinds[-1] == f"response.{whole.status}"
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == events[-4].text == events[-1].response.output_text == whole.output_text


def test_tools_streamed_and_their_results(served) -> None:
    client = served.client()
    options = {"model": "tiny", "input": "rain?", "tools": FLAT, "tool_choice": "required"}
    with client.responses.stream(**options, temperature=1.5, parallel_tool_calls=False) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert final.status == "completed"
    (call,) = final.output
    assert call.type == "function_call"
    json.loads(call.arguments)
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == call.arguments
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sun"}
    on = client.responses.create(
        model="tiny", input=[result], previous_response_id=final.id, tools=FLAT, tool_choice="none", max_output_tokens=3
    )
    assert on.usage.input_tokens > final.usage.input_tokens
    assert on.usage.input_tokens_details.cached_tokens > 0
    whole = [{"role": "user", "content": "rain?"}, *final.output, result]
    same = client.responses.create(model="tiny", input=whole, tools=FLAT, tool_choice="none", max_output_tokens=3)
    assert same.usage.input_tokens == on.usage.input_tokens


def test_going_on_belongs_to_a_key(served) -> None:
    client, other = served.client(), served.client("secret-of-b")
    first = client.responses.create(**ASK, instructions="be brief")
    assert client.responses.retrieve(first.id).output_text == first.output_text
    second = client.responses.create(**ASK, previous_response_id=first.id)
    assert second.previous_response_id == first.id
    for refused in (
        lambda: other.responses.create(**ASK, previous_response_id=first.id),
        lambda: other.responses.retrieve(first.id),
        lambda: other.responses.delete(first.id),
        lambda: client.responses.create(**ASK, previous_response_id=client.responses.create(**ASK, store=False).id),
    ):
        with pytest.raises(openai.NotFoundError):
            refused()
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    client.responses.create(**ASK, previous_response_id=second.id)  # it holds its conversation itself


def test_a_schema(served) -> None:
    from pydantic import BaseModel

    class Yes(BaseModel):
        yes: bool

    found = served.client().responses.parse(model="tiny", input="?", text_format=Yes, temperature=1.5)
    assert isinstance(found.output_parsed.yes, bool)


@pytest.mark.parametrize(
    "options, field",
    [
        ({"extra_body": {"background": True}}, "background"),
        ({"reasoning": {"effort": "low"}}, "reasoning"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"input": []}, "input"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://e.org"}]}]}, "input"),
        ({"input": "x" * 5000}, "input"),
        ({"max_output_tokens": 100_000}, "max_output_tokens"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"$ref": "http://e.org"}}}}, "text.format"),
    ],
)
def test_what_is_not_there_is_refused_by_name(served, options, field) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        served.client().responses.create(**ASK | options)
    assert caught.value.param.startswith(field)


def test_a_failure_in_a_stream_is_an_event() -> None:
    running = Served(Server([hosted()]))
    try:
        engine = running.server.models["tiny"].engine
        slots, inner = engine.slots, engine.slots.extend

        def broken(*args, **kwargs):
            return inner(*args, **kwargs) * float("nan")

        with extending(slots, after_the_first(engine, broken)):
            events = list(running.client().responses.create(**ASK, stream=True))
        assert events[-1].type == "response.failed"
        assert "finite" in events[-1].response.error.message
        for stream in (False, True):  # one that has not begun says so by its status
            with extending(slots, broken), pytest.raises(openai.InternalServerError, match="finite"):
                running.client().responses.create(**ASK, stream=stream)
    finally:
        running.close()


def test_a_dead_end_is_an_error_of_the_request() -> None:
    """What the schema comes to is a grammar whose second character is b and c."""
    one = hosted()
    running = Served(Server([one]))
    made, schema = one.grammars.constraint, {"type": "json_schema", "name": "x", "schema": {"type": "boolean"}}
    one.grammars.constraint = lambda kind, text, name: made("grammar", 'start: "a" A\nA: /b/ & /c/', name)
    try:
        events = list(running.client().responses.create(**ASK, text={"format": schema}, stream=True))
        assert events[-1].type == "response.failed"
        assert events[-1].response.error.code == "invalid_prompt"
        assert "its 'text.format'" in events[-1].response.error.message
        with pytest.raises(openai.BadRequestError) as caught:
            running.client().responses.create(**ASK, text={"format": schema})
        assert caught.value.param == "text.format"
    finally:
        running.close()


def test_the_store_is_bounded() -> None:
    kept = Kept(most=3, size=2000)
    talk = [Message(role="user", content="x" * 100)]
    for number in range(5):
        kept.put("a", {"id": str(number)}, talk)
    assert [kept.get("a", str(number)) is not None for number in range(5)] == [False, False, True, True, True]
    assert kept.get("b", "4") is None
    assert kept.get("a", "4") == ({"id": "4"}, talk)
    kept.put("a", {"id": "large"}, [Message(role="user", content="x" * 1900)])
    assert kept.get("a", "4") is None
    assert kept.get("a", "large") is not None
    kept.put("a", {"id": "too large"}, [Message(role="user", content="x" * 3000)])
    assert kept.get("a", "too large") is None
