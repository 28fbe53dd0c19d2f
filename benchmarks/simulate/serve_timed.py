"""`narrows serve`, and the seconds of every step that its ranks ran: prices for `narrows simulate --step-times`.

    python benchmarks/simulate/serve_timed.py STEPS MODEL [flags of narrows serve]

writes one line of JSON per step to the file STEPS when it ends (SIGTERM or Ctrl-C). A step's seconds are from when the
ranks were done with the one before, or were given it if that was later, to when the host has its result.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import Future
from pathlib import Path
from time import perf_counter
from typing import Any

from narrows.cli.main import main
from narrows.engine.core import Engine, StepInFlight
from narrows.service import service

_STEPS: list[dict[str, Any]] = []


class TimedEngine(Engine):
    """An engine that notes when each step was handed out and when it was done."""

    _done_s = 0.0

    def push(self) -> StepInFlight | None:
        step = super().push()
        if step is None:
            return None
        given_s, batch = perf_counter(), step.batch

        def note(future: Future[Any]) -> None:
            now = perf_counter()
            seconds, self._done_s = now - max(given_s, self._done_s), now
            longest = max(chunk.start + len(chunk.tokens) for group in batch.groups for chunk in group)
            kind = {"phase": batch.phase, "rows": batch.num_rows, "group_rows": batch.group_rows}
            newest = max(chunk.request for group in batch.groups for chunk in group)
            more = {"logit_rows": batch.num_logit_rows, "longest": longest, "newest": newest}
            _STEPS.append(kind | more | {"predicted_s": step.plan.seconds, "seconds": seconds})

        step.future.add_done_callback(note)
        return step


if __name__ == "__main__":
    service.Engine = TimedEngine  # type: ignore[misc]
    code = main(["serve", *sys.argv[2:]])
    Path(sys.argv[1]).write_text("".join(json.dumps(step) + "\n" for step in _STEPS), encoding="utf-8")
    raise SystemExit(code)
