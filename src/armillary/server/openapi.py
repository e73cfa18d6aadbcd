"""The OpenAPI document, from the forms that requests are checked against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from armillary import __version__

_ERRORS = {
    "400": "the request is wrong; the error names the field",
    "401": "a key is needed",
    "404": "there is no such model",
    "413": "the body is too large",
    "415": "the body is not application/json",
    "429": "too much at once; Retry-After says when to come back",
    "503": "no requests are taken",
}


def document(posts: Sequence[tuple[str, type[BaseModel]]], others: Sequence[tuple[str, str]]) -> dict[str, Any]:
    schemas: dict[str, Any] = {"Error": _ERROR}
    paths: dict[str, Any] = {}
    problem = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}
    responses = {status: {"description": text, **problem} for status, text in _ERRORS.items()}
    for path, form in posts:
        schema = form.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {})
        schemas[form.__name__] = schema
        body = {"required": True, "content": {"application/json": {"schema": _ref(form.__name__)}}}
        answer = {"200": {"description": "the answer, or a stream of events"}}
        paths[path] = {"post": {"operationId": path, "requestBody": body, "responses": answer | responses}}
    for method, path in others:
        name = path.replace(":path", "")
        entry: dict[str, Any] = {"operationId": f"{method} {path}"}
        entry["responses"] = {"200": {"description": "the answer"}} | responses
        if "{" in name:
            word = name.partition("{")[2].rstrip("}")
            entry["parameters"] = [{"name": word, "in": "path", "required": True, "schema": {"type": "string"}}]
        paths.setdefault(name, {})[method.lower()] = entry
    return {
        "openapi": "3.1.0",
        "info": {"title": "Armillary", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}],
    }


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
