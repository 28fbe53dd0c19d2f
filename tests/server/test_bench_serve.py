"""``narrows bench serve`` against a server with known answers: times, counts, errors, and output."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from documents import run_for_both
from patience import PATIENCE_S
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from narrows.cli.main import main

PAUSE_S = 0.03


class Slow:
    """A server that sends a piece every ``PAUSE_S``; prompts of other lengths than 8 fail in one way or another."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        routes = [
            Route("/v1/models", lambda request: JSONResponse({"data": [{"id": "slow"}]})),
            Route("/v1/completions", self.complete, methods=["POST"]),
            Route("/v1/chat/completions", self.complete, methods=["POST"]),
        ]
        config = uvicorn.Config(Starlette(routes=routes), port=0, log_level="error", lifespan="off")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            pass
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"

    async def complete(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        length = len(body["prompt"]) if isinstance(body.get("prompt"), list) else 8
        if length == 9:
            return JSONResponse({"error": {"message": "no room"}}, status_code=429)

        def chunk(text: str, **more: Any) -> str:
            choice = {"delta": {"content": text}} if "messages" in body else {"text": text}
            return f"data: {json.dumps({'choices': [choice | more], 'usage': None})}\n\n"

        async def pieces() -> Any:
            if "messages" in body:
                yield chunk("", delta={"role": "assistant", "content": ""})
            for _ in range(body["max_tokens"]):
                await asyncio.sleep(PAUSE_S)
                yield chunk('"text": "" ')
                if length == 10:
                    return
            yield chunk("", finish_reason="length", **({"delta": {}} if "messages" in body else {}))
            usage = {"prompt_tokens": length, "completion_tokens": body["max_tokens"]}
            yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n"

        return StreamingResponse(pieces(), media_type="text/event-stream")


@pytest.fixture(scope="module")
def slow() -> Iterator[Slow]:
    running = Slow()
    yield running
    running.server.should_exit = True
    running.thread.join(PATIENCE_S)


def bench(slow: Slow, capsys: pytest.CaptureFixture[str], *options: str, code: int = 0) -> dict[str, Any]:
    fixed = ["--num-requests", "6", "--output-length", "4", "--warmup", "0", "--vocab-size", "50"]
    out, document = run_for_both(capsys, ["bench", "serve", "--url", slow.url, *fixed, *options], code)
    assert "TTFT" in out
    return document


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_times_and_tokens_match_the_server(
    slow: Slow, capsys: pytest.CaptureFixture[str], tmp_path: Path, endpoint: str
) -> None:
    saved, drawn = tmp_path / "requests", tmp_path / "load.png"
    files = ["--save-requests", str(saved), "--plot", str(drawn)]
    found = bench(slow, capsys, "--input-length", "8", "--concurrency", "3", "--endpoint", endpoint, *files)["figures"]
    assert (found["completed"], found["failed"], found["peak_concurrency"]) == (6, 0, 3)
    assert (found["input_tokens"], found["output_tokens"]) == (48, 24)
    pause = 1e3 * PAUSE_S
    for name, least in (("ttft_ms", pause), ("tpot_ms", pause), ("itl_ms", pause), ("e2e_ms", 4 * pause)):
        assert least * 0.95 <= found[name]["median"] <= 2 * least, name
    assert 8 * PAUSE_S <= found["duration_s"] <= 16 * PAUSE_S
    rows = [json.loads(line) for line in saved.read_text().splitlines()]
    assert len(rows) == 6 and all(len(row["pieces_s"]) == 4 for row in rows) and drawn.stat().st_size > 10_000
    assert slow.bodies[-1]["ignore_eos"] and slow.bodies[-1]["model"] == "slow"


@pytest.mark.parametrize(("length", "said"), [("9", "HTTP 429: no room"), ("10", "the stream was cut off")])
def test_failures_are_counted_shown_and_end_in_another_exit_code(
    slow: Slow, capsys: pytest.CaptureFixture[str], length: str, said: str
) -> None:
    found = bench(slow, capsys, "--input-length", length, code=1)["figures"]
    assert found["errors"] == {said: 6} and found["completed"] == 0 and found["ttft_ms"]["mean"] is None


def test_the_key_is_not_logged(slow: Slow, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--input-length", "8", "--api-key", "hush"]
    monkeypatch.setattr("sys.argv", ["narrows", "bench", "serve", *options])
    assert bench(slow, capsys, *options)["command"] == "narrows bench serve --input-length 8 --api-key ***"


def test_requests_are_sent_at_their_rate(slow: Slow, capsys: pytest.CaptureFixture[str]) -> None:
    found = bench(slow, capsys, "--input-length", "8", "--rate", "20", "--burstiness", "1000")["figures"]
    assert found["duration_s"] == pytest.approx(6 / 20 + 4 * PAUSE_S, abs=0.1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--url", "http://127.0.0.1:9"], "no OpenAI-compatible server answers at http://127.0.0.1:9"),
        (["--url", "nowhere"], "is no URL"),
        (["--rate", "0"], "--rate is 0; it must be more than 0"),
        (["--num-requests", "0"], "--num-requests is 0; it must be at least 1"),
        (["--trace", "/no/trace"], "the trace /no/trace cannot be read"),
    ],
)
def test_wrong_loads_are_a_one_line_error(
    slow: Slow, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    assert main(["bench", "serve", "--url", slow.url, *options]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
