"""When an engine takes in the requests that have been sent: at once, or a few together."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["AT_ONCE", "Gate", "Intake"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Intake:
    """How an engine takes in requests; by itself each at once.

    Attributes:
        arrival_s: from when a request is sent until the scheduler can have it (HTTP, tokenizing).
        recv_interval: while texts decode, requests are looked for once in so many steps, and after each step that had
            rows of prompts (SGLang's ``--scheduler-recv-interval``).
        wait_steps: while texts decode, prompts wait until so many steps have begun (TensorRT-LLM's
            ``batch_wait_timeout_iters``), or
        wait_rows: until their rows and those of the texts are so many (its ``batch_wait_max_tokens_ratio`` of
            ``max_num_tokens``).
    """

    arrival_s: float = 0.0
    recv_interval: int = 1
    wait_steps: int = 0
    wait_rows: int = 0


AT_ONCE = Intake()


class Gate:
    """Whether requests that have arrived are taken in now, step after step."""

    def __init__(self, intake: Intake) -> None:
        self._intake = intake
        self._steps_since = 0
        self._looks = True
        self._steps_waited = 0

    def is_open(self, arrived_rows: int, decode_rows: int) -> bool:
        """Whether prompts of ``arrived_rows`` are taken in beside texts of ``decode_rows``; asked between two steps."""
        if not decode_rows:
            return True
        waits = self._steps_waited < self._intake.wait_steps and arrived_rows + decode_rows < self._intake.wait_rows
        return self._looks and not waits

    def begun(self, *, prompts: bool, waiting: bool) -> None:
        """A step has begun: with rows of prompts or without, while requests wait at the gate or none does."""
        self._steps_waited = self._steps_waited + 1 if waiting else 0
        self._steps_since += 1
        self._looks = prompts or self._steps_since >= self._intake.recv_interval
        if self._looks:
            self._steps_since = 0
