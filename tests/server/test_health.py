"""What /health answers: whether requests are served, and why not."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from server_lab import Lab

from narrows.api import Health
from narrows.server.app import state_of


@pytest.mark.parametrize(
    ("ready", "draining", "expected"),
    [
        (Health(ready=True, num_restarts=2), False, (200, None, None)),
        (Health(ready=True), True, (503, "draining", "the server is ending")),
        (Health(ready=False, detail="rank 1 is silent"), False, (503, "unavailable", "rank 1 is silent")),
        (Health(ready=False, detail=""), False, (503, "unavailable", "the ranks are not ready")),
        (Health(ready=False, detail="rank 1 is silent"), True, (503, "draining", "the server is ending")),
    ],
)
def test_health_says_whether_requests_are_served_and_why_not(
    plain: Lab, ready: Health, draining: bool, expected: tuple[int, Any, Any]
) -> None:
    plain.backend.ready, state_of(plain.app).draining = ready, draining

    async def ask() -> tuple[int, dict[str, Any]]:
        async with plain.client() as client:
            answer = await client.get("/health")
        return answer.status_code, answer.json()

    status, body = asyncio.run(ask())
    error = body.get("error", {})
    assert (status, error.get("code"), error.get("message")) == expected
    if status == 200:
        assert body == {"status": "ok", "num_restarts": 2}
