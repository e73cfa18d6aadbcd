"""Models that a server answers for: `--url`, with the standard library alone."""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

from armillary.base.errors import InputError
from armillary.base.events import Events

KEY = "ARMILLARY_API_KEY"
WAIT = 300.0  # seconds in which a server may say nothing


def stream(url: str, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The events of an answer. Raises InputError with what the server says, or that it is not there."""
    if not url.startswith(("http://", "https://")):
        raise InputError(f"'{url}' is no address of a server", hint="for example http://127.0.0.1:8000/v1")
    headers = {"content-type": "application/json", "accept": "text/event-stream"}
    if os.environ.get(KEY):
        headers["authorization"] = f"Bearer {os.environ[KEY]}"
    data = json.dumps(body | {"stream": True}).encode()
    asked = urllib.request.Request(url.rstrip("/") + path, data, headers)
    events = Events()
    try:
        with urllib.request.urlopen(asked, timeout=WAIT) as answer:
            while piece := answer.read1():
                for one in events.push(piece):
                    if one == "[DONE]":
                        return
                    yield _checked(json.loads(one))
            raise InputError(f"the server at {url} broke off before its answer was complete")
    except urllib.error.HTTPError as error:
        raise InputError(_said(error), hint=_hint(error.code)) from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise InputError(f"the server at {url} did not answer: {getattr(error, 'reason', error)}") from None


def _checked(event: Any) -> dict[str, Any]:
    if not isinstance(event, dict):
        raise ValueError("its events are no JSON objects")
    if "error" in event:
        error = event["error"]
        raise InputError(f"the server failed: {error.get('message') if isinstance(error, dict) else error}")
    return event


def _said(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.loads(error.read())["error"]["message"])
    except (ValueError, TypeError, KeyError, OSError):
        return f"the server says {error.code}"


def _hint(status: int) -> str | None:
    return f"set {KEY}" if status == 401 else None


def generated(url: str, model: str, prompt: str, options: dict[str, Any]) -> Iterator[str]:
    """Pieces of a completion."""
    for event in stream(url, "/completions", {"model": model, "prompt": prompt} | options):
        for choice in event.get("choices") or ():
            yield choice.get("text") or ""


def said(url: str, model: str, messages: list[dict[str, str]], options: dict[str, Any]) -> Iterator[str]:
    """Pieces of an answer in a conversation."""
    for event in stream(url, "/chat/completions", {"model": model, "messages": messages} | options):
        for choice in event.get("choices") or ():
            yield (choice.get("delta") or {}).get("content") or ""
