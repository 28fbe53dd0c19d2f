"""Refusals: status, field and alternative; and the end of an answer always ends its generations."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import httpx
import pytest
from patience import PATIENCE_S, eventually
from server_lab import Lab, error_of

from narrows.api import Generation, Health, QueueFull, Unavailable
from narrows.errors import ConfigError
from narrows.sched.sampling import SamplingParams
from narrows.server import generation as generation_module
from narrows.server.generation import RunningRequest
from narrows.server.http.json_io import to_json_in_turns
from narrows.server.options import ServerOptions


def post(of: Lab, path: str, body: Any, **options: Any) -> httpx.Response:
    return asyncio.run(of.post(path, body, **options))


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"min_p": 2}, "min_p"),
        ({"n": 0}, "n"),
        ({"n": 10**30}, "n"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"stop": [""]}, "stop.0"),
        ({"stop": 7}, "stop"),
        ({"seed": "x"}, "seed"),
        ({"seed": 2**70}, "seed"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"min_tokens": 9, "max_tokens": 3}, "min_tokens"),
        ({"priority": 1000}, "priority"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "regex", "pattern": "("}}, "response_format.pattern"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
    ],
)
def test_a_wrong_field_is_named(plain: Lab, path: str, fields: dict[str, Any], param: str) -> None:
    prompt = {"prompt": "hi"} if "chat" not in path else {"messages": [{"role": "user", "content": "hi"}]}
    answer = post(plain, path, prompt | fields)
    error = error_of(answer)
    assert answer.status_code == 400 and error["type"] == "invalid_request_error", error
    assert error["param"] == param, error
    assert not plain.backend.submitted


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {}, "prompt"),
        ("/v1/completions", {"prompt": []}, "prompt"),
        ("/v1/completions", {"prompt": [[]]}, "prompt"),
        ("/v1/completions", {"prompt": [5, "a"]}, "prompt"),
        ("/v1/completions", {"prompt": [2048]}, "prompt"),
        ("/v1/completions", {"prompt": "x", "suffix": "y"}, "suffix"),
        ("/v1/completions", {"prompt": "x", "best_of": 3}, "best_of"),
        ("/v1/completions", {"prompt": ["x"] * 20, "n": 100}, "n"),
        ("/v1/chat/completions", {}, "messages"),
        ("/v1/chat/completions", {"messages": []}, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "user"}]}, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": 7, "content": "x"}]}, "messages.0.role"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}, "top_logprobs"),
        ("/tokenize", {}, "prompt"),
        ("/detokenize", {"tokens": [2048]}, "tokens"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
    ],
)
def test_missing_fields_of_each_route_are_refused(plain: Lab, path: str, body: dict[str, Any], param: str) -> None:
    answer = post(plain, path, body)
    error = error_of(answer)
    assert answer.status_code == 400 and (error["param"] or "").startswith(param), error


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "body"),
        (b"{", "not JSON"),
        (b"\xff", "JSON"),
        (b"[1]", "must be a JSON object"),
        (b'{"prompt": "x", "temperature": NaN}', "temperature"),
        (b'{"prompt": "x", "temperature": 1e999}', "temperature"),
        (b'{"prompt": "\\ud800"}', "surrogate"),
        (b'{"prompt": ' + b"[" * 100_000, "more than 100 deep"),
    ],
)
def test_bodies_that_are_no_json(plain: Lab, content: bytes, said: str) -> None:
    async def send() -> httpx.Response:
        async with plain.client() as client:
            headers = {"content-type": "application/json"}
            return await client.post("/v1/completions", content=content, headers=headers)

    answer = asyncio.run(send())
    assert answer.status_code == 400 and said in error_of(answer)["message"]


def test_bodies_are_json_or_refused(plain: Lab) -> None:
    async def send(kind: str | None) -> httpx.Response:
        async with plain.client() as client:
            headers = {} if kind is None else {"content-type": kind}
            return await client.post("/v1/completions", content=b'{"prompt": "x", "max_tokens": 1}', headers=headers)

    for kind in ("text/plain", "application/x-www-form-urlencoded", None):
        answer = asyncio.run(send(kind))
        assert answer.status_code == 415 and "Content-Type: application/json" in error_of(answer)["message"]
    assert asyncio.run(send("application/json; charset=utf-8")).status_code == 200


def test_unknown_routes_methods_and_models(plain: Lab) -> None:
    async def get(path: str, method: str = "GET") -> httpx.Response:
        async with plain.client() as client:
            return await client.request(method, path)

    for path, method, status in (
        ("/v1/engines", "GET", 404),
        ("/v1/models/none", "GET", 404),
        ("/v1/completions", "GET", 405),
        ("/health", "DELETE", 405),
    ):
        answer = asyncio.run(get(path, method))
        assert answer.status_code == status and error_of(answer)["message"]
    answer = post(plain, "/v1/completions", {"prompt": "x", "model": "gpt-9"})
    assert answer.status_code == 404 and error_of(answer)["code"] == "model_not_found"


def test_requests_need_a_valid_key(make_lab: Callable[..., Lab]) -> None:
    of = make_lab(ServerOptions(api_keys=("one", "two")))
    for headers, status in (
        ({}, 401),
        ({"Authorization": "Bearer three"}, 401),
        ({"Authorization": "Basic one"}, 401),
        ({"Authorization": "Bearer"}, 401),
        ({"Authorization": "Bearer two"}, 200),
        ({"Authorization": "bearer one"}, 200),
    ):
        answer = post(of, "/v1/completions", {"prompt": "x", "max_tokens": 1}, headers=headers)
        assert answer.status_code == status
        assert status == 200 or error_of(answer)["type"] == "authentication_error"

    async def look() -> list[int]:
        async with of.client() as client:
            return [(await client.get(path)).status_code for path in ("/health", "/metrics", "/v1/models")]

    assert asyncio.run(look()) == [200, 401, 401]
    with pytest.raises(ConfigError, match="API key"):
        ServerOptions(api_keys=("",))


def test_backend_refusals_have_their_status(plain: Lab) -> None:
    plain.backend.refuse = QueueFull("9 generations wait already", 6.2)
    answer = post(plain, "/v1/completions", {"prompt": "x"})
    assert answer.status_code == 429 and answer.headers["retry-after"] == "7"
    assert error_of(answer)["type"] == "rate_limit_error"
    plain.backend.refuse = Unavailable("the ranks are starting")
    assert post(plain, "/v1/completions", {"prompt": "x"}).status_code == 503
    plain.backend.refuse = ConfigError("the request needs KV cache for 900 tokens")
    assert error_of(post(plain, "/v1/completions", {"prompt": "x"}))["param"] == "prompt"
    plain.backend.refuse = None
    plain.backend.ready = Health(ready=False, detail="nothing was heard of rank 1 for 3.0 s")

    async def health() -> httpx.Response:
        async with plain.client() as client:
            return await client.get("/health")

    answer = asyncio.run(health())
    assert answer.status_code == 503 and "rank 1" in error_of(answer)["message"]


def test_when_one_text_of_many_is_refused_none_runs(plain: Lab) -> None:
    real, refused = plain.backend.submit, QueueFull("full", 1.0)

    def submit(generation: Any, deliver: Any) -> int:
        if len(plain.backend.submitted) == 2:
            raise refused
        return real(generation, deliver)

    plain.backend.gate.clear()
    plain.backend.submit = submit  # type: ignore[method-assign]
    assert post(plain, "/v1/completions", {"prompt": "x", "n": 3}).status_code == 429
    assert sorted(plain.backend.aborted) == [0, 1] and plain.backend.num_live == 0
    plain.backend.gate.set()


def test_an_engine_that_fails_is_an_error_of_the_answer(plain: Lab) -> None:
    plain.backend.fail_after = 2
    answer = post(plain, "/v1/completions", {"prompt": "x", "max_tokens": 9})
    assert answer.status_code == 500 and "rank 1 died" in error_of(answer)["message"]
    *pieces, last = asyncio.run(plain.events("/v1/completions", {"prompt": "x", "max_tokens": 9}))
    assert "rank 1 died" in last["error"]["message"] and "[DONE]" not in pieces


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long_ends_with_its_generations(make_lab: Callable[..., Lab], stream: bool) -> None:
    of = make_lab(ServerOptions(request_timeout_s=0.2))
    of.backend.gate.clear()
    answer = post(of, "/v1/completions", {"prompt": "x", "n": 2, "stream": stream})
    if stream:
        assert "--request-timeout" in answer.text
    else:
        assert answer.status_code == 504 and "0.2 s" in error_of(answer)["message"]
    assert sorted(of.backend.aborted) == [0, 1]
    of.backend.gate.set()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_client_that_goes_away_ends_its_generations(served: Any, path: str, stream: bool) -> None:
    backend = served.lab.backend
    before = len(backend.aborted)
    backend.gate.clear()
    prompt = {"prompt": "hi"} if "chat" not in path else {"messages": [{"role": "user", "content": "hi"}]}
    body = json.dumps(prompt | {"n": 3, "stream": stream}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2]))) as sock:
        sock.sendall(head.encode() + body)
        eventually(lambda: backend.num_live == 3)
    eventually(lambda: len(backend.aborted) == before + 3 and backend.num_live == 0)
    backend.gate.set()


def test_large_bodies_are_refused_before_or_during_transfer(served: Any) -> None:
    """Sent by hand: a client that is answered while it still sends may not get to read the answer."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    chunk = b"2710\r\n" + b" " * 10_000 + b"\r\n"
    for sent in (b"Content-Length: 200000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 11):
        with socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2])), timeout=PATIENCE_S) as sock:
            sock.sendall(head + sent)
            answer = sock.recv(100_000)
        assert answer.startswith(b"HTTP/1.1 413 ") and b"at most 100000 bytes" in answer


