"""Clients that are slow on purpose, what logs say, and streams cut at every byte."""

from __future__ import annotations

import http.client
import io
import json
import logging
import socket
import time

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from server_parts import KEYS, Served, hosted

from armillary.base.events import LONGEST, Events
from armillary.server import Door, Lines, Server, answering, body, log_to
from armillary.server.connection import Connection

HEADERS = {"authorization": "Bearer secret-of-a"}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture
def hasty(monkeypatch):
    """A server whose patience is short."""
    monkeypatch.setattr(Connection, "headers_within", 0.6)
    monkeypatch.setattr(Connection, "reads_within", 0.6)
    monkeypatch.setattr(body, "PATIENCE", 0.6)
    running = Served(Server([hosted()], Door(KEYS)), buffer=4096)
    yield running
    running.close()


def closed_within(connection: socket.socket, seconds: float, trickle: bytes) -> bytes:
    """What the server said before it closed; a byte is sent every tenth of a second meanwhile."""
    connection.settimeout(0.1)
    said, end = b"", time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            got = connection.recv(4096)
            if not got:
                return said
            said += got
        except TimeoutError:
            pass
        except ConnectionError:
            return said
        try:
            connection.send(trickle)
        except ConnectionError:
            return said
    raise AssertionError("the connection is still open")


