"""Request bodies: bounded in size, time and depth, and strict JSON."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from armillary.server.errors import HTTPError
from armillary.server.within import within

LARGEST = 8 * 2**20  # bytes
DEEPEST = 64
KEYS = 4096  # of one object
NESTED = 100_000  # lists and objects
LONG = 64 * 1024  # bytes from which reading a body is work of its own
PATIENCE = 30.0  # seconds for the whole body

B = TypeVar("B", bound=BaseModel)


async def read(request: Request, form: type[B]) -> B:
    """The body as a request of this form. Raises HTTPError naming the field that is wrong."""
    return (await _both(request, form))[1]


async def read_as_it_is(request: Request, form: type[BaseModel]) -> Any:
    """The body as it was sent, once it is checked as a request of this form."""
    return (await _both(request, form))[0]


async def _both(request: Request, form: type[B]) -> tuple[Any, B]:
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HTTPError(415, f"the body is '{kind[:100]}'", hint="send application/json")
    data = await _bytes(request)

    def work() -> tuple[Any, B]:
        found = parse(data)
        return found, checked(found, form)

    # a long one takes a second, in which others are not to wait
    return work() if len(data) < LONG else await asyncio.to_thread(work)


async def _bytes(request: Request) -> bytes:
    chunks, size, loop = list[bytes](), 0, asyncio.get_running_loop()
    until, more = loop.time() + PATIENCE, True
    while more:
        try:
            message = await within(until - loop.time(), request.receive())
        except TimeoutError:
            raise HTTPError(408, f"the body did not come within {PATIENCE:g} s") from None
        if message["type"] == "http.disconnect":
            raise HTTPError(400, "the client left before its request was complete")
        chunk, more = message.get("body", b""), message.get("more_body", False)
        size += len(chunk)
        if size > LARGEST:
            raise HTTPError(413, f"the body is larger than {LARGEST} bytes", code="body_too_large")
        chunks.append(chunk)
    return b"".join(chunks)


def parse(data: bytes) -> Any:
    """JSON that is what it seems: UTF-8 without lone surrogates, finite numbers, no key twice, not too deep."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise HTTPError(400, "the body is not UTF-8", code="invalid_json") from None
    depth, count = _nesting(text) if text.count("[") + text.count("{") > DEEPEST else (0, 0)
    if depth > DEEPEST:
        raise HTTPError(400, f"the JSON is nested deeper than {DEEPEST}", code="invalid_json")
    if count > NESTED:
        raise HTTPError(400, f"the JSON has more than {NESTED} lists and objects", code="invalid_json")
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
        raise _named(error, data) from None


def _named(error: ValidationError, data: Any) -> HTTPError:
    """The first mistake, with the path of its field. Of a field that may be several things, the one that most of what
    was sent could be says what is wrong."""
    problems = error.errors(include_url=False)
    kinds = [problem for problem in problems if problem["loc"][-1:] == ("type",)]  # explains all else
    unknown = [problem for problem in problems if problem["type"] == "extra_forbidden"]
    problem = (kinds or unknown or sorted(problems, key=_far))[0]
    path = _path(problem["loc"], data, absent=problem["type"] in ("extra_forbidden", "missing"))
    if problem["type"] == "union_tag_invalid":
        return _no_member(path, problem["input"], problem["ctx"]["expected_tags"])
    if problem["type"] == "extra_forbidden":
        return HTTPError(400, f"unknown parameter '{path[:200]}'", param=path, code="unknown_parameter")
    if problem["type"] == "missing":
        return HTTPError(400, f"'{path}' is missing", param=path, code="missing_parameter")
    if problem["type"] == "wrong":
        path = ".".join(filter(None, (path, problem["ctx"]["param"])))
        return HTTPError(400, problem["msg"], param=path, code="invalid_value")
    return HTTPError(
        400, f"'{path}': {problem['msg']}" if path else problem["msg"], param=path or None, code="invalid_value"
    )


def _no_member(path: str, given: Any, known: str) -> HTTPError:
    """Of a union whose members are told apart by their type (`items.kind_of`)."""
    if not isinstance(given, dict):
        return HTTPError(400, f"'{path}' is not an object", param=path, code="invalid_value")
    path, known = f"{path}.type", known.replace("'a ", "'")
    if given.get("type") is None:
        return HTTPError(400, f"'{path}' is missing", param=path, code="missing_parameter", hint=f"one of {known}")
    what = f"'{path}' is '{str(given['type'])[:100]}', which is not known"
    return HTTPError(400, what, param=path, code="invalid_value", hint=f"one of {known}")


def _far(problem: Mapping[str, Any]) -> tuple[bool, int]:
    """Orders mistakes: values out of bounds before other types than expected, and those deep inside first."""
    return problem["type"].endswith("_type"), -len(problem["loc"])


def _path(location: Sequence[int | str], data: Any, absent: bool) -> str:
    """Where in the data; what pydantic adds for the members of a union is left out. absent: the last part may not be
    there."""
    found = []
    for place, part in enumerate(location):
        inside = isinstance(data, list) if isinstance(part, int) else isinstance(data, dict) and part in data
        if inside or (absent and place == len(location) - 1):
            found.append(str(part))
            data = data[part] if inside else None
    return ".".join(found)


def _nesting(text: str) -> tuple[int, int]:
    """How deep brackets nest outside strings and how many open, without recursion; it stops at what is too much."""
    depth = deepest = count = 0
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
            count += 1
            deepest = max(deepest, depth)
            if deepest > DEEPEST or count > NESTED:
                break
        elif letter in "]}":
            depth -= 1
    return deepest, count


def _constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a number of JSON")


def _float(digits: str) -> float:
    found = float(digits)
    if found in (float("inf"), float("-inf")):
        raise ValueError(f"the number {digits[:40]} is too large")
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > KEYS:
        raise ValueError(f"an object has {len(pairs)} keys, and {KEYS} is the most")
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
