"""Requests made up from the published document: no answer that it does not name, none of another shape, no 5xx."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import schemathesis
from effort import examples
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from server_lab import Lab

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
ROUTES = [
    "GET /health",
    "GET /metrics",
    "GET /server_info",
    "GET /v1/models",
    "GET /v1/models/{name}",
    "POST /detokenize",
    "POST /start_profile",
    "POST /stop_profile",
    "POST /tokenize",
    "POST /v1/chat/completions",
    "POST /v1/completions",
    "POST /v1/messages",
    "POST /v1/messages/count_tokens",
    "POST /v1/responses",
]


@pytest.fixture(scope="module")
def lab(hermes_tokenizer) -> Iterator[Lab]:
    made = Lab(hermes_tokenizer)
    yield made
    made.backend.close()


def test_the_document_lists_every_route_with_its_errors(lab: Lab) -> None:
    document = lab.app.openapi()
    found = {
        f"{m.upper()} {p}": o["responses"] for p, operations in document["paths"].items() for m, o in operations.items()
    }
    assert sorted(found) == ROUTES
    for route, responses in found.items():
        assert {"401", "500", "503"} <= set(responses) and "422" not in responses, route
        assert route.startswith("GET") or {"400", "408", "413", "415"} <= set(responses), route


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("route", ROUTES)
def test_every_valid_request_gets_a_documented_response(lab: Lab, route: str) -> None:
    method, path = route.split()
    operation = schemathesis.openapi.from_asgi("/openapi.json", lab.app)[path][method]

    @given(case=operation.as_strategy())
    @settings(
        max_examples=examples(60) if method == "POST" else 8,
        deadline=None,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        database=None,
    )
    def ask(case) -> None:
        if isinstance(case.body, dict):
            case.body.pop("model", None)  # nearly every name would be another's, and nothing else looked at
        statuses.add(case.call_and_validate(checks=CHECKS).status_code)

    statuses: set[int] = set()
    ask()
    assert statuses & {200, 404}, "some are served"