def test_a_body_that_never_arrives_ends_the_request(make_lab: Callable[..., Lab]) -> None:
    of = make_lab(ServerOptions(request_timeout_s=0.2))

    async def stalls() -> httpx.Response:
        async def slow() -> Any:
            yield b"{"
            await asyncio.sleep(3600)

        async with of.client() as client:
            return await client.post("/v1/completions", content=slow(), headers={"content-type": "application/json"})

    answer = asyncio.run(stalls())
    assert answer.status_code == 408


def test_the_size_of_an_answer_is_bounded(plain: Lab) -> None:
    """Log-probabilities of many tokens and texts would take gigabytes."""
    body: dict[str, Any] = {"prompt": ["a"] * 8, "n": 128, "max_tokens": 400, "logprobs": 5}
    answer = asyncio.run(plain.post("/v1/completions", body))
    error = error_of(answer)
    assert answer.status_code == 400 and error["param"] == "logprobs"
    assert "2,457,600 log-probabilities" in error["message"] and not plain.backend.submitted
    fewer = asyncio.run(plain.post("/v1/completions", body | {"max_tokens": 16, "prompt": ["a"] * 2}))
    assert fewer.status_code == 200 and len(fewer.json()["choices"]) == 256


def test_submitting_many_texts_leaves_turns_for_others(plain: Lab) -> None:
    turns: list[int] = []

    async def run() -> None:
        state = plain.app.state.server
        running = RunningRequest(state.backend, state.loop_calls, state.metrics, state.turns, "a client")
        generations = [Generation(prompt=(3,), max_tokens=1, sampling=SamplingParams())] * 64
        submitting = asyncio.ensure_future(running.submit(generations, "prompt"))
        while not submitting.done():
            turns.append(len(plain.backend.submitted))
            await asyncio.sleep(0)
        running.close()

    asyncio.run(run())
    assert len(plain.backend.submitted) == 64 and max(b - a for a, b in pairwise(turns)) <= 8


