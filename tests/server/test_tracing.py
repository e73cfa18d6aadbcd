"""Traces: what they say, that they say no more, and that nobody waits for who receives them.

Expected names are those of OpenTelemetry's semantic conventions (HTTP 1.23 and later; generative AI as of
1.37); the form of traceparent is W3C Trace Context's.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from server_parts import KEYS, Served, after_the_first, extending, hosted
from typer.testing import CliRunner

from armillary.base.errors import InputError
from armillary.server import Door, Lines, Server
from armillary.server.tracing import CLOSING, Tracing, carried, configured, connect
from armillary.server.upstream import Upstream

ID, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{ID}-{PARENT}-01"
HEADERS = {"authorization": "Bearer secret-of-a", "traceparent": TRACEPARENT, "x-request-id": "mine"}
ASK = {"model": "tiny", "messages": [{"role": "user", "content": "PRIVATE words"}], "temperature": 0, "max_tokens": 5}


class Watched:
    """A server whose spans stay here."""

    def __init__(self, *models, door=None, upstream=None) -> None:
        self.exporter = InMemorySpanExporter()
        self.tracing = Tracing(self.exporter, delay=0.01)
        self.served = Served(Server(list(models), door, upstream, self.tracing))
        self.url = self.served.url

    def spans(self, route: str) -> list:
        """The latest request of this route, and below it its answers; the ends of requests come a little later."""
        end = time.monotonic() + 10
        while time.monotonic() < end:
            spans = self.exporter.get_finished_spans()
            found = [span for span in spans if (span.attributes or {}).get("http.route") == route]
            if found:
                below = [span for span in spans if span.parent and span.parent.span_id == found[-1].context.span_id]
                self.exporter.clear()
                return [found[-1], *below]
            time.sleep(0.02)
        raise AssertionError(f"no span of {route}")


@pytest.fixture(scope="module")
def watched():
    running = Watched(hosted(), door=Door(KEYS))
    yield running
    running.served.close()


def test_a_request_and_its_answers(watched) -> None:
    before = time.time_ns()
    found = httpx.post(f"{watched.url}/v1/chat/completions", json=ASK | {"n": 2}, headers=HEADERS).json()
    span, *answers = watched.spans("/v1/chat/completions")
    assert span.name == "POST /v1/chat/completions"
    assert span.kind.name == "SERVER"
    assert f"{span.context.trace_id:032x}" == ID and f"{span.parent.span_id:016x}" == PARENT
    assert span.status.status_code.name == "UNSET"
    said = dict(span.attributes)
    first, queue = said.pop("armillary.time_to_first_token"), said.pop("armillary.time_in_queue")
    assert 0 <= queue < first < (span.end_time - span.start_time) / 1e9
    reasons = tuple(choice["finish_reason"] for choice in found["choices"])
    assert said == {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "armillary.client": "a",
        "armillary.request_id": "mine",
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.stream": False,
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.choice.count": 2,
        "gen_ai.usage.input_tokens": found["usage"]["prompt_tokens"],
        "gen_ai.usage.output_tokens": found["usage"]["completion_tokens"],
        "gen_ai.usage.cache_read.input_tokens": found["usage"]["prompt_tokens_details"]["cached_tokens"],
        "gen_ai.response.finish_reasons": reasons,
    }
    assert [one.name for one in answers] == ["answer", "answer"]
    assert sum(one.attributes["armillary.answer.tokens"] for one in answers) == found["usage"]["completion_tokens"]
    for one in answers:
        begun, told = one.events
        assert (begun.name, told.name) == ("begun", "first token")
        times = [before, span.start_time, one.start_time, begun.timestamp, told.timestamp, one.end_time, span.end_time]
        assert times == sorted(times)
        assert one.end_time <= time.time_ns()


def test_a_second_time_the_prompt_is_reused_and_a_stream_has_its_first_chunk(watched) -> None:
    for _ in range(2):
        httpx.post(f"{watched.url}/v1/chat/completions", json=ASK | {"stream": True}, headers=HEADERS)
        span, answer = watched.spans("/v1/chat/completions")
    assert span.attributes["gen_ai.usage.cache_read.input_tokens"] > 0
    assert span.attributes["gen_ai.usage.cache_read.input_tokens"] == answer.attributes["armillary.answer.reused"]
    assert span.attributes["gen_ai.response.time_to_first_chunk"] == span.attributes["armillary.time_to_first_token"]


def test_what_is_no_conversation(watched) -> None:
    body = {"model": "tiny", "prompt": ["ab", "abc"], "max_tokens": 3, "seed": 1}
    usage = httpx.post(f"{watched.url}/v1/completions", json=body, headers=HEADERS).json()["usage"]
    span, *answers = watched.spans("/v1/completions")
    assert span.attributes["gen_ai.operation.name"] == "text_completion"
    assert span.attributes["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
    assert [one.attributes["armillary.answer.index"] for one in answers] == [0, 1]
    usage = httpx.post(f"{watched.url}/v1/embeddings", json={"model": "tiny", "input": "ab"}, headers=HEADERS).json()
    span, *answers = watched.spans("/v1/embeddings")
    assert span.attributes["gen_ai.operation.name"] == "embeddings" and not answers
    assert span.attributes["gen_ai.usage.input_tokens"] == usage["usage"]["prompt_tokens"]
    assert "gen_ai.usage.output_tokens" not in span.attributes
    httpx.post(
        f"{watched.url}/v1/responses", json={"model": "tiny", "input": "a", "max_output_tokens": 2}, headers=HEADERS
    )
    assert watched.spans("/v1/responses")[0].attributes["gen_ai.usage.output_tokens"] <= 2
    httpx.get(f"{watched.url}/v1/models/tiny", headers=HEADERS)
    assert watched.spans("/v1/models/{name:path}")[0].name == "GET /v1/models/{name:path}"


def test_what_goes_wrong(watched) -> None:
    engine = watched.served.server.models["tiny"].engine
    found = httpx.post(f"{watched.url}/v1/chat/completions", json=ASK | {"model": "PRIVATE"}, headers=HEADERS)
    span, *answers = watched.spans("/v1/chat/completions")
    assert (found.status_code, span.attributes["http.response.status_code"]) == (404, 404)
    assert span.status.status_code.name == "UNSET", "a client's mistake is no failure of a server"
    assert not answers and "gen_ai.request.model" not in span.attributes
    dead = {"stream": True, "grammar": 'start: "a" A\nA: /b/ & /c/'}  # no character is both b and c
    httpx.post(f"{watched.url}/v1/chat/completions", json=ASK | dead, headers=HEADERS, timeout=60)
    span, _ = watched.spans("/v1/chat/completions")
    assert span.attributes["gen_ai.response.finish_reasons"] == ("error",)
    assert "error.type" not in span.attributes and span.status.status_code.name == "UNSET"

    def broken(*args, **kwargs):
        raise ValueError("PRIVATE words in an exception")

    try:
        for stream, late in ((False, False), (True, False), (True, True)):
            more = {"stream": stream, "max_tokens": 8, "min_tokens": 8}
            with extending(engine.slots, after_the_first(engine, broken) if late else broken):
                httpx.post(f"{watched.url}/v1/chat/completions", json=ASK | more, headers=HEADERS)
            span, _ = watched.spans("/v1/chat/completions")
            assert span.status.status_code.name == "ERROR"
            # a stream that has begun has a status already
            assert span.attributes["http.response.status_code"] == (200 if late else 500)
            assert span.attributes["error.type"] == ("generation_failed" if late else "500")
            assert span.attributes["gen_ai.response.finish_reasons"] == ("error",)
    finally:
        engine.failing = 0
    long = ASK | {"stream": True, "max_tokens": 1500, "min_tokens": 1500}
    with httpx.stream("POST", f"{watched.url}/v1/chat/completions", json=long, headers=HEADERS) as response:
        next(response.iter_raw())
    span, answer = watched.spans("/v1/chat/completions")
    assert span.attributes["gen_ai.response.finish_reasons"] == ("cancelled",)
    assert answer.end_time <= span.end_time


def test_who_asks_for_health_is_not_traced(watched) -> None:
    for path in ("/live", "/ready", "/health", "/metrics"):
        assert httpx.get(f"{watched.url}{path}", headers=HEADERS).status_code == 200
    httpx.get(f"{watched.url}/v1/models", headers=HEADERS)
    watched.spans("/v1/models")
    httpx.request("PROPFIND", f"{watched.url}/PRIVATE?PRIVATE", headers=HEADERS)
    end = time.monotonic() + 10
    while not (spans := watched.exporter.get_finished_spans()) and time.monotonic() < end:
        time.sleep(0.02)
    assert [span.name for span in spans] == ["_OTHER"], "neither health nor a client's own words"


def test_no_prompt_no_answer_no_key(watched) -> None:
    """All of what is sent, as bytes: also what the libraries add by themselves."""
    from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans

    watched.exporter.clear()
    body = ASK | {"messages": [{"role": "user", "content": "PRIVATE words"}], "user": "PRIVATE", "stop": "PRIVATE"}
    text = httpx.post(f"{watched.url}/v1/chat/completions", json=body | {"max_tokens": 40}, headers=HEADERS).json()
    httpx.post(f"{watched.url}/v1/chat/completions", json=ASK | {"PRIVATE": 1}, headers=HEADERS)
    httpx.get(f"{watched.url}/v1/PRIVATE?q=PRIVATE", headers=HEADERS)
    httpx.get(f"{watched.url}/v1/models", headers={"authorization": "Bearer secret-wrong", "user-agent": "PRIVATE"})
    while len(spans := watched.exporter.get_finished_spans()) < 5:
        time.sleep(0.02)
    data = encode_spans(spans).SerializeToString()
    watched.exporter.clear()
    assert b"PRIVATE" not in data and b"secret" not in data
    answer = text["choices"][0]["message"]["content"].encode()
    assert len(answer) > 4 and answer not in data


@pytest.mark.parametrize(
    "headers, expected",
    [
        ([(b"traceparent", TRACEPARENT.encode())], {"traceparent": TRACEPARENT}),
        (
            [(b"traceparent", TRACEPARENT.encode()), (b"tracestate", b"a=1"), (b"tracestate", b"b=2")],
            {"traceparent": TRACEPARENT, "tracestate": "a=1,b=2"},
        ),
        ([(b"tracestate", b"a=1")], {}),
        ([(b"traceparent", TRACEPARENT.encode())] * 2, {}),
        ([(b"traceparent", TRACEPARENT.upper().encode())], {}),
        ([(b"traceparent", f"ff-{ID}-{PARENT}-01".encode())], {}),
        ([(b"traceparent", f"00-{'0' * 32}-{PARENT}-01".encode())], {}),
        ([(b"traceparent", f"00-{ID}-{'0' * 16}-01".encode())], {}),
        ([(b"traceparent", f"{TRACEPARENT}\r\nx: y".encode())], {}),
        ([(b"traceparent", TRACEPARENT.encode()), (b"tracestate", b"a=\xff")], {"traceparent": TRACEPARENT}),
        ([(b"traceparent", TRACEPARENT.encode()), (b"tracestate", b"a" * 513)], {"traceparent": TRACEPARENT}),
    ],
)
def test_only_a_right_traceparent_is_carried(headers, expected) -> None:
    assert carried(headers) == expected


def test_not_sampled_is_not_sent(watched) -> None:
    watched.exporter.clear()
    headers = HEADERS | {"traceparent": f"00-{ID}-{PARENT}-00"}
    assert httpx.post(f"{watched.url}/v1/chat/completions", json=ASK, headers=headers).status_code == 200
    httpx.get(f"{watched.url}/v1/models", headers=HEADERS)
    watched.spans("/v1/models")
    assert not watched.exporter.get_finished_spans()


@pytest.mark.parametrize("traced", [True, False])
def test_a_gateway_goes_on_with_the_trace(traced) -> None:
    """Traced, its own span stands between the client's and the other server's; else the client's header goes on."""
    behind = Watched(hosted())
    upstream = Upstream(f"{behind.url}/v1")
    front = Watched(upstream=upstream) if traced else None
    served = front.served if front else Served(Server([], None, upstream))
    try:
        usage = httpx.post(f"{served.url}/v1/chat/completions", json=ASK, headers=HEADERS).json()["usage"]
        inner, _ = behind.spans("/v1/chat/completions")
        assert f"{inner.context.trace_id:032x}" == ID
        if front is None:
            assert f"{inner.parent.span_id:016x}" == PARENT
            return
        (outer,) = front.spans("/v1/chat/completions")
        assert inner.parent.span_id == outer.context.span_id and f"{outer.parent.span_id:016x}" == PARENT
        assert outer.attributes["gen_ai.request.model"] == "tiny"
        assert outer.attributes["gen_ai.usage.output_tokens"] == usage["completion_tokens"]
        assert outer.attributes["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
        httpx.get(f"{served.url}/v1/models", headers=HEADERS)
        assert behind.spans("/v1/models")[0].parent.span_id == front.spans("/v1/models")[0].context.span_id
        httpx.post(f"{served.url}/v1/chat/completions", json=ASK | {"model": "PRIVATE"}, headers=HEADERS)
        assert "gen_ai.request.model" not in front.spans("/v1/chat/completions")[0].attributes
    finally:
        served.close()
        behind.served.close()


class Receiver:
    """As much of a collector as takes spans over HTTP; status: what it says to each."""

    def __init__(self, status: int = 200, silence: float = 0.0) -> None:
        self.spans, self.paths, self.asked = [], [], 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.asked += 1
                outer.paths.append(self.path)
                assert self.headers["content-type"] == "application/x-protobuf"
                data = self.rfile.read(int(self.headers["content-length"]))
                time.sleep(silence)
                if status == 200:
                    for resource in ExportTraceServiceRequest.FromString(data).resource_spans:
                        about = {one.key: one.value.string_value for one in resource.resource.attributes}
                        for scope in resource.scope_spans:
                            outer.spans += [(about["service.name"], span) for span in scope.spans]
                self.send_response(status)
                self.end_headers()

            def log_message(self, *args) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def quick(monkeypatch):
    """Spans are sent soon, nothing of the environment's counts, and the libraries' logger is as it was."""
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    logger = logging.getLogger("opentelemetry")
    before = list(logger.handlers), logger.propagate
    for one in logging.getLogger("opentelemetry.sdk._shared_internal").filters:
        one.last_log = None  # it says nothing twice in 20 s, and an earlier test may have had it say so
    yield monkeypatch
    logger.handlers[:], logger.propagate = before


@pytest.mark.parametrize("way", ["given", "whole", "environment"])
def test_a_receiver_gets_them(quick, way) -> None:
    receiver = Receiver()
    given = {"given": f"{receiver.url}/", "whole": f"{receiver.url}/v1/traces", "environment": None}[way]
    if way == "environment":
        quick.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
        quick.setenv("OTEL_SERVICE_NAME", "ours")
    assert configured() == (way == "environment")
    served = Served(Server([hosted()], tracing=connect(given, Lines())))
    httpx.post(f"{served.url}/v1/chat/completions", json=ASK, headers=HEADERS)
    served.close()  # hands over what is left
    receiver.close()
    assert set(receiver.paths) == {"/v1/traces"}
    assert sorted(span.name for _, span in receiver.spans) == ["POST /v1/chat/completions", "answer"]
    assert {name for name, _ in receiver.spans} == {"ours" if way == "environment" else "armillary"}
    assert {span.trace_id.hex() for _, span in receiver.spans} == {ID}


@pytest.mark.parametrize("how", ["nobody there", "refuses", "overloaded", "silent"])
def test_a_receiver_that_is_down_costs_nothing(quick, how, capfd) -> None:
    """Requests go on as without it, one line says why, and the end does not wait for it."""
    status = {"refuses": 404, "overloaded": 503}.get(how, 200)
    receiver = Receiver(status, silence=30.0 if how == "silent" else 0.0)
    if how == "nobody there":
        receiver.close()
    quick.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "8")
    quick.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "4")
    quick.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "8")
    tracing = connect(receiver.url, Lines())
    served = Served(Server([hosted()], tracing=tracing))
    with httpx.Client(base_url=served.url, headers=HEADERS) as client:
        client.post("/v1/chat/completions", json=ASK)
        time.sleep(0.2)
        started = time.monotonic()
        for _ in range(40):
            assert client.get("/v1/models").status_code == 200
        assert time.monotonic() - started < 4, "a batch takes 8 s to be given up"
    started = time.monotonic()
    served.close()
    assert time.monotonic() - started < CLOSING + 3
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
    assert len(lines) == 1, lines
    assert ("Queue full" if how == "silent" else "export") in lines[0]["event"]
    if how != "nobody there":
        receiver.http.shutdown()


