"""What the server counts, in the form that Prometheus reads."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from armillary.engine.request import Answer

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """Each server has its own registry. No label holds a prompt or a key: clients go by their names."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "Requests by route and status", "route", "status")
        self.rejections = self._counter("rejections", "Requests that were turned away, by reason", "reason")
        self.broken = self._counter("stream_failures", "Answers that failed in a stream, by reason", "model", "reason")
        self.finished = self._counter("answers", "Answers by reason of their end", "model", "finish")
        self.tokens = self._counter("tokens", "Tokens by kind: prompt, reused, generated", "model", "kind")
        self.guesses = self._counter("guesses", "Guessed tokens: checked, right", "model", "kind")
        self.first = self._seconds("first_token_seconds", "From submission to the first token")
        self.between = self._seconds("token_seconds", "Time per further token of an answer")
        self.running = self._gauge("running", "Answers that have a place", "model")
        self.waiting = self._gauge("waiting", "Answers that wait for a place", "model")
        self.failures = self._gauge("failures", "Steps that failed so far", "model")
        self.state = self._gauge("state_bytes", "Bytes of states: held, cached, free", "model", "kind")

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, namespace="armillary", registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, namespace="armillary", registry=self.registry)

    def _seconds(self, name: str, text: str) -> Histogram:
        made = {"namespace": "armillary", "buckets": _SECONDS}
        return Histogram(name, text, ["model"], registry=self.registry, **made)  # type: ignore[arg-type]

    def answered(self, model: str, answer: Answer) -> None:
        """An answer is over."""
        self.finished.labels(model, answer.finish or "cancelled").inc()
        self.tokens.labels(model, "prompt").inc(len(answer.request.ids))
        self.tokens.labels(model, "reused").inc(answer.reused)
        self.tokens.labels(model, "generated").inc(len(answer.choices))
        self.guesses.labels(model, "checked").inc(answer.drafted)
        self.guesses.labels(model, "right").inc(answer.accepted)
        if answer.first_at:
            self.first.labels(model).observe(answer.first_at - answer.submitted)
            if len(answer.choices) > 1 and answer.done_at:
                self.between.labels(model).observe((answer.done_at - answer.first_at) / (len(answer.choices) - 1))

    def text(self) -> bytes:
        return generate_latest(self.registry)
