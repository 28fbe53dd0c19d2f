"""The contract between a server and an engine: generations in, updates out, health and numbers (:class:`Backend`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from narrows.errors import NarrowsError
from narrows.sched.guide import Guide
from narrows.sched.sampling import Logprobs, SamplingParams, TokenScore

__all__ = ["Backend", "Draining", "Generation", "Health", "QueueFull", "Stats", "Unavailable", "Update"]


class Unavailable(NarrowsError):  # noqa: N818 - a state of the server
    """No request can be taken now: the ranks are down or starting."""


class Draining(Unavailable):
    """The server is ending: it finishes running requests and accepts no new ones."""


class QueueFull(NarrowsError):  # noqa: N818 - a state of the server
    """The queue is full. ``retry_after_s``: when a retry is worth it, in seconds."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One text to generate. ``max_tokens`` 0, with ``sampling.prompt_logprobs``: only score the prompt.

    ``end_ids`` end the text and are its last token. ``sampling``: how tokens are chosen; None: the best one.
    ``priority``: lower runs earlier; equal ones first come, first served. ``guide``: the tokens that may come
    next, at each step; None: any. ``client``: the client that it runs for; clients share running slots, pages and the
    queue.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    end_ids: frozenset[int] = frozenset()
    sampling: SamplingParams | None = None
    priority: int = 0
    guide: Guide | None = None
    client: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """News of one generation, in order: new ids, and one entry of ``logprobs`` per id if requested.

    ``prompt_logprobs`` come once, when the prompt has run. ``finish_reason`` is empty until the last update: ``stop``
    (an end id), ``length``, ``abort`` (ended on request), or ``error``, which ``error`` explains in one line.
    ``num_cached_prompt``: tokens of the prompt whose rows were found in the prefix cache.
    """

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[Logprobs, ...] = ()
    prompt_logprobs: tuple[TokenScore, ...] = ()
    num_cached_prompt: int = 0
    finish_reason: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """Whether requests are served: ``ready`` is never true while a rank is dead, stuck or starting.

    ``detail`` says why not, in one line.
    """

    ready: bool
    detail: str = ""
    num_restarts: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """Numbers of this moment (``running``, ``waiting``, ``kv_*``) and totals since the start (the rest).

    ``restarts``: times that new ranks took the place of failed ones. ``plans``: steps run by (phase, bucket of rows,
    layout). ``plan_seconds``: of those that have ended, the seconds predicted and taken; empty where one plan runs
    every step. ``collectives``: by (layout, collective): how many, bytes that crossed ranks, seconds; empty when they
    are not measured. ``predicted_collectives``: seconds predicted for them. The numbers of the scheduler are those of
    :class:`~narrows.sched.stats.SchedulerStats`.
    """

    running: int = 0
    waiting: int = 0
    kv_pages: int = 0
    kv_pages_used: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    output_tokens: int = 0
    steps: int = 0
    restarts: int = 0
    idle_rows: tuple[int, ...] = ()
    group_running: tuple[int, ...] = ()
    group_kv_pages_used: tuple[int, ...] = ()
    group_preemptions: tuple[int, ...] = ()
    short_steps: tuple[int, ...] = ()
    bound_steps: Mapping[str, int] = field(default_factory=dict)
    plans: Mapping[tuple[str, int, str], int] = field(default_factory=dict)
    plan_seconds: Mapping[tuple[str, int, str], tuple[float, float]] = field(default_factory=dict)
    collectives: Mapping[tuple[str, str], tuple[int, int, float]] = field(default_factory=dict)
    predicted_collectives: Mapping[tuple[str, str], float] = field(default_factory=dict)


class Backend(Protocol):
    """Generates tokens for many callers at once: token ids in, updates out.

    Calls may come from any thread; updates are delivered on a thread of the backend's.
    """

    def submit(self, generation: Generation, deliver: Callable[[Update], None]) -> int:
        """Submit a generation; returns its number. ``deliver`` gets every update and must not block.

        Raises:
            ConfigError: it can never run here (too long, an id outside the vocabulary).
            QueueFull: the queue is full, and this client has its even share of it.
            Draining, Unavailable: no generation is accepted now.
        """
        ...

    def abort(self, number: int) -> None:
        """End a generation now; its pages are free within one step. One that has already ended is not changed."""
        ...

    def health(self) -> Health:
        """Whether requests are served now. It waits for no rank, so it returns at once."""
        ...

    def stats(self) -> Stats:
        """Numbers for people and for metrics; costs next to nothing."""
        ...

    def start_trace(self, num_steps: int | None = None) -> dict[str, Any]:
        """Start a trace of the next steps, ``num_steps`` at most; returns its file.

        Raises:
            ConfigError: traces are off, one is running, or the number is out of range.
        """
        ...

    def stop_trace(self) -> dict[str, Any]:
        """End the trace, unless it has ended by itself; returns a summary of the file.

        Raises:
            ConfigError: none was started, or it cannot be written.
        """
        ...

    def info(self) -> dict[str, Any]:
        """The running configuration: config, mesh, ranks, transport, plan cache, sources of prices; for JSON."""
        ...
