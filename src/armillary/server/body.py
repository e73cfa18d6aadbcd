"""Request bodies: bounded in size, time and depth, and strict JSON."""

from __future__ import annotations

import asyncio
import json
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from armillary.server.errors import HTTPError

LARGEST = 8 * 2**20  # bytes
DEEPEST = 64
PATIENCE = 30.0  # seconds for the whole body

B = TypeVar("B", bound=BaseModel)


async def read(request: Request, form: type[B]) -> B:
    """The body as a request of this form. Raises HTTPError naming the field that is wrong."""
    return checked(await _json(request), form)


async def read_as_it_is(request: Request, form: type[BaseModel]) -> Any:
    """The body as it was sent, once it is checked as a request of this form."""
    found = await _json(request)
    checked(found, form)
    return found


async def _json(request: Request) -> Any:
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HTTPError(415, f"the body is '{kind[:100]}'", hint="send application/json")
    return parse(await _bytes(request))


async def _bytes(request: Request) -> bytes:
    chunks, size = [], 0
    try:
        async with asyncio.timeout(PATIENCE):
            async for chunk in request.stream():
                size += len(chunk)
                if size > LARGEST:
                    raise HTTPError(413, f"the body is larger than {LARGEST} bytes", code="body_too_large")
                chunks.append(chunk)
    except TimeoutError:
        raise HTTPError(408, f"the body did not come within {PATIENCE:g} s") from None
    except ClientDisconnect:
        raise HTTPError(400, "the client left before its request was complete") from None
    return b"".join(chunks)


def parse(data: bytes) -> Any:
    """JSON that is what it seems: UTF-8 without lone surrogates, finite numbers, no key twice, not too deep."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise HTTPError(400, "the body is not UTF-8", code="invalid_json") from None
    if _depth(text) > DEEPEST:
        raise HTTPError(400, f"the JSON is nested deeper than {DEEPEST}", code="invalid_json")
    try:
        found = json.loads(text, parse_constant=_constant, parse_float=_float, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise HTTPError(400, f"the body is not JSON: {str(error)[:200]}", code="invalid_json") from None
    return found


def checked(data: Any, form: type[B]) -> B:
    if not isinstance(data, dict):
        raise HTTPError(400, "the body is not a JSON object", code="invalid_json")
    try:
        return form.model_validate(data)
    except ValidationError as error:
        raise _named(error) from None


def _named(error: ValidationError) -> HTTPError:
    """The first mistake, with the path of its field; the parts that pydantic adds to a path for a union's
    members are left out."""
    problems = error.errors(include_url=False, include_context=False)
    kinds = [problem for problem in problems if problem["loc"][-1:] == ("type",)]  # explains all else
    unknown = [problem for problem in problems if problem["type"] == "extra_forbidden"]
    problem = (kinds or unknown or problems)[0]
    path = ".".join(str(part) for part in problem["loc"] if not _of_union(part))
    if problem["type"] == "extra_forbidden":
        return HTTPError(400, f"unknown parameter '{path}'", param=path, code="unknown_parameter")
    if problem["type"] == "missing":
        return HTTPError(400, f"'{path}' is missing", param=path, code="missing_parameter")
    what = problem["msg"].removeprefix("Value error, ")
    return HTTPError(400, f"'{path}': {what}" if path else what, param=path or None, code="invalid_value")


def _of_union(part: int | str) -> bool:
    return isinstance(part, str) and not part.isidentifier()


def _depth(text: str) -> int:
    """How deep brackets nest outside strings, without recursion."""
    depth = deepest = 0
    inside = escaped = False
    for letter in text:
        if inside:
            if escaped:
                escaped = False
            elif letter == "\\":
                escaped = True
            elif letter == '"':
                inside = False
        elif letter == '"':
            inside = True
        elif letter in "[{":
            depth += 1
            deepest = max(deepest, depth)
            if deepest > DEEPEST:
                break
        elif letter in "]}":
            depth -= 1
    return deepest


def _constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a number of JSON")


def _float(digits: str) -> float:
    found = float(digits)
    if found in (float("inf"), float("-inf")):
        raise ValueError(f"the number {digits[:40]} is too large")
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object names a key twice")
    for key, value in pairs:
        _text(key)
        _walk(value)
    return found


def _walk(value: Any) -> None:
    if isinstance(value, str):
        _text(value)
    elif isinstance(value, list):
        for item in value:
            _walk(item)


def _text(value: str) -> None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("a text holds half of a surrogate pair") from None