def test_headers_and_bodies_that_trickle(hasty) -> None:
    with socket.create_connection(("127.0.0.1", hasty.port)) as slow:
        slow.sendall(b"GET /live HTTP/1.1\r\n")
        said = closed_within(slow, 10, b"x")
        assert said == b"" or b" 408 " in said
    with socket.create_connection(("127.0.0.1", hasty.port)) as slow:  # the second request of a connection
        slow.sendall(b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b" 200 " in slow.recv(4096)
        closed_within(slow, 10, b"x")
    with socket.create_connection(("127.0.0.1", hasty.port)) as slow:
        head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer secret-of-a\r\n"
        slow.sendall((head + "content-type: application/json\r\ncontent-length: 9999\r\n\r\n").encode())
        assert b" 408 " in closed_within(slow, 15, b" ")
    assert httpx.get(f"{hasty.url}/live").status_code == 200


def test_the_silent_make_way(served, monkeypatch) -> None:
    """More connections than there is room for: whoever asks is served at once, and answers under way go on."""
    monkeypatch.setattr(Connection, "most", staticmethod(lambda: 12))
    asked = CHAT | {"stream": True, "max_tokens": 400, "min_tokens": 400}
    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer secret-of-a\r\n"
    begins = [b"", b"GET /li", (head + "content-type: application/json\r\ncontent-length: 99\r\n\r\n{").encode()]
    silent = []
    with httpx.stream("POST", f"{served.url}/v1/chat/completions", json=asked, headers=HEADERS) as stream:
        lines = stream.iter_lines()
        next(lines)
        for count in range(40):
            silent.append(socket.create_connection(("127.0.0.1", served.port)))
            silent[-1].sendall(begins[count % 3])
        begun = time.monotonic()
        assert httpx.get(f"{served.url}/live", timeout=30).status_code == 200
        assert time.monotonic() - begun < 5  # a busy machine; it was 20 s
        assert list(lines)[-2] == "data: [DONE]"
    assert len(served.inner.server_state.connections) <= 12
    for connection in silent:
        connection.close()


def test_what_is_written_is_sent(served) -> None:
    """Head and body of an answer are two writes. The second waited until a client said that it had the first, which
    takes Linux 40 ms on a connection that has stood for a while."""
    connection, took = http.client.HTTPConnection("127.0.0.1", served.port, timeout=30), []
    for _ in range(20):
        begun = time.perf_counter()
        connection.request("GET", "/live")
        assert connection.getresponse().read()
        took.append(time.perf_counter() - begun)
    connection.close()
    assert min(took[10:]) < 0.03


def test_a_reader_that_never_reads(hasty, monkeypatch) -> None:
    """Its answer ends and its connection is cut, while others are served."""
    slots = hasty.server.models["tiny"].engine.slots
    plain = slots.extend
    # as slow as a larger network: this one may have answered before the reader's time is over
    monkeypatch.setattr(slots, "extend", lambda *given, **more: time.sleep(0.003) or plain(*given, **more))
    monkeypatch.setattr(slots, "go_on_together", lambda *given: None)
    asked = CHAT | {
        "stream": True,
        "max_tokens": 1500,
        "min_tokens": 1500,
        "n": 3,
        "logprobs": True,
        "top_logprobs": 20,
    }
    data = json.dumps(asked).encode()
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", hasty.port))
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer secret-of-a\r\n"
    connection.sendall(f"{head}content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data)
    other = hasty.client("secret-of-b").chat.completions.create(**CHAT, max_tokens=3)
    assert other.usage.completion_tokens <= 3
    hasty.quiet(40)
    answers = hasty.server.metrics.finished.labels("tiny", "cancelled")._value.get()
    assert answers == 3, "they were given up long before 1,500 tokens"
    connection.close()


def test_a_reader_that_comes_to_a_halt_misses_nothing(monkeypatch) -> None:
    """What cannot be sent at once waits, and what comes meanwhile stands behind it; then tokens go straight again."""
    waited = []
    inner = answering.begun
    monkeypatch.setattr(answering, "begun", lambda work: waited.append(inner(work)) or waited[-1])
    running = Served(Server([hosted()]), buffer=4096)
    asked = {"model": "tiny", "prompt": "hello", "max_tokens": 700, "min_tokens": 700, "seed": 5, "logprobs": 20}
    try:
        whole = httpx.post(f"{running.url}/v1/completions", json=asked, timeout=60).json()["choices"][0]
        slots = running.server.models["tiny"].engine.slots
        plain = slots.extend  # so that there is still something to say afterwards
        monkeypatch.setattr(slots, "extend", lambda *given, **more: time.sleep(0.003) or plain(*given, **more))
        monkeypatch.setattr(slots, "go_on_together", lambda *given: None)
        body = json.dumps(asked | {"stream": True}).encode()
        connection, data = socket.socket(), b""
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", running.port))
        head = "POST /v1/completions HTTP/1.0\r\nhost: x\r\ncontent-type: application/json\r\n"
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        connection.settimeout(20)
        while got := connection.recv(65536):
            if len(data) < 20_000 <= len(data) + len(got):
                end = time.monotonic() + 20
                while not any(one is not None for one in waited) and time.monotonic() < end:
                    time.sleep(0.01)
            data += got
        connection.close()
    finally:
        running.close()
    events = [json.loads(line[6:]) for line in data.decode().splitlines() if line.startswith("data: {")]
    choices = [event["choices"][0] for event in events]
    assert data.endswith(b"data: [DONE]\n\n")
    assert "".join(one["text"] for one in choices) == whole["text"]
    tokens = [token for one in choices for token in one["logprobs"]["tokens"]]
    assert tokens == whole["logprobs"]["tokens"]
    assert None in waited, "some were sent at once"
    assert any(one is not None for one in waited), "and some had to wait"
    at = next(place for place, one in enumerate(waited) if one is not None)
    assert None in waited[at:], "which is over when the reader goes on"


def test_a_failure_on_the_way_out_ends_its_own_stream(monkeypatch) -> None:
    """What goes wrong in the loop's own calls is told to the task of the request."""
    running, plain = Served(Server([hosted()])), answering.Form.written
    slots = running.server.models["tiny"].engine.slots
    extend = slots.extend  # so that each token comes by itself
    monkeypatch.setattr(slots, "extend", lambda *given, **more: time.sleep(0.02) or extend(*given, **more))
    monkeypatch.setattr(slots, "go_on_together", lambda *given: None)
    monkeypatch.setattr(
        answering.Form, "written", lambda form, text: plain(form, text) if "bad" not in text else 1 // 0
    )
    running.server.models["tiny"].tokenizer.stream = lambda: Says(iter(["a"] * 20 + ["bad"]))
    try:
        asked = {"model": "tiny", "prompt": "x", "max_tokens": 99, "min_tokens": 99, "stream": True}
        with (
            pytest.raises(httpx.RemoteProtocolError),
            httpx.stream("POST", f"{running.url}/v1/completions", json=asked, timeout=60) as stream,
        ):
            list(stream.iter_lines())
        running.quiet()
        assert running.server.metrics.finished.labels("tiny", "cancelled")._value.get() == 1
        running.server.models["tiny"].tokenizer.stream = lambda: Says(iter([]))
        asked |= {"max_tokens": 5, "min_tokens": 5}
        assert "[DONE]" in httpx.post(f"{running.url}/v1/completions", json=asked, timeout=60).text
    finally:
        running.close()


class Says:
    """A decoder that says something else."""

    def __init__(self, words) -> None:
        self.words = words

    def push(self, token: int) -> str:
        return next(self.words, "c")

    def finish(self) -> str:
        return ""


@given(st.text(), st.integers(0, 7))
def test_a_form_is_written_as_its_event(text, place) -> None:
    def event(text: str) -> dict:
        return {"id": "x", "choices": [{"index": place, "delta": {"content": text}, "end": None}], "usage": {"a": 1}}

    assert answering.Form(event).written(text) == answering.written(event(text))


def test_logs_hold_no_prompt_and_no_key(served) -> None:
    logger = logging.getLogger("armillary.server")
    handler = logging.StreamHandler(io.StringIO())
    handler.setFormatter(Lines())
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.DEBUG)
    network = served.server.models["tiny"].network
    try:
        ask = CHAT | {"messages": [{"role": "user", "content": "PRIVATE words"}], "max_tokens": 2}
        with httpx.Client(base_url=served.url, headers=HEADERS) as client:
            assert client.post("/v1/chat/completions", json=ask).status_code == 200
            assert client.post("/v1/chat/completions", json=ask | {"PRIVATE": 1}).status_code == 400
            assert client.post("/v1/embeddings", content=b'{"model": "PRIVATE"}').status_code == 400

            def broken(*args, **kwargs):
                raise ValueError("PRIVATE words in an exception")

            network.hidden = broken
            found = client.post("/v1/embeddings", json={"model": "tiny", "input": "PRIVATE"})
            assert found.status_code == 500
            assert "PRIVATE" not in found.text
        assert httpx.get(f"{served.url}/v1/models", headers={"authorization": "Bearer secret-wrong"}).status_code == 401
        end = time.monotonic() + 10  # each is written once it is over
        while handler.stream.getvalue().count('"event": "request"') < 5 and time.monotonic() < end:
            time.sleep(0.01)
    finally:
        network.__dict__.pop("hidden", None)
        logger.removeHandler(handler)
        logger.setLevel(level)
    text = handler.stream.getvalue()
    lines = [json.loads(line) for line in text.splitlines()]
    assert sorted(line["status"] for line in lines if line["event"] == "request") == [200, 400, 400, 401, 500]
    assert any(line.get("error") == "ValueError" for line in lines)
    assert "PRIVATE" not in text
    assert "secret" not in text


def test_all_logs_are_lines_without_values() -> None:
    """Exceptions of the engine and of libraries tell of prompts, too."""
    root, ours = logging.getLogger(), logging.getLogger("armillary.server")
    level, before, stream = ours.level, root.handlers[:], io.StringIO()
    log_to(stream)
    try:
        try:
            raise KeyError("PRIVATE words")
        except KeyError:
            logging.getLogger("armillary.engine").exception("a step failed")
            logging.getLogger("asyncio").error("Task exception was never retrieved\nfuture: PRIVATE", exc_info=True)
        logging.getLogger("uvicorn.error").info("Started")
    finally:
        root.handlers[:] = before
        ours.setLevel(level)
    text = stream.getvalue()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["event"] for line in lines] == ["a step failed", "Task exception was never retrieved"]
    assert all(line["error"] == "KeyError" and line["at"][-1].startswith("test_slow.py:") for line in lines)
    assert "PRIVATE" not in text


