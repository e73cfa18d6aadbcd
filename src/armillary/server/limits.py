"""How much one client may ask for, and how much all of them together: bounded by default.

Who is over a bound is told so at once, with the time after which to come back; nothing waits in a
line that has no end.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from armillary.server.errors import HTTPError, shutting_down


@dataclass
class Bucket:
    """Refills at `rate` per second up to `most`; infinite if the rate is None."""

    rate: float | None
    most: float
    level: float = 0.0
    at: float | None = None

    def __post_init__(self) -> None:
        assert self.rate is None or self.rate > 0

    def wait(self, amount: float, now: float) -> float:
        """Seconds until `amount` can be taken; 0: now."""
        if self.rate is None:
            return 0.0
        self._fill(now)
        return max(0.0, (min(amount, self.most) - self.level) / self.rate)

    def take(self, amount: float, now: float) -> None:
        """May go below nothing: what an answer took is known at its end only."""
        if self.rate is not None:
            self._fill(now)
            self.level -= amount

    def _fill(self, now: float) -> None:
        assert self.rate is not None
        if self.at is None:
            self.level = self.most
        else:
            self.level = min(self.most, self.level + (now - self.at) * self.rate)
        self.at = now


@dataclass
class Client:
    """One key: its name in logs and metrics, and what is left to it."""

    name: str
    requests: Bucket
    tokens: Bucket

    def headers(self) -> dict[str, str]:
        """What is left, as the rate headers of the OpenAI API."""
        found = {}
        for word, bucket in (("requests", self.requests), ("tokens", self.tokens)):
            if bucket.rate is not None:
                found[f"x-ratelimit-limit-{word}"] = str(int(bucket.most))
                found[f"x-ratelimit-remaining-{word}"] = str(max(0, int(bucket.level)))
        return found


class Door:
    """Who may come in. keys: secret → name; none: everybody is one client.

    requests_per_minute, tokens_per_minute: of each key; None: unbounded.
    """

    def __init__(
        self,
        keys: Mapping[str, str] | None = None,
        *,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock = clock
        self._rates = (requests_per_minute, tokens_per_minute)
        self._clients = {_digest(secret): self._client(name) for secret, name in (keys or {}).items()}
        self._everybody = None if keys else self._client("")

    def _client(self, name: str) -> Client:
        per = [Bucket(None if rate is None else rate / 60, rate or 0.0) for rate in self._rates]
        return Client(name, *per)

    def enter(self, authorization: str | None) -> Client:
        """The client of an Authorization header. Raises HTTPError 401."""
        if self._everybody is not None:
            return self._everybody
        kind, _, secret = (authorization or "").partition(" ")
        if kind.lower() != "bearer" or not secret:
            raise HTTPError(401, "no key was given", code="missing_api_key", hint="send Authorization: Bearer KEY")
        wanted, found = _digest(secret.strip()), None
        for known, client in self._clients.items():  # all of them, so that time tells nothing
            if hmac.compare_digest(known, wanted):
                found = client
        if found is None:
            raise HTTPError(401, "the key is not known", code="invalid_api_key")
        return found

    def admit(self, client: Client) -> None:
        """A request, before anything is done for it. Raises HTTPError 429."""
        self._take(client.requests, 1, "requests")

    def admit_tokens(self, client: Client, tokens: int) -> None:
        """So many prompt tokens. Raises HTTPError 429."""
        self._take(client.tokens, tokens, "tokens")

    def _take(self, bucket: Bucket, amount: int, what: str) -> None:
        now = self.clock()
        wait = bucket.wait(amount, now)
        if wait > 0:
            raise HTTPError(
                429,
                f"this key has used up its {bucket.most:g} {what} per minute",
                code="rate_limit_exceeded",
                retry=wait,
                hint=f"try again in {max(1, round(wait))} s",
            )
        bucket.take(amount, now)

    def charge(self, client: Client, tokens: int) -> None:
        """Tokens that an answer took."""
        client.tokens.take(tokens, self.clock())


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


@dataclass
class Load:
    """Everything that is under way in one engine. most: answers at a time, waiting ones included; patience:
    seconds that a prompt may have to wait before the first of its tokens is read."""

    most: int
    patience: float = 30.0
    answers: int = 0
    waiting_tokens: int = 0
    draining: bool = False

    def admit(self, answers: int, tokens: int, seconds_per_token: float) -> None:
        """Raises HTTPError 429 when there is too much, 503 when no more is taken."""
        if self.draining:
            raise shutting_down()
        if self.answers + answers > self.most:
            raise HTTPError(
                429,
                f"{self.answers} answers are under way, and {self.most} is the most",
                code="overloaded",
                retry=1 + self.waiting_tokens * seconds_per_token,
            )
        wait = self.waiting_tokens * seconds_per_token
        if self.waiting_tokens and wait > self.patience:
            raise HTTPError(
                429,
                f"the prompts in line take about {wait:.0f} s to read",
                code="overloaded",
                retry=wait - self.patience,
            )
