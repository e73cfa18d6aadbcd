"""Errors as an OpenAI client knows them: a status, a type, the field that is wrong, and what would be right."""

from __future__ import annotations

from typing import Any

from armillary.base.errors import ArmillaryError

LONGEST = 200  # characters of a field's name; a message may have ten times as many
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    502: "upstream_error",
    504: "upstream_error",
    503: "service_unavailable_error",
}


class HTTPError(ArmillaryError):
    """status: of the answer; param: the field of the request; code: a word for programs; retry: seconds
    after which to try again."""

    def __init__(
        self,
        status: int,
        what: str,
        *,
        param: str | None = None,
        code: str | None = None,
        hint: str | None = None,
        retry: float | None = None,
    ) -> None:
        super().__init__(what, hint=hint)
        self.status, self.code, self.retry = status, code, retry
        self.param = None if param is None else param[:LONGEST]  # it may be a client's own words

    def body(self) -> dict[str, Any]:
        message = (f"{self.what}: {self.hint}" if self.hint else self.what)[: 10 * LONGEST]
        kind = _TYPES.get(self.status, "server_error")
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        return {} if self.retry is None else {"retry-after": str(max(1, round(self.retry)))}


def explained(error: Exception) -> HTTPError:
    """Any error as one for the wire; what is not the client's fault says nothing of our insides."""
    if isinstance(error, HTTPError):
        return error
    if isinstance(error, ArmillaryError):
        return HTTPError(400, error.what, hint=error.hint)
    return HTTPError(500, "the server failed to answer this request", code="internal_error")


def shutting_down() -> HTTPError:
    return HTTPError(503, "the server is shutting down", code="shutting_down", retry=5)