def test_heads_and_options(served) -> None:
    with httpx.Client(base_url=served.url, headers=HEADERS) as client:
        head = client.head("/v1/models")
        assert head.status_code == 200
        assert head.content == b""
        assert client.head("/v1/chat/completions").status_code == 405
        found = client.options("/v1/chat/completions")
        assert found.status_code == 405
        assert "POST" in found.headers["allow"]
        assert "access-control-allow-origin" not in found.headers
    assert httpx.head(f"{served.url}/v1/models").status_code == 401


def test_isolation_in_time(served) -> None:
    """A prompt that one key sent is as slow for another as a new one, and quick for its own."""
    engine = served.server.models["tiny"].engine
    text = "what only a knows " * 20
    ask = {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 1, "temperature": 0}

    def tokens(key: str) -> int:
        computed = []
        inner = engine.slots.extend

        def counted(rows, chunks, **options):
            computed.append(sum(map(len, chunks)))
            return inner(rows, chunks, **options)

        engine.slots.extend = counted
        try:
            served.client(key).chat.completions.create(**ask)
        finally:
            del engine.slots.extend
        return sum(computed)

    cold = tokens("secret-of-a")
    assert cold >= len(text), "byte by byte"
    assert tokens("secret-of-b") == cold, "nothing of it is there for b"
    assert tokens("secret-of-a") < cold / 4, "the control: it is there for a"


STREAM = (
    'event: x\ndata: {"a": "ü€😀"}\n\n: alive\n\ndata: one\ndata:two\n\nid: 3\ndata\n\nretry: 1\n\ndata: [DONE]\n\n'
)
EXPECTED = ['{"a": "ü€😀"}', "one\ntwo", "", "[DONE]"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_streams_cut_at_every_byte(end) -> None:
    data = STREAM.replace("\n", end).encode()
    for size in (1, 2, 3, len(data)):
        events = Events()
        found = [one for at in range(0, len(data), size) for one in events.push(data[at : at + size])]
        assert found == EXPECTED
    for at in range(len(data)):
        events = Events()
        assert events.push(data[:at]) + events.push(data[at:]) == EXPECTED


@given(st.lists(st.text().filter(lambda text: not set(text) & set("\r\n")), max_size=4), st.data())
def test_what_we_write_is_read_again(texts, data) -> None:
    written = "".join(answering.written({"text": text}) for text in texts).encode()
    events, found, at = Events(), [], 0
    while at < len(written):
        step = data.draw(st.integers(1, 40))
        found += events.push(written[at : at + step])
        at += step
    assert [json.loads(one)["text"] for one in found] == texts


def test_an_event_without_end() -> None:
    events = Events()
    for _ in range(LONGEST // 2**16 - 1):
        events.push(b"data: " + b"x" * (2**16 - 7) + b"\n")
    with pytest.raises(ValueError, match="characters"):
        events.push(b"data: " + b"x" * 2**17)
