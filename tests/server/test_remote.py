"""`generate` and `chat` with --url: what the server says is what they show."""

from __future__ import annotations

import json
import socket
import threading

import pytest
from server_parts import Served, hosted
from typer.testing import CliRunner

from armillary.base.errors import InputError
from armillary.cli.main import app
from armillary.server import Server

RUN = CliRunner()


def shown(*arguments: str, text: str | None = None) -> str:
    found = RUN.invoke(app, [*arguments], input=text, catch_exceptions=True)
    if isinstance(found.exception, InputError):
        raise found.exception
    assert found.exit_code == 0, found.output
    return found.stdout


def test_generate_and_chat(served, monkeypatch) -> None:
    monkeypatch.setenv("ARMILLARY_API_KEY", "secret-of-a")
    url = f"{served.url}/v1"
    client = served.client()
    expected = client.completions.create(model="tiny", prompt="ab", max_tokens=9, temperature=0).choices[0].text
    options = ["--tokens", "9", "--temperature", "0", "--url", url]
    assert shown("generate", "tiny", "ab", *options) == f"ab{expected}\n"
    assert json.loads(shown("generate", "tiny", "ab", *options, "--json"))["text"] == expected
    talk = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    first = client.chat.completions.create(model="tiny", messages=talk, max_tokens=9, temperature=0)
    talk += [{"role": "assistant", "content": first.choices[0].message.content}, {"role": "user", "content": "more"}]
    second = client.chat.completions.create(model="tiny", messages=talk, max_tokens=9, temperature=0)
    said = shown("chat", "tiny", "--system", "be brief", *options, text="hello\nmore\n")
    assert said == "".join(f"{one.choices[0].message.content}\n" for one in (first, second))


def test_what_goes_wrong(served, monkeypatch) -> None:
    monkeypatch.delenv("ARMILLARY_API_KEY", raising=False)
    ask = ["generate", "tiny", "ab", "--tokens", "4", "--url"]
    with pytest.raises(InputError, match="no key"):
        shown(*ask, f"{served.url}/v1")
    with pytest.raises(InputError, match="did not answer"):
        shown(*ask, "http://127.0.0.1:9/v1")
    with pytest.raises(InputError, match="no address"):
        shown(*ask, "tiny.example")
    running = Served(Server([hosted()]))
    try:
        with pytest.raises(InputError, match="no model 'huge'"):
            shown("generate", "huge", "ab", "--url", f"{running.url}/v1")
        slots = running.server.models["tiny"].engine.slots
        inner = slots.extend
        slots.extend = lambda *args, **kwargs: inner(*args, **kwargs) * float("nan")
        with pytest.raises(InputError, match="finite"):
            shown(*ask, f"{running.url}/v1")
    finally:
        running.close()


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n"


@pytest.mark.parametrize(
    "answer, message",
    [
        (HEAD + b"content-length: 999\r\n\r\n" + b"data: {}\n\n", "did not answer|broke off"),
        (HEAD + b"transfer-encoding: chunked\r\n\r\nff\r\ndata", "did not answer"),
        (b"nonsense\r\n\r\n", "did not answer"),
        (HEAD + b'\r\ndata: {"error": "no"}\n\n', "the server failed: no"),
        (HEAD + b'\r\ndata: {"choices": null}\n\n', "broke off"),
        (HEAD + b'\r\ndata: {"choices": [{"text": "abc"}]}\n\n', "broke off"),
        (HEAD + b"\r\ndata: [1]\n\n", "no JSON objects"),
    ],
)
def test_a_server_that_breaks_off_or_says_nonsense(answer, message) -> None:
    listening = socket.create_server(("127.0.0.1", 0))

    def once() -> None:
        connection, _ = listening.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(answer)

    thread = threading.Thread(target=once, daemon=True)
    thread.start()
    with pytest.raises(InputError, match=message):
        shown("generate", "tiny", "ab", "--url", f"http://127.0.0.1:{listening.getsockname()[1]}/v1")
    thread.join(10)
    listening.close()


@pytest.mark.parametrize(
    "words, named",
    [
        (["generate", "m", "ab", "--url", "http://x/v1", "--weights", "int8"], "--weights"),
        (["generate", "m", "ab", "--url", "http://x/v1", "--beams", "2", "--device", "cpu"], "--beams, --device"),
        (["generate", "m", "ab", "--length-penalty", "2"], "--length-penalty"),
        (["chat", "m", "--url", "http://x/v1", "--dtype", "bf16"], "--dtype"),
        (["serve", "--upstream", "http://x/v1", "--kv", "int8", "--guess"], "--kv, --guess"),
        (["serve", "m", "--rpm", "0"], "--rpm is 0"),
        (["serve", "m", "--memory", "0"], "--memory is 0"),
    ],
)
def test_options_that_would_do_nothing_are_refused(words, named) -> None:
    with pytest.raises(InputError, match=named):
        shown(*words)
