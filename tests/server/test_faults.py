"""What happens to a server whose clients and insides misbehave: everything accepted ends, nothing is kept."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc

import httpx
import openai
import pytest
from server_parts import Served, after_the_first, extending, hosted

from armillary.server import Door, Server, body
from armillary.server.body import checked, parse
from armillary.server.errors import HTTPError
from armillary.server.hosted import WORDS
from armillary.server.protocol import CompletionRequest
from armillary.text import Tokenizer, TokenizerSettings, train_tokenizer

ASK = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, "temperature": 0}
HEADERS = {"authorization": "Bearer secret-of-a", "content-type": "application/json"}


def deep(levels: int) -> bytes:
    return b'{"model": ' + b"[" * levels + b"]" * levels + b"}"


@pytest.mark.parametrize(
    "body, status",
    [
        (b"", 400),
        (b"[]", 400),
        (b"nonsense", 400),
        (b'{"model": NaN}', 400),
        (b'{"model": "tiny", "prompt": "a", "temperature": 1e999}', 400),
        (b'{"model": "tiny", "prompt": "a", "max_tokens": ' + b"9" * 20_000 + b"}", 400),
        (b'{"model": "tiny", "model": "tiny", "prompt": "a"}', 400),
        (b'{"model": "tiny", "prompt": "\\ud800"}', 400),
        (b'{"model": "tiny", "prompt": ["\\udfff"]}', 400),
        (b'{"model": "tiny", "prompt": "\xff"}', 400),
        (deep(100_000), 400),
        (b'{"model": "tiny", "prompt": []}', 400),
        (b'{"model": "tiny", "prompt": [[]]}', 400),
        (b'{"model": "tiny", "prompt": [-1]}', 400),
        (b'{"model": "tiny", "prompt": [99999999999999999999]}', 400),
        (b'{"model": "tiny", "prompt": "a", "n": 0}', 400),
        (b'{"model": "tiny", "prompt": "a", "temperature": "hot"}', 400),
        (b'{"model": "tiny", "prompt": null}', 400),
        (b'{"model": "tiny"}', 400),
        (b'{"model": "tiny", "prompt": "' + b"a" * (9 * 2**20) + b'"}', 413),
    ],
    ids=lambda value: repr(value[:30]) if isinstance(value, bytes) else str(value),
)
def test_hostile_bodies(served, body, status) -> None:
    found = httpx.post(f"{served.url}/v1/completions", content=body, headers=HEADERS, timeout=30)
    assert found.status_code == status
    assert set(found.json()["error"]) == {"message", "type", "param", "code"}


TALK = [{"role": "user", "content": "hello"}]
TOOL = {"type": "function", "function": {"name": "a"}}


@pytest.mark.parametrize(
    "path, asked, param, words",
    [
        ("completions", {"prompt": []}, "prompt", "at least 1 item"),
        ("completions", {"prompt": ["a"] * 65}, "prompt", "at most 64 items"),
        ("completions", {"prompt": [[1], []]}, "prompt.1", "at least 1 item"),
        ("completions", {"prompt": ["a", 1]}, "prompt.1", "valid string"),
        ("completions", {"prompt": None}, "prompt", "valid string"),
        ("completions", {"prompt": "a", "stop": ["b"] * 17}, "stop", "at most 16 items"),
        ("completions", {"prompt": "a", "stop": ["b", "c" * 257]}, "stop.1", "at most 256 characters"),
        ("completions", {"prompt": "a", "n": 9}, "n", "less than or equal to 8"),
        ("completions", {"prompt": "a", "n": 2, "best_of": 1}, "best_of", "less than n, 2"),
        ("completions", {"prompt": "a", "logit_bias": {"9" * 5000: 1}}, "logit_bias", "no token id"),
        ("completions", {"prompt": "a", "logit_bias": {"1": 101}}, "logit_bias.1", "less than or equal to 100"),
        ("completions", {"prompt": "a" * 3000}, "prompt", "2048 is the most"),
        ("completions", {"prompt": "a", "foo-bar": 1}, "foo-bar", "unknown parameter 'foo-bar'"),
        ("completions", {"prompt": "a", "regex": "("}, "regex", "unclosed group"),
        ("completions", {"prompt": "a", "grammar": "start: /[^\\s\\S]/"}, "grammar", "nothing matches it"),
        ("chat/completions", {"messages": [{"role": "user", "content": 3}]}, "messages.0.content", "valid string"),
        ("chat/completions", {"messages": [{"role": "user"}]}, "messages.0.content", "missing"),
        ("chat/completions", {"messages": TALK, "tools": [TOOL, TOOL]}, "tools", "one name"),
        ("chat/completions", {"messages": TALK, "tool_choice": "required"}, "tool_choice", "needs tools"),
        (
            "chat/completions",
            {"messages": TALK, "tool_choice": {"type": "function"}},
            "tool_choice.function",
            "missing",
        ),
        ("chat/completions", {"messages": TALK, "top_logprobs": 2}, "top_logprobs", "logprobs: true"),
        ("responses", {"input": []}, "input", "at least 1 item"),
        (
            "responses",
            {"input": [{"role": "wizard", "content": "a"}]},
            "input.0.role",
            "'system', 'developer', 'user' or 'assistant'",
        ),
        (
            "responses",
            {"input": [{"type": "wizard", "content": "a"}]},
            "input.0.type",
            "'input.0.type' is 'wizard', which is not known: one of 'message', 'function_call', 'function_call_output'",
        ),
        ("responses", {"input": [{"type": ["wizard"]}]}, "input.0.type", "is '['wizard']', which is not known"),
        ("responses", {"input": ["a"]}, "input.0", "'input.0' is not an object"),
        ("responses", {"input": [{"type": "function_call", "name": "a"}]}, "input.0.call_id", "is missing"),
        (
            "responses",
            {"input": "a", "text": {"format": {}}},
            "text.format.type",
            "is missing: one of 'text', 'json_object'",
        ),
        (
            "responses",
            {"input": "a", "text": {"format": {"type": "json_schema", "schema": {}}}},
            "text.format.name",
            "'text.format.name' is missing",
        ),
        (  # as chats have it
            "responses",
            {"input": "a", "text": {"format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}}},
            "text.format.json_schema",
            "unknown parameter 'text.format.json_schema'",
        ),
        (
            "responses",
            {"input": "a", "text": {"format": {"type": "xml"}}},
            "text.format.type",
            "is 'xml', which is not known: one of 'text', 'json_object', 'json_schema'",
        ),
        ("responses", {"input": "a", "text": {"format": 3}}, "text.format", "is not an object"),
        ("embeddings", {"input": []}, "input", "at least 1 item"),
    ],
)
def test_errors_name_the_field_and_the_bound(served, path, asked, param, words) -> None:
    found = httpx.post(f"{served.url}/v1/{path}", json={"model": "tiny"} | asked, headers=HEADERS, timeout=30)
    assert found.status_code == 400
    assert found.json()["error"]["param"] == param
    assert words in found.json()["error"]["message"]


def test_a_long_name_of_a_field_comes_back_cut(served) -> None:
    for path, asked in (
        ("completions", {"prompt": "a", "b" * 100_000: 1}),
        ("responses", {"input": [{"type": "c" * 100_000}]}),
        ("responses", {"input": [{"role": "user", "content": "a", "d" * 100_000: 1}]}),
        ("completions", {"prompt": "a", "logit_bias": {"e" * 100_000: "f"}}),
    ):
        found = httpx.post(f"{served.url}/v1/{path}", json={"model": "tiny"} | asked, headers=HEADERS, timeout=30)
        assert found.status_code == 400
        error = found.json()["error"]
        assert len(error["param"]) <= 200
        assert len(error["message"]) <= 2000


@pytest.mark.parametrize("item", ["null", "[]", '{"a": 1}'])
def test_a_million_mistakes_cost_no_more_than_one(item) -> None:
    """Where each was told, a body of 8 MiB took 16 s and 3 GB."""
    wrong = f'{{"model": "tiny", "prompt": [{",".join([item] * 90_000)}]}}'.encode()
    tracemalloc.start()
    begun = time.process_time()
    with pytest.raises(HTTPError):
        checked(parse(wrong), CompletionRequest)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.process_time() - begun < 5
    assert peak < 120 * len(wrong)
    keys = ",".join(f'"{key}": 1' for key in range(5000))
    with pytest.raises(HTTPError, match="4096 is the most"):
        parse(f'{{"metadata": {{{keys}}}}}'.encode())
    with pytest.raises(HTTPError, match="more than 100000 lists"):
        parse(f"[{'[],' * 100_000}[]]".encode())


def test_others_do_not_wait_while_a_long_body_is_read(served, monkeypatch) -> None:
    names = []
    monkeypatch.setattr(body, "parse", lambda data: names.append(threading.current_thread()) or parse(data))
    for prompt in ("a", "a" * body.LONG):
        httpx.post(f"{served.url}/v1/completions", json={"model": "tiny", "prompt": prompt}, headers=HEADERS)
    assert names[0] is served.thread
    assert names[1] is not served.thread


def test_a_text_that_cannot_fit_is_not_encoded_to_its_end(served, monkeypatch) -> None:
    """8 MB take a tokenizer 8 s and 2 GB."""
    tokenizer, read = served.server.models["tiny"].tokenizer, []
    encode = tokenizer.encode_batch
    monkeypatch.setattr(
        tokenizer, "encode_batch", lambda texts, **more: read.extend(map(len, texts)) or encode(texts, **more)
    )
    text = "a" * 1_000_000
    asked = [
        ("completions", {"prompt": text}, "prompt"),
        ("completions", {"prompt": ["a", text]}, "prompt"),
        ("chat/completions", {"messages": [{"role": "user", "content": text}]}, "messages"),
        ("responses", {"input": text}, "input"),
        ("embeddings", {"input": text}, "input"),
    ]
    for path, more, param in asked:
        found = httpx.post(f"{served.url}/v1/{path}", json={"model": "tiny"} | more, headers=HEADERS, timeout=30)
        assert found.status_code == 400
        assert found.json()["error"]["param"] == param
        assert "2048 is the most" in found.json()["error"]["message"]
    assert max(read) <= 16 * 2048
    found = httpx.post(f"{served.url}/tokenize", json={"model": "tiny", "text": "a" * 1_000_001}, headers=HEADERS)
    assert found.json()["error"]["param"] == "text"


def test_words_that_clients_make_up_are_not_all_remembered(monkeypatch) -> None:
    """What that takes, and that it ends there, is in tests/text."""
    told = list[int]()
    monkeypatch.setattr(Tokenizer, "remember", lambda self, words: told.append(words))
    hosted().engine.close()
    assert told == [WORDS] and WORDS <= 256


def test_a_template_that_drops_what_was_said_before_is_judged_by_what_is_left(served, monkeypatch) -> None:
    """Of words that could not fit, only the last message is rendered: the answer is the one to it alone."""
    tokenizer = served.server.models["tiny"].tokenizer
    long = [{"role": "user", "content": "a" * 100_000}, {"role": "assistant", "content": "b" * 100_000}]
    last = {"role": "user", "content": "hello"}

    def ask(messages):
        more = {"model": "tiny", "messages": messages, "max_tokens": 4, "temperature": 0}
        return httpx.post(f"{served.url}/v1/chat/completions", json=more, headers=HEADERS, timeout=30)

    assert ask([*long, last]).json()["error"]["code"] == "context_length_exceeded", "the control: ours drops nothing"
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages[-1].content }}")
    found, alone = ask([*long, last]).json(), ask([last]).json()
    assert found["usage"]["prompt_tokens"] == alone["usage"]["prompt_tokens"] == len("hello")
    assert found["choices"][0]["message"] == alone["choices"][0]["message"]
    assert ask([last, {"role": "user", "content": "a" * 100_000}]).json()["error"]["code"] == "context_length_exceeded"


def test_wrong_methods_paths_and_types(served) -> None:
    with httpx.Client(base_url=served.url, headers=HEADERS) as client:
        assert client.get("/v1/chat/completions").status_code == 405
        assert client.get("/nowhere").status_code == 404
        assert client.post("/v1/completions", content=b"a=b", headers={"content-type": "text/plain"}).status_code == 415
        assert "error" in client.get("/nowhere").json()


def test_clients_that_leave(served) -> None:
    """Connections are reset at every stage; afterwards nothing runs, waits or is held."""
    body = json.dumps(ASK | {"max_tokens": 200, "stream": True, "min_tokens": 200}).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer secret-of-a\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    ).encode()
    open_before = len(os.listdir("/proc/self/fd"))
    for place in range(24):
        with socket.create_connection(("127.0.0.1", served.port)) as connection:
            whole = head + body
            sent = (len(head) // 2, len(head) + len(body) // 2, len(whole))[place % 3]
            connection.sendall(whole[:sent])
            if sent == len(whole) and place % 2:
                connection.recv(64 * (place + 1))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    served.quiet()
    answer = served.client().chat.completions.create(**ASK)
    assert answer.choices[0].finish_reason is not None
    end = time.monotonic() + 10
    while len(os.listdir("/proc/self/fd")) > open_before + 8 and time.monotonic() < end:
        time.sleep(0.05)
    assert len(os.listdir("/proc/self/fd")) <= open_before + 8


def test_too_much_at_once_is_turned_away() -> None:
    running = Served(Server([hosted(slots=1, most=3)]))
    try:
        asked = ASK | {"max_tokens": 1500, "extra_body": {"min_tokens": 1500}}
        found: list[object] = []

        def ask() -> None:
            try:
                found.append(running.client().chat.completions.create(**asked))
            except openai.RateLimitError as error:
                found.append(error)

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        turned = [one for one in found if isinstance(one, openai.RateLimitError)]
        assert len(found) == 8
        assert 1 <= len(turned) <= 7
        assert all(int(one.response.headers["retry-after"]) >= 1 for one in turned)
        assert all(one.choices[0].finish_reason for one in found if not isinstance(one, openai.RateLimitError))
        running.quiet()
    finally:
        running.close()


def test_who_is_turned_away_costs_no_work(monkeypatch) -> None:
    one = hosted(slots=1, most=1)
    running = Served(Server([one]))
    try:
        client = running.client()
        long = ASK | {"max_tokens": 1500, "stream": True, "extra_body": {"ignore_eos": True}}
        with client.chat.completions.create(**long) as stream:
            next(iter(stream))

            def never(*_, **__):
                raise AssertionError("a template was filled in")

            monkeypatch.setattr(one, "conversation", never)
            with pytest.raises(openai.RateLimitError) as caught:
                client.chat.completions.create(**ASK)
            assert int(caught.value.response.headers["retry-after"]) >= 1
        running.quiet()
    finally:
        running.close()


def test_rates_of_keys() -> None:
    now = 0.0
    door = Door({"secret-of-a": "a"}, requests_per_minute=2, clock=lambda: now)
    running = Served(Server([hosted()], door))
    try:
        for _ in range(2):
            running.client().chat.completions.create(**ASK)
        with pytest.raises(openai.RateLimitError) as caught:
            running.client().chat.completions.create(**ASK)
        assert caught.value.response.headers["retry-after"] == "30"
        now = 31.0
        with pytest.raises(openai.BadRequestError):  # what is refused counts, too: it may have cost a lot
            running.client().chat.completions.create(**ASK, extra_body={"regex": "(("})
        with pytest.raises(openai.RateLimitError):
            running.client().chat.completions.create(**ASK)
        now = 62.0
        answer = running.client().chat.completions.with_raw_response.create(**ASK)
        assert answer.headers["x-ratelimit-limit-requests"] == "2"
    finally:
        running.close()


def test_a_step_that_fails_ends_its_answers_and_nothing_else(caplog) -> None:
    running = Served(Server([hosted()]))
    try:
        client = running.client()
        good = client.chat.completions.create(**ASK).choices[0].message.content
        slots = running.server.models["tiny"].engine.slots
        inner, calls = slots.extend, [0]

        def broken(*args, **kwargs):
            calls[0] += 1
            if calls[0] == 2:
                raise RuntimeError("out of luck")
            return inner(*args, **kwargs)

        with (
            extending(slots, broken),
            caplog.at_level("ERROR", "armillary.engine"),
            pytest.raises(openai.InternalServerError) as caught,
        ):
            client.chat.completions.create(**ASK)
        assert "out of luck" not in str(caught.value)  # our insides are for the log
        assert "out of luck" in caplog.text
        assert client.chat.completions.create(**ASK).choices[0].message.content == good

        def nothing(*args, **kwargs):
            return inner(*args, **kwargs) * float("nan")

        with extending(slots, nothing), pytest.raises(openai.InternalServerError, match="finite"):
            client.chat.completions.create(**ASK)
        with extending(slots, nothing), pytest.raises(openai.InternalServerError, match="finite"):
            list(client.chat.completions.create(**ASK, stream=True))  # that has not begun has a status
        late = after_the_first(running.server.models["tiny"].engine, nothing)
        with extending(slots, late), caplog.at_level("INFO", "armillary.server"):
            with pytest.raises(openai.APIError, match="finite"):
                list(client.chat.completions.create(**ASK, stream=True))
            end = time.monotonic() + 10
            while not any(getattr(line, "failed", None) for line in caplog.records) and time.monotonic() < end:
                time.sleep(0.01)  # the line is written after the last byte is sent
        assert client.chat.completions.create(**ASK).choices[0].message.content == good
        running.quiet()
        assert httpx.get(f"{running.url}/ready").status_code == 200
        text = httpx.get(f"{running.url}/metrics").text
        assert 'armillary_answers_total{finish="error",model="tiny"} 4.0' in text
        counted = 'armillary_requests_total{route="/v1/chat/completions",status="%d"} %d.0'
        assert counted % (500, 3) in text
        assert counted % (200, 4) in text  # the stream that failed had begun: that it did is counted apart
        assert 'armillary_stream_failures_total{model="tiny",reason="generation_failed"} 1.0' in text
        lines = [record for record in caplog.records if record.getMessage() == "request"]
        assert [(line.status, line.failed) for line in lines if line.failed] == [(200, "generation_failed")]
    finally:
        running.close()


def test_timeouts(served) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        served.client().chat.completions.create(
            **ASK | {"max_tokens": 200}, extra_body={"timeout": 0.001, "min_tokens": 200}
        )
    assert caught.value.status_code == 408
    more = {"timeout": 0.05, "min_tokens": 1500}
    with pytest.raises(openai.APIError, match="within its timeout"):
        list(served.client().chat.completions.create(**ASK | {"max_tokens": 1500}, stream=True, extra_body=more))
    served.quiet()


def saved(folder, template: str | None = None) -> str:
    import armillary
    from armillary.model import Model

    one = hosted()
    one.engine.close()
    tokenizer = train_tokenizer(TokenizerSettings(kind="byte", chat_template=template), [])
    armillary.save(Model(one.network, tokenizer), folder)
    return str(folder)


def url_of(process: subprocess.Popen) -> str:
    """Where it serves, once it does."""
    assert process.stderr is not None
    line = process.stderr.readline()
    while "serving tiny on" not in line:
        assert line, "the server ended before it served"
        line = process.stderr.readline()
    return line.split(" on ")[1].strip()


def stubborn(folder, drain: int) -> subprocess.Popen:
    """A server whose chat template does not come back."""
    saved(folder, "{% for a in range(99999) %}" * 4 + "{% endfor %}" * 4)
    command = [sys.executable, "-m", "armillary", "serve", str(folder), "--port", "0", "--drain", str(drain)]
    environment = {key: value for key, value in os.environ.items() if key != "ARMILLARY_API_KEYS"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


def test_a_signal_ends_the_process_whatever_clients_and_templates_do(tmp_path) -> None:
    """A body that does not come, an answer that is not read, and a template that takes a hundred years."""
    process = stubborn(tmp_path / "tiny", drain=1)
    try:
        url = url_of(process)
        port = int(url.split(":")[2].partition("/")[0])
        head = (
            "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n"
        )
        half = socket.create_connection(("127.0.0.1", port))
        half.sendall(head.format(1000).encode())
        deaf = socket.socket()
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", port))
        many = {"model": "tiny", "prompt": "a", "stream": True, "n": 8, "max_tokens": 2000, "logprobs": 20}
        body = json.dumps(many | {"ignore_eos": True}).encode()
        deaf.sendall(head.format(len(body)).encode() + body)
        found = []
        asking = threading.Thread(
            target=lambda: found.append(httpx.post(f"{url}/chat/completions", json=ASK, timeout=60))
        )
        asking.start()
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0  # a second to drain, two to read, one for threads; and a busy machine
        asking.join(20)
        assert found[0].status_code == 503
        assert found[0].json()["error"]["code"] == "shutting_down"
        assert b" 503 " in half.recv(4096)
    finally:
        process.kill()


def test_a_second_signal_ends_at_once(tmp_path) -> None:
    """A stream is told that the server ends; a template that does not come back is not waited for."""
    process = stubborn(tmp_path / "tiny", drain=600)
    try:
        url = url_of(process)

        def ask() -> None:
            with pytest.raises(httpx.HTTPError):
                httpx.post(f"{url}/chat/completions", json=ASK, timeout=60).raise_for_status()

        asking = threading.Thread(target=ask)
        asking.start()
        lasting = {"model": "tiny", "prompt": "a", "stream": True, "max_tokens": 2000, "min_tokens": 2000}
        with httpx.stream("POST", f"{url}/completions", json=lasting, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            for _ in range(20):
                assert "error" not in next(lines), "the first signal waits"
            while httpx.get(url.removesuffix("/v1") + "/ready").status_code == 200:
                time.sleep(0.05)  # two signals that nobody has seen yet are one
            process.send_signal(signal.SIGTERM)
            begun = time.monotonic()
            said = list(lines)
            assert process.wait(20) == 0
            took = time.monotonic() - begun
        assert any("shutting down" in line for line in said)
        assert took < 3  # a busy machine; it takes 0.4 s, and took 1.3 s where threads were waited for
        asking.join(20)
    finally:
        process.kill()


def test_the_command_serves_and_ends_politely(tmp_path) -> None:
    """`armillary serve` on a saved model: a stream is under way when the signal comes, and is completed."""
    environment = os.environ | {"ARMILLARY_API_KEYS": "a:secret-of-a"}
    command = [sys.executable, "-m", "armillary", "serve", saved(tmp_path / "tiny"), "--port", "0", "--drain", "60"]
    (tmp_path / "key").write_text("a secret for watermarks")
    command += ["--kv", "int8", "--watermark", str(tmp_path / "key")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        url = url_of(process)
        client = openai.OpenAI(base_url=url, api_key="secret-of-a", max_retries=0)
        stream = client.chat.completions.create(**ASK | {"max_tokens": 60}, stream=True, extra_body={"min_tokens": 60})
        chunks = [next(stream)]
        process.send_signal(signal.SIGTERM)
        chunks += list(stream)
        assert chunks[-1].choices[0].finish_reason == "length"
        assert process.wait(30) == 0
        assert process.stderr is not None
        rest = process.stderr.read()
        assert "secret" not in rest
        assert "hello" not in rest
    finally:
        process.kill()
