"""Our server in front of our server: answers are the same, keys and bounds are those of the one in front."""

from __future__ import annotations

import asyncio
import gzip
import threading
import time

import httpx
import openai
import pytest
from server_parts import ASK_TOOLS, KEYS, Served, hosted

from armillary.server import Door, Server
from armillary.server.upstream import Upstream

ASK = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 9, "temperature": 0}


@pytest.fixture(scope="module")
def both():
    behind = Served(Server([hosted()], Door(KEYS)))
    front = Served(Server([], Door({"secret-in-front": "c"}), Upstream(f"{behind.url}/v1", "secret-of-a")))
    yield behind, front
    front.close()
    behind.close()


def test_answers_are_the_others(both) -> None:
    behind, front = both
    client, direct = front.client("secret-in-front"), behind.client()
    expected = direct.chat.completions.create(**ASK)
    found = client.chat.completions.create(**ASK)
    assert found.choices[0].message.content == expected.choices[0].message.content
    text = "".join(chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**ASK, stream=True))
    assert text == expected.choices[0].message.content
    done = client.completions.create(model="tiny", prompt="ab", max_tokens=4, temperature=0)
    assert (
        done.choices[0].text
        == direct.completions.create(model="tiny", prompt="ab", max_tokens=4, temperature=0).choices[0].text
    )
    assert client.embeddings.create(model="tiny", input="a").data[0].embedding
    assert [model.id for model in client.models.list()] == ["tiny"]
    call = client.chat.completions.create(**ASK_TOOLS | {"n": 1}, tool_choice="required", parallel_tool_calls=False)
    assert call.choices[0].message.tool_calls
    assert httpx.get(f"{front.url}/ready").json() == {"ready": True, "problem": None}


def test_keys_bounds_and_errors(both) -> None:
    behind, front = both
    with pytest.raises(openai.AuthenticationError):
        front.client("secret-of-a").chat.completions.create(**ASK)
    before = behind.server.metrics.text()
    for options, field in (({"n": 99}, "n"), ({"extra_body": {"temprature": 1}}, "temprature")):
        with pytest.raises(openai.BadRequestError) as caught:
            front.client("secret-in-front").chat.completions.create(**ASK | options)
        assert caught.value.param == field
    assert behind.server.metrics.text() == before, "they never came that far"
    with pytest.raises(openai.NotFoundError, match="no model"):
        front.client("secret-in-front").chat.completions.create(**ASK | {"model": "huge"})
    for path in ("/v1/models/%2e%2e/%2e%2e/metrics", "/v1/models/..%2f..%2fmetrics", "/v1/models/"):
        found = httpx.get(f"{front.url}{path}", headers={"authorization": "Bearer secret-in-front"})
        assert found.status_code == 404
    with pytest.raises(openai.NotFoundError):
        front.client("secret-in-front").responses.create(model="tiny", input="x")


def test_who_leaves_in_front_leaves_behind(both) -> None:
    behind, front = both
    stream = front.client("secret-in-front").chat.completions.create(
        **ASK | {"max_tokens": 1500}, stream=True, extra_body={"min_tokens": 1500}
    )
    next(stream)
    stream.response.close()
    front.quiet()
    behind.quiet()
    assert behind.server.metrics.finished.labels("tiny", "cancelled")._value.get() == 1


def test_rates_count_what_was_generated() -> None:
    behind = Served(Server([hosted()]))
    door = Door({"secret-in-front": "c"}, tokens_per_minute=100, clock=lambda: 0.0)
    front = Served(Server([], door, Upstream(f"{behind.url}/v1")))
    try:
        client = front.client("secret-in-front")
        options = ASK | {"max_tokens": 80, "extra_body": {"min_tokens": 80}}
        client.chat.completions.create(**options)
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(**options)
    finally:
        front.close()
        behind.close()


def test_who_still_waits_when_the_one_in_front_ends(both) -> None:
    """A stream and a whole answer that take longer than it may last: both are told, and the other server is free."""
    behind, _ = both
    front = Served(Server([], Door(), Upstream(f"{behind.url}/v1", "secret-of-a")))
    asked = ASK | {"max_tokens": 1900, "min_tokens": 1900}
    found: list[httpx.Response] = []
    whole = threading.Thread(
        target=lambda: found.append(httpx.post(f"{front.url}/v1/chat/completions", json=asked, timeout=60))
    )
    whole.start()
    with httpx.stream("POST", f"{front.url}/v1/chat/completions", json=asked | {"stream": True}, timeout=60) as stream:
        lines = stream.iter_lines()
        next(lines)
        while front.server.under_way < 2:
            time.sleep(0.01)
        asyncio.run_coroutine_threadsafe(front.server.end(), front.loop).result(20)
        assert "shutting_down" in [line for line in lines if line][-1]
    whole.join(20)
    assert found[0].status_code == 503
    assert found[0].json()["error"]["code"] == "shutting_down"
    front.close()
    behind.quiet()


def test_nobody_behind() -> None:
    front = Served(Server([], Door(), Upstream("http://127.0.0.1:9/v1")))
    try:
        with pytest.raises(openai.InternalServerError) as caught:
            front.client().chat.completions.create(**ASK)
        assert caught.value.status_code == 502
        assert httpx.get(f"{front.url}/ready").status_code == 503
        assert httpx.get(f"{front.url}/live").status_code == 200
    finally:
        front.close()


def test_what_comes_compressed_is_not_asked_for() -> None:
    """The server behind packs what it may; the one in front hands bytes on as they come."""

    def behind(request: httpx.Request) -> httpx.Response:
        data = b'data: {"choices": []}\n\ndata: [DONE]\n\n'
        headers = {"content-type": "text/event-stream"}
        if "gzip" in request.headers.get("accept-encoding", ""):
            data, headers["content-encoding"] = gzip.compress(data), "gzip"
        return httpx.Response(200, content=data, headers=headers)

    front = Served(Server([], Door(), Upstream("http://behind.example/v1", transport=httpx.MockTransport(behind))))
    try:
        found = httpx.post(f"{front.url}/v1/chat/completions", json=ASK | {"stream": True})
        assert found.text.startswith("data: {")
    finally:
        front.close()
