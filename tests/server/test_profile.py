"""The routes that begin and end a trace: calls of the backend, refusals, API keys. Text of the metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from server_lab import Lab, error_of

from narrows.api import Stats
from narrows.server.options import ServerOptions


def post(of: Lab, path: str, **options: Any) -> httpx.Response:
    async def ask() -> httpx.Response:
        async with of.client() as client:
            return await client.post(path, **options)

    return asyncio.run(ask())


@pytest.mark.parametrize(
    ("body", "steps"),
    [
        (None, None),  # as vLLM's clients ask
        ({}, None),
        ({"steps": 7}, 7),
        ({"num_steps": 9, "output_dir": "/etc", "activities": ["CPU"]}, 9),  # as SGLang's do; where it goes is ours
    ],
)
def test_a_trace_is_begun_and_ended(plain: Lab, body: dict[str, Any] | None, steps: int | None) -> None:
    answer = post(plain, "/start_profile", **({} if body is None else {"json": body}))
    assert answer.status_code == 200 and answer.json()["file"] == "trace.json", answer.text
    assert plain.backend.traced == steps
    assert post(plain, "/stop_profile").json() == {"file": "trace.json", "steps": 3, "events": 30}


def test_refusals_are_one_clear_line(plain: Lab) -> None:
    plain.backend.trace_refusal = "this server writes no traces: start it with --trace FILE"
    for path in ("/start_profile", "/stop_profile"):
        answer = post(plain, path)
        assert answer.status_code == 400 and error_of(answer)["message"] == plain.backend.trace_refusal
    for wrong in (0, -1, 1.5, "2", 10**9):
        answer = post(plain, "/start_profile", json={"steps": wrong})
        assert answer.status_code == 400 and error_of(answer)["param"] == "steps", answer.text
    form = post(plain, "/start_profile", content=b"steps=1", headers={"content-type": "text/plain"})
    assert form.status_code == 415, "no web page can send it"


def test_keys_are_required(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(ServerOptions(api_keys=("secret",)))
    for path in ("/start_profile", "/stop_profile"):
        assert post(lab, path).status_code == 401
        assert post(lab, path, headers={"authorization": "Bearer secret"}).status_code == 200
    assert lab.backend.traced is None


def test_predicted_and_measured_are_both_reported(plain: Lab) -> None:
    plain.backend.numbers = Stats(
        restarts=2,
        plans={("decode", 8, "auto"): 5},
        plan_seconds={("decode", 8, "auto"): (0.25, 0.5)},
        collectives={("(S,P) -> (S,R)", "all_reduce"): (3, 4096, 0.125)},
        predicted_collectives={("(S,P) -> (S,R)", "all_reduce"): 0.0625},
    )

    async def metrics() -> str:
        async with plain.client() as client:
            return (await client.get("/metrics")).text

    lines = asyncio.run(metrics()).splitlines()
    plan, collective = '{layout="auto",phase="decode",rows="8"}', '{collective="all_reduce",layout="(S,P) -> (S,R)"}'
    assert "narrows_restarts_total 2.0" in lines
    assert f"narrows_plan_predicted_seconds_total{plan} 0.25" in lines
    assert f"narrows_plan_measured_seconds_total{plan} 0.5" in lines
    assert f"narrows_collective_seconds_total{collective} 0.125" in lines
    assert f"narrows_collective_predicted_seconds_total{collective} 0.0625" in lines
