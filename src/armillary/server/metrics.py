"""What the server counts, in the form that Prometheus reads."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from armillary.engine.request import Answer

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """Each server has its own registry. No label holds a prompt or a key: clients go by their names."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        made = {"registry": self.registry, "namespace": "armillary"}
        self.requests = Counter("requests", "Requests by route and status", ["route", "status"], **made)
        self.rejections = Counter("rejections", "Requests that were turned away, by reason", ["reason"], **made)
        self.finished = Counter("answers", "Answers by reason of their end", ["model", "finish"], **made)
        self.tokens = Counter("tokens", "Tokens by kind: prompt, reused, generated", ["model", "kind"], **made)
        self.guesses = Counter("guesses", "Guessed tokens: checked, right", ["model", "kind"], **made)
        self.first = Histogram(
            "first_token_seconds", "From submission to the first token", ["model"], buckets=_SECONDS, **made
        )
        self.between = Histogram(
            "token_seconds", "Time per further token of an answer", ["model"], buckets=_SECONDS, **made
        )
        self.running = Gauge("running", "Answers that have a place", ["model"], **made)
        self.waiting = Gauge("waiting", "Answers that wait for a place", ["model"], **made)
        self.state = Gauge("state_bytes", "Bytes of states: held, kept, free", ["model", "kind"], **made)

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
