"""What became of each request, as OpenTelemetry traces: times, counts and reasons; never a word or a key.

One span per request holds what the whole of it took; below it is one per answer, from when it stood in line
to its last token. Names are those of the semantic conventions for HTTP and for generative AI where they
have one. They are written out here: the packages that list them still move them about.
Spans go to a bounded queue that a thread of its own empties: no request waits for who receives them.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from armillary import __version__
from armillary.base.errors import InputError
from armillary.engine.request import Answer

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

SELDOM = 600.0  # seconds between lines about traces that do not arrive
CLOSING = 3.0  # seconds for those that are left at the end
NOT_TRACED = ("/live", "/ready", "/health", "/metrics")  # asked every few seconds by machines
METHODS = {"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"}  # else a client's own words
OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}
REASONS = {"end": "stop", "deadline": "timeout"}  # the rest is called as the engine calls it
_PARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


def carried(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """The trace that a request belongs to, as its headers say (W3C Trace Context); empty if they say none."""
    given: dict[bytes, list[str]] = {b"traceparent": [], b"tracestate": []}
    for name, value in headers:
        if name in given:
            given[name].append(value.decode("latin-1").strip())
    parents, state = given[b"traceparent"], ",".join(given[b"tracestate"])
    if len(parents) != 1 or not _PARENT.fullmatch(parents[0]):
        return {}
    fine = 0 < len(state) <= 512 and state.isascii() and state.isprintable()
    return {"traceparent": parents[0]} | ({"tracestate": state} if fine else {})


class Tracing:
    """exporter: where spans go; delay: seconds that they are collected, by default what OTEL_BSP_* say."""

    def __init__(self, exporter: SpanExporter, *, delay: float | None = None) -> None:
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        resource = Resource.create({"service.version": __version__})
        if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):  # nothing in the environment
            resource = resource.merge(Resource({SERVICE_NAME: "armillary"}))
        self.exporter, self._headers = exporter, TraceContextTextMapPropagator()
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        milliseconds = None if delay is None else delay * 1000
        self._provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=milliseconds))
        self._tracer = self._provider.get_tracer("armillary.server", __version__)

    def begin(self, method: str, path: str, parent: Mapping[str, str]) -> Request | None:
        """A request has come; None for one that is not traced."""
        return None if path in NOT_TRACED else Request(self, method, parent)

    def close(self) -> None:
        """Hand over what is left, within `CLOSING` seconds."""
        last = threading.Thread(target=self._provider.shutdown, daemon=True)
        last.start()
        last.join(CLOSING)
        if last.is_alive():  # nobody takes it
            self.exporter.shutdown()


class Request:
    """The span of one request."""

    def __init__(self, tracing: Tracing, method: str, parent: Mapping[str, str]) -> None:
        from opentelemetry.trace import SpanKind

        method = method if method in METHODS else "_OTHER"
        self.tracing, self.method = tracing, method
        self.started, self._offset = time.monotonic(), time.time_ns() - int(time.monotonic() * 1e9)
        self.span: Span = tracing._tracer.start_span(
            method,
            tracing._headers.extract(dict(parent)),
            SpanKind.SERVER,
            {"http.request.method": method},
            start_time=self._at(self.started),
        )

    def _at(self, moment: float) -> int:
        """Of the monotonic clock → nanoseconds since 1970."""
        return int(moment * 1e9) + self._offset

    def headers(self) -> dict[str, str]:
        """For a server that goes on with this request."""
        from opentelemetry.trace import set_span_in_context

        found: dict[str, str] = {}
        self.tracing._headers.inject(found, set_span_in_context(self.span))
        return found

    def end(self, route: str | None, status: int | None, state: Mapping[str, Any]) -> None:
        """route: None for a path that is none; status: None when the client left before there was one; state: what was
        noted on the way: client, id, model, stream, prompt (tokens), generated (tokens), answers."""
        from opentelemetry.trace import StatusCode

        now = time.monotonic()
        if self.span.is_recording():
            answers: Sequence[Answer] = state.get("answers", ())
            for place, answer in enumerate(answers):
                self._answer(place, answer, now)
            failed = str(status) if status is not None and status >= 500 else None
            if failed is None and any(answer.finish == "error" and not answer.own for answer in answers):
                failed = "generation_failed"  # in a stream, which began well
            self.span.update_name(self.method if route is None else f"{self.method} {route}")
            found = {
                "http.route": route,
                "http.response.status_code": status,
                "error.type": failed or ("client_left" if status is None else None),
                "armillary.client": state.get("client") or None,
                "armillary.request_id": state.get("id"),
            } | self._generated(route, state, answers)
            self.span.set_attributes({name: value for name, value in found.items() if value is not None})
            if failed is not None:
                self.span.set_status(StatusCode.ERROR)
        self.span.end(self._at(now))

    def _generated(self, route: str | None, state: Mapping[str, Any], answers: Sequence[Answer]) -> dict[str, Any]:
        if "model" not in state:  # refused before it was known which
            return {}
        found = {
            "gen_ai.operation.name": OPERATIONS.get(route or ""),
            "gen_ai.request.model": state["model"],
            "gen_ai.request.stream": state.get("stream"),
            "gen_ai.usage.input_tokens": state.get("prompt"),
            "gen_ai.usage.output_tokens": state.get("generated"),
        }
        if answers:
            firsts = [answer.first_at for answer in answers if answer.first_at]
            waits = [answer.begun_at - answer.submitted for answer in answers if answer.begun_at]
            to_first = min(firsts) - self.started if firsts else None
            found |= {
                "gen_ai.request.max_tokens": answers[0].request.sampling.max_new_tokens,
                "gen_ai.request.choice.count": len(answers) if len(answers) > 1 else None,
                "gen_ai.usage.output_tokens": sum(len(answer.choices) for answer in answers),
                "gen_ai.usage.cache_read.input_tokens": answers[0].reused,
                "gen_ai.response.finish_reasons": [reason(answer) for answer in answers],
                "gen_ai.response.time_to_first_chunk": to_first if state.get("stream") else None,
                "armillary.time_to_first_token": to_first,
                "armillary.time_in_queue": min(waits) if waits else None,
            }
        return found

    def _answer(self, place: int, answer: Answer, now: float) -> None:
        from opentelemetry.trace import set_span_in_context

        # no gen_ai.usage here: whoever sums it over spans would count twice
        about: dict[str, str | int] = {
            "armillary.answer.index": place,
            "armillary.answer.tokens": len(answer.choices),
            "armillary.answer.reused": answer.reused,
            "armillary.answer.finish_reason": reason(answer),
        }
        above = set_span_in_context(self.span)
        start = self._at(answer.submitted)
        span = self.tracing._tracer.start_span("answer", above, attributes=about, start_time=start)
        for event, moment in (("begun", answer.begun_at), ("first token", answer.first_at)):
            if moment:
                span.add_event(event, timestamp=self._at(moment))
        span.end(self._at(answer.done_at or now))


def reason(answer: Answer) -> str:
    finish = answer.finish or "cancelled"
    return REASONS.get(finish, finish)


class Seldom(logging.Filter):
    """Lets a line through every `SELDOM` seconds: what is wrong with an exporter is so for every batch."""

    _last = -SELDOM

    def filter(self, record: logging.LogRecord) -> bool:
        now = time.monotonic()
        if now - self._last < SELDOM:
            return False
        self._last = now
        return True


def connect(given: str | None, lines: logging.Formatter) -> Tracing | None:
    """Traces for the receiver at `given`, or where the OTEL_EXPORTER_OTLP_* of the environment say; None when
    they are switched off there. lines: how the few lines of the exporter are logged. Raises InputError."""
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    address = None
    if given is not None:
        if not re.match(r"https?://[^/]", given):
            raise InputError(f"'{given}' is no address for traces", hint="for example http://127.0.0.1:4318")
        address = given.rstrip("/").removesuffix("/v1/traces") + "/v1/traces"
    for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        protocol = os.environ.get(name)
        if protocol and protocol != "http/protobuf":
            raise InputError(
                f"{name} is '{protocol[:40]}', and traces go by http/protobuf",
                hint=f"set {name}=http/protobuf, and the address of the receiver's HTTP port, 4318 as a rule",
            )
        if protocol:
            break
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise InputError("traces need an extra", hint='pip install "armillary[tracing]"') from None
    try:
        tracing = Tracing(OTLPSpanExporter(address))
    except (ValueError, RuntimeError, OSError) as error:
        raise InputError(
            f"the OTEL_… variables of the environment cannot be used: {type(error).__name__}", hint=str(error)[:200]
        ) from None
    handler = logging.StreamHandler()
    handler.setFormatter(lines)
    handler.addFilter(Seldom())
    logger = logging.getLogger("opentelemetry")
    logger.addHandler(handler)
    logger.propagate = False
    return tracing


def configured() -> bool:
    """Whether the environment asks for traces by itself."""
    names = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    return os.environ.get("OTEL_TRACES_EXPORTER", "otlp") != "none" and any(map(os.environ.get, names))
