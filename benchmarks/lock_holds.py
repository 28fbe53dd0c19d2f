"""For how long does preparing a large body keep the interpreter's lock, so that no other thread of a server runs?

    python benchmarks/lock_holds.py

Twice: on a thread of the server (``--intake threads``), and with the process that ``narrows serve`` has for it, where
the server only sends the bytes and takes in what comes of them. A second thread sleeps half a millisecond again and
again; its longest lateness is the longest hold, on a machine that does nothing else. Prints a table.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from narrows.checkpoints import model_path
from narrows.engine.model_text import load_model_text
from narrows.server.http.body_process import BodyProcess
from narrows.server.http.errors import ApiError
from narrows.server.http.json_io import JsonLimits, read_body
from narrows.server.openai import completions
from narrows.server.openai.completions import CompletionRequest
from narrows.server.options import ServedModel, ServerOptions
from narrows.server.request import RequestReader


def longest_hold(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds that the work took, and the longest that the other thread waited meanwhile."""
    late, over = [0.0], threading.Event()

    def sleeps() -> None:
        last = time.perf_counter()
        while not over.is_set():
            time.sleep(0.0005)
            now = time.perf_counter()
            late[0], last = max(late[0], now - last), now

    thread = threading.Thread(target=sleeps)
    thread.start()
    began = time.perf_counter()
    with suppress(ApiError):
        work()
    took = time.perf_counter() - began
    over.set()
    thread.join()
    return took, late[0]


def _read(reader: RequestReader, data: bytes, limits: JsonLimits) -> Any:
    return completions.read(reader, read_body(data, CompletionRequest, limits))


def main() -> None:
    """Run it."""
    sys.setswitchinterval(0.001)
    path = model_path("narrows-demo")
    text = load_model_text(path)
    assert text.tokenizer is not None
    model = ServedModel(
        names=("demo",),
        tokenizer=text.tokenizer,
        generation=text.generation,
        max_context=2048,
        vocab_size=text.tokenizer.vocab_size,
        eos_ids=text.tokenizer.eos_ids,
    )
    reader, limits = RequestReader(model, ServerOptions()), JsonLimits()
    process = BodyProcess(model, ServerOptions())
    bodies = {
        "15 MB of text": json.dumps({"prompt": "hello world " * 1_250_000}).encode(),
        "15 MB of escapes": b'{"prompt":"' + b"\\n" * 7_400_000 + b'"}',
        "1,000,000 token ids": json.dumps({"prompt": [5] * 1_000_000}).encode(),
        "500 prompts of 2,000 token ids": json.dumps({"prompt": [[5] * 2000] * 500, "max_tokens": 1}).encode(),
        "4 MB of wrong items": b'{"prompt":[' + b"1," * 500_000 + b'"a"]}',
    }
    process.ask(b'{"prompt":"x"}', CompletionRequest, limits, completions.read)  # until it is ready
    try:
        for name, data in bodies.items():
            for where, work in (
                (
                    "on a thread",
                    lambda data=data: completions.read(reader, read_body(data, CompletionRequest, limits)),
                ),
                ("in a process", lambda data=data: process.ask(data, CompletionRequest, limits, completions.read)),
            ):
                took, hold = longest_hold(work)
                print(f"{name:32} {where:12} {took * 1000:5.0f} ms, longest hold {hold * 1000:4.0f} ms")
    finally:
        process.end()


if __name__ == "__main__":
    main()
