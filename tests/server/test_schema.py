"""Requests made from our own OpenAPI document, right and wrong ones: none of them is a failure of the server."""

from __future__ import annotations

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import load_all_checks
from schemathesis.specs.openapi.checks import ignored_auth, positive_data_acceptance

from armillary.server import Server

load_all_checks()
API = schemathesis.openapi.from_dict(Server([]).document)
# Keys are tested below. What a document cannot say (a grammar that is none, a prompt that is too long) is
# refused although the document would allow it: with a 400 of the documented form, which is checked.
LEFT_OUT = [ignored_auth, positive_data_acceptance]
HEADERS = {"authorization": "Bearer secret-of-a"}


@API.parametrize()
@settings(
    max_examples=4,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_requests_from_the_document(case, served) -> None:
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        case.body["model"] = "tiny"  # a right name leads further in
        if "completions" in case.path:
            case.body.setdefault("max_tokens", 4)
    case.call_and_validate(base_url=served.url, headers=HEADERS, timeout=60, excluded_checks=LEFT_OUT)


def test_every_path_needs_a_key(served) -> None:
    for path, methods in served.server.document["paths"].items():
        for method in methods:
            url = f"{served.url}{path.replace('{name}', 'tiny').replace('{id}', 'x')}"
            assert httpx.request(method, url).status_code == 401
            assert httpx.request(method, url, headers={"authorization": "Bearer wrong-secret"}).status_code == 401


def test_other_methods(served) -> None:
    for path, methods in served.server.document["paths"].items():
        url = f"{served.url}{path.replace('{name}', 'tiny').replace('{id}', 'x')}"
        found = httpx.request("OPTIONS", url, headers=HEADERS)
        allowed = {method.upper() for method in methods} | ({"HEAD"} if "get" in methods else set())
        assert found.status_code == 405
        assert set(found.headers["allow"].split(", ")) == allowed
        assert "error" in found.json()


@pytest.fixture(autouse=True, scope="module")
def _all_is_over(served):
    yield
    served.quiet()