@pytest.mark.parametrize(
    "variables, given, message",
    [
        ({}, "localhost:4318", "no address for traces"),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "http://127.0.0.1:1", "http/protobuf"),
        ({"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/json"}, "http://127.0.0.1:1", "TRACES_PROTOCOL"),
        ({"OTEL_BSP_MAX_QUEUE_SIZE": "0"}, "http://127.0.0.1:1", "OTEL_"),
    ],
)
def test_settings_that_cannot_work_are_refused(quick, variables, given, message) -> None:
    for name, value in variables.items():
        quick.setenv(name, value)
    with pytest.raises(InputError, match=message):
        connect(given, Lines())


def test_switched_off(quick) -> None:
    quick.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    assert configured()
    quick.setenv("OTEL_TRACES_EXPORTER", "none")
    assert not configured()
    quick.setenv("OTEL_SDK_DISABLED", "true")
    assert connect("http://127.0.0.1:1", Lines()) is None


def test_without_the_extra(quick) -> None:
    """The command names what to install; the environment alone is no reason not to serve."""
    from armillary.cli.main import app
    from armillary.cli.serving import traced

    quick.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    found = CliRunner().invoke(app, ["serve", "--upstream", "http://127.0.0.1:1/v1", "--traces", "http://127.0.0.1:1"])
    assert isinstance(found.exception, InputError)
    assert found.exception.hint == 'pip install "armillary[tracing]"'
    quick.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    assert traced(None) is None
