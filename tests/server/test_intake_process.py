"""Bodies that are read in a process of their own: the same answers, and no effect of a body leaves that process."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_lab import Lab, error_of
from test_intake import request_of_a_client_that_leaves

from narrows.server.conversation import parse_chat
from narrows.server.http import body as body_module
from narrows.server.http.body_process import BodyProcess, BodyProcessLimits
from narrows.server.http.errors import ApiError
from narrows.server.http.json_io import JsonLimits
from narrows.server.openai.completions import CompletionRequest
from narrows.server.options import ServerOptions
from narrows.server.request import RequestReader
from narrows.server.schema.chat import ChatRequest
from narrows.text import Tokenizer

TOOL = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 6, "temperature": 0}
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", {**CHAT, "n": 3, "seed": 1, "logprobs": True, "top_logprobs": 2,
                              "stop": ["wor", "<|end|>"]}),
    ("/v1/chat/completions", {**CHAT, "tools": [{"type": "function", "function": TOOL}], "tool_choice": "required",
                              "parallel_tool_calls": False}),
    ("/v1/chat/completions", {**CHAT, "guided_regex": "[a-c]{3}", "ignore_eos": True}),
    ("/v1/completions", {"prompt": ["hi", "there"], "n": 2, "best_of": 2, "max_tokens": 4, "echo": True,
                         "logprobs": 1}),
    ("/v1/completions", {"prompt": [[3, 4, 5], [6]], "max_tokens": 3, "allowed_token_ids": [7, 8]}),
    ("/v1/responses", {"input": "hi", "instructions": "be brief", "max_output_tokens": 5, "metadata": {"a": "b"}}),
    ("/v1/messages", {"model": "alias", "max_tokens": 900, "messages": [{"role": "user", "content": "hi"}]}),
    ("/v1/messages/count_tokens", {"model": "alias", "messages": [{"role": "user", "content": "hi"}]}),
    ("/tokenize", {"prompt": "hello world", "return_token_strs": True}),
    ("/detokenize", {"tokens": [5, 6, 7]}),
    ("/v1/completions", {"prompt": "x", "stop": ["a"] * 33}),
    ("/v1/completions", {"prompt": "hello " * 9000}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": 7}]}),
    ("/v1/completions", {"prompt": "x", "model": "other"}),
    ("/v1/messages", {"model": "alias", "max_tokens": 1, "messages": []}),
    ("/v1/responses", {"input": "x", "conversation": "c"}),
]  # fmt: skip


@pytest.fixture(scope="module")
def apart(hermes_tokenizer: Tokenizer) -> Iterator[Lab]:
    """A lab whose bodies are all read in a process."""
    lab = Lab(hermes_tokenizer, ServerOptions(body_process=True))
    yield lab
    lab.close()


@pytest.fixture
def nothing_is_read_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_module, "LARGE_BYTES", 0)
    monkeypatch.setattr(body_module, "read_body", lambda *given: pytest.fail("a body is read in the server"))


def without_ids(text: str) -> str:
    text = re.sub(r'"(id|call_id|item_id)":"[a-z]+[_-][0-9a-f]+"', '"id"', text)
    return re.sub(r'"(created|created_at|completed_at)":[0-9]+', '"at"', text)


@pytest.mark.parametrize("number", range(len(BODIES)))
@pytest.mark.parametrize("stream", [False, True])
def test_answers_equal_those_of_threads(
    hermes: Lab, apart: Lab, monkeypatch: pytest.MonkeyPatch, number: int, stream: bool
) -> None:
    path, body = BODIES[number]
    if stream:
        body = {**body, "stream": True}
    here = asyncio.run(hermes.post(path, body))
    monkeypatch.setattr(body_module, "LARGE_BYTES", 0)
    monkeypatch.setattr(body_module, "read_body", lambda *given: pytest.fail("a body is read in the server"))
    there = asyncio.run(apart.post(path, body))
    assert there.status_code == here.status_code
    if not stream or here.status_code != 200:
        assert without_ids(there.text) == without_ids(here.text)
    else:  # how updates come together is chance
        assert there.headers["content-type"] == here.headers["content-type"]
    if here.status_code == 200 and hermes.backend.submitted:
        assert [replace(each, guide=None, client="", sampling=None) for each in apart.backend.submitted[-1:]] == [
            replace(each, guide=None, client="", sampling=None) for each in hermes.backend.submitted[-1:]
        ]


def test_the_result_sent_back_is_small_for_any_body(apart: Lab) -> None:
    """A conversation whose template drops most of it, with tools and variables that are no longer needed."""
    reader = apart.app.state.server
    body = {**CHAT, "chat_template_kwargs": {"text": "x" * 1_000_000}, "logit_bias": {"5": 1.0}}
    asked = parse_chat(reader, ChatRequest.model_validate(body), {})
    assert len(pickle.dumps(asked)) < 4000


def test_only_large_bodies_go_to_the_process(hermes_tokenizer: Tokenizer) -> None:
    lab = Lab(hermes_tokenizer, ServerOptions(body_process=True))
    try:
        process = lab.app.state.server.process
        assert asyncio.run(lab.complete("hi")).status_code == 200 and process.num_started == 0
        large = {**CHAT, "chat_template_kwargs": {"text": "x" * 20_000}}
        assert asyncio.run(lab.post("/v1/chat/completions", large)).status_code == 200
        assert process.num_started == 1
    finally:
        lab.close()
    with pytest.raises(ApiError, match="ending"):
        process.ask(b"{}", CompletionRequest, JsonLimits(), _prompt)


# Failures of the process


def _prompt(reader: RequestReader, body: Any) -> Any:
    return body.prompt


def _pid(reader: RequestReader, body: Any) -> int:
    return os.getpid()


def _spin(reader: RequestReader, body: Any) -> None:
    while True:
        pass


def _grow(reader: RequestReader, body: Any) -> int:
    _KEPT.append(bytearray(os.urandom(1) * 60_000_000))
    return os.getpid()


def _too_much(reader: RequestReader, body: Any) -> None:
    bytearray(1 << 40)


def _fail(reader: RequestReader, body: Any) -> None:
    raise ZeroDivisionError("oh")


def _die(reader: RequestReader, body: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


_KEPT: list[bytearray] = []
BODY = b'{"prompt": "hi"}'


@pytest.fixture
def process(hermes_tokenizer: Tokenizer, make_lab: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[BodyProcess]:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))  # it finds this module by name
    lab = make_lab()
    made = BodyProcess(lab.model, ServerOptions(), BodyProcessLimits(cpu_s=2))
    yield made
    made.end()


def ask(process: BodyProcess, call: Any) -> Any:
    return process.ask(BODY, CompletionRequest, JsonLimits(), call)


def test_any_body_leaves_the_process_usable(process: BodyProcess) -> None:
    first = ask(process, _pid)
    assert first != os.getpid() and ask(process, _prompt) == "hi"
    for call, status, said in (
        (_spin, 400, "more than 2 s to read"),
        (_too_much, 400, "too much memory"),
        (_fail, 500, "could not be read"),
        (_die, 503, "try again"),
    ):
        with pytest.raises(ApiError) as told:
            ask(process, call)
        assert told.value.status == status and said in told.value.message
        assert ask(process, _prompt) == "hi"
    assert process.num_started == 3, "two of them ended it"


def test_a_process_that_has_grown_is_replaced(process: BodyProcess) -> None:
    grown = ask(process, _grow)
    with pytest.raises(ProcessLookupError):
        os.kill(grown, 0)
    assert ask(process, _pid) != grown and process.num_started == 2


def test_errors_keep_their_fields_across_processes() -> None:
    error = ApiError(400, "no", param="a.b", code="c", headers={"retry-after": "1"})
    found = pickle.loads(pickle.dumps(error))
    assert vars(found) == vars(error) and isinstance(found, ApiError)


def test_the_process_has_no_torch() -> None:
    code = "import sys, narrows.server.http.body_process, narrows.server.openai.chat; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_a_disconnected_client_is_not_waited_for(apart: Lab, nothing_is_read_here: None) -> None:
    asyncio.run(asyncio.wait_for(request_of_a_client_that_leaves(apart, json.dumps({"prompt": "x"}).encode()), 60))
    assert asyncio.run(apart.complete("hi")).status_code == 200
    assert apart.app.state.server.bodies._held_bytes == 0


def test_many_at_once_are_all_answered(apart: Lab, nothing_is_read_here: None) -> None:
    async def run() -> list[httpx.Response]:
        return list(await asyncio.gather(*(apart.complete("x" * number, max_tokens=1) for number in range(1, 30))))

    threads = threading.active_count()
    answers = asyncio.run(run())
    assert [answer.status_code for answer in answers] == [200] * 29
    assert error_of(asyncio.run(apart.complete(5)))["param"] == "prompt"
    assert threading.active_count() < threads + 10, "a thread per request"
