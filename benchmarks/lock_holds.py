"""For how long does preparing a large body keep the interpreter's lock, so that no other thread of a server runs?

    python benchmarks/lock_holds.py

A second thread sleeps half a millisecond again and again; its longest lateness is the longest hold. Prints a table.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from narrows.server.json_body import JsonLimits, parse_json
from narrows.server.schema.completions import CompletionRequest


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
    work()
    took = time.perf_counter() - began
    over.set()
    thread.join()
    return took, late[0]


def main() -> None:
    """Run it."""
    sys.setswitchinterval(0.001)
    limits = JsonLimits()
    text = json.dumps({"prompt": "hello world " * 1_250_000}).encode()
    ids = json.dumps({"prompt": [5] * 1_000_000}).encode()
    escapes = b'{"prompt":"' + b"\\n" * 7_400_000 + b'"}'
    parsed = parse_json(ids, limits)
    for name, work in (
        ("15 MB of text, parsed", lambda: parse_json(text, limits)),
        ("15 MB of escapes, parsed", lambda: parse_json(escapes, limits)),
        ("1,000,000 token ids, parsed", lambda: parse_json(ids, limits)),
        ("1,000,000 token ids, checked", lambda: CompletionRequest.model_validate(parsed)),
    ):
        took, hold = longest_hold(work)
        print(f"{name:30} {took * 1000:4.0f} ms, longest hold {hold * 1000:4.0f} ms")


if __name__ == "__main__":
    main()
