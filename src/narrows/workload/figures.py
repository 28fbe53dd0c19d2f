"""Latency and throughput figures of a load, from the times at which pieces of each answer arrived. Times are seconds.

TTFT   first token - request sent
TPOT   (last token - first token) / (output tokens - 1), one per request of at least 2 tokens
ITL    from one piece of a stream to the next (one token, unless the server sends several at once)
E2E    last byte - request sent
request / output / total token throughput: over the time from the first request sent to the last answer's end
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

__all__ = ["Answer", "Figures", "Latency", "figures", "percentile"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What became of one request. ``pieces_s``: when each piece of text came; ``error``: empty if all went well."""

    sent_s: float
    ended_s: float
    pieces_s: tuple[float, ...] = ()
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    error: str = ""

    @property
    def ttft_s(self) -> float:
        return self.pieces_s[0] - self.sent_s

    @property
    def e2e_s(self) -> float:
        return self.ended_s - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """None for a text of one token."""
        if self.output_tokens < 2:
            return None
        return (self.pieces_s[-1] - self.pieces_s[0]) / (self.output_tokens - 1)

    def itl_s(self) -> Iterable[float]:
        """Between pieces; a piece is one token, unless the server sends several at once."""
        return (later - earlier for earlier, later in zip(self.pieces_s, self.pieces_s[1:], strict=False))


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Of one kind, in milliseconds."""

    mean: float
    median: float
    p90: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Latency:
        ordered = sorted(seconds)
        if not ordered:
            return cls(mean=math.nan, median=math.nan, p90=math.nan, p99=math.nan)
        mean = 1e3 * sum(ordered) / len(ordered)
        median, p90, p99 = (1e3 * percentile(ordered, q) for q in (50, 90, 99))
        return cls(mean=mean, median=median, p90=p90, p99=p99)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Of one load. Throughputs are per second."""

    completed: int
    failed: int
    duration_s: float
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    request_throughput: float
    output_throughput: float
    total_throughput: float
    peak_concurrency: int
    ttft_ms: Latency
    tpot_ms: Latency
    itl_ms: Latency
    e2e_ms: Latency
    errors: dict[str, int] = field(default_factory=dict)


def percentile(ordered: Sequence[float], q: float) -> float:
    """With linear interpolation between the two nearest, as numpy's default.

    >>> percentile([1.0, 2.0, 3.0, 4.0], 50)
    2.5
    """
    at = (len(ordered) - 1) * q / 100
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def figures(answers: Sequence[Answer]) -> Figures:
    """Of all answers; those that failed count in ``failed`` and ``errors``, and in no other figure."""
    done = [answer for answer in answers if not answer.error]
    errors: dict[str, int] = {}
    for answer in answers:
        if answer.error:
            errors[answer.error] = errors.get(answer.error, 0) + 1
    begin = min((answer.sent_s for answer in answers), default=0.0)
    duration = max((answer.ended_s for answer in answers), default=0.0) - begin
    given, made = sum(a.input_tokens for a in done), sum(a.output_tokens for a in done)
    with_text = [answer for answer in done if answer.pieces_s]
    per = 1 / duration if duration > 0 else 0.0
    return Figures(
        completed=len(done),
        failed=len(answers) - len(done),
        duration_s=duration,
        input_tokens=given,
        output_tokens=made,
        cached_tokens=sum(a.cached_tokens for a in done),
        request_throughput=len(done) * per,
        output_throughput=made * per,
        total_throughput=(given + made) * per,
        peak_concurrency=_peak(answers),
        ttft_ms=Latency.of([a.ttft_s for a in with_text]),
        tpot_ms=Latency.of([tpot for a in with_text if (tpot := a.tpot_s) is not None]),
        itl_ms=Latency.of([itl for a in with_text for itl in a.itl_s()]),
        e2e_ms=Latency.of([a.e2e_s for a in done]),
        errors=errors,
    )


def _peak(answers: Sequence[Answer]) -> int:
    """Most requests at once."""
    changes = sorted([(a.sent_s, 1) for a in answers] + [(a.ended_s, -1) for a in answers])
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most