def test_large_answer_is_serialised_off_the_event_loop(plain: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"logprobs": True, "top_logprobs": 2, "seed": 1, "max_tokens": 40}
    body = {"messages": [{"role": "user", "content": "hi"}], **asked}
    whole = asyncio.run(plain.post("/v1/chat/completions", body)).json()
    monkeypatch.setattr(generation_module, "_MANY_LOGPROBS", 0)
    threads: list[str] = []

    def noted(value: Any) -> bytes:
        threads.append(threading.current_thread().name)
        return to_json_in_turns(value)

    monkeypatch.setattr(generation_module, "to_json_in_turns", noted)
    answer = asyncio.run(plain.post("/v1/chat/completions", body))
    assert [name.startswith("narrows requests") for name in threads] == [True]
    assert answer.json()["choices"] == whole["choices"] and answer.headers["content-type"] == "application/json"


def test_single_text_may_have_logprobs_of_all_tokens(make_lab: Callable[..., Lab]) -> None:
    """Without max_tokens that is the whole context."""
    lab = make_lab(max_context=100_000)
    fields = {"logprobs": True, "top_logprobs": 20}
    one, two = (asyncio.run(lab.chat("hi", **fields, n=n)) for n in (1, 2))
    assert (one.status_code, two.status_code) == (200, 400)
