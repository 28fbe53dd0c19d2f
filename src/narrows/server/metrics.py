"""``/metrics`` in Prometheus' format: the backend's numbers, and latencies of requests (names: docs/serving.md)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from narrows.api import Backend, Stats

__all__ = ["Metrics"]

_FIRST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_BETWEEN = (0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
_WHOLE = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """The metrics of one server. Numbers are added on the event loop; any thread may :meth:`render` them."""

    def __init__(self, backend: Backend) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_BackendNumbers(backend))
        histogram = self._histogram
        self._first = histogram("time_to_first_token", "from a request to its first token", _FIRST)
        self._between = histogram("inter_token_latency", "between tokens of a text", _BETWEEN)
        self._whole = histogram("end_to_end", "from a request to the end of its text", _WHOLE)
        self._ended = Counter(
            "narrows_generations", "Texts that have ended, by how", ["reason"], registry=self._registry
        )
        self._answers = Counter(
            "narrows_http_answers", "Answers by route and status", ["route", "status"], registry=self._registry
        )

    def first_token(self, seconds: float) -> None:
        """From a request to its first token."""
        self._first.observe(seconds)

    def next_tokens(self, seconds: float, count: int) -> None:
        """``count`` tokens that came together: each took its part of the time."""
        for _ in range(count):
            self._between.observe(seconds / count)

    def ended(self, seconds: float, reason: str) -> None:
        """From a request to the end of its text."""
        self._whole.observe(seconds)
        self._ended.labels(reason).inc()

    def answered(self, route: str, status: int) -> None:
        """An answer has begun."""
        self._answers.labels(route, str(status)).inc()

    def render(self) -> bytes:
        """The text format."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"narrows_{name}_seconds", f"Seconds {what}", buckets=buckets, registry=self._registry)


class _BackendNumbers(Collector):
    """Reads the backend's numbers at each scrape."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def describe(self) -> Iterator[Metric]:
        """Nothing: names are known, and registering must not ask the backend."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """All metrics of the backend."""
        stats = self._backend.stats()
        yield from _now(stats)
        yield from _totals(stats)
        yield from _by_plan(stats)


def _now(stats: Stats) -> Iterator[Metric]:
    prompt, cached = stats.prompt_tokens, stats.cached_prompt_tokens
    for name, what, value in (
        ("requests_running", "Texts being generated", stats.running),
        ("requests_waiting", "Texts that wait for pages", stats.waiting),
        ("kv_pages", "Pages of the KV cache, all groups", stats.kv_pages),
        ("kv_pages_used", "Pages in use", stats.kv_pages_used),
        ("kv_usage_ratio", "Pages in use, of all", stats.kv_pages_used / max(stats.kv_pages, 1)),
        ("prefix_cache_hit_ratio", "Prompt tokens found in the prefix cache, of all", cached / max(prompt, 1)),
    ):
        yield GaugeMetricFamily(f"narrows_{name}", what, value)
    yield _by_group(GaugeMetricFamily, "group_requests_running", "Texts being generated", stats.group_running)
    yield _by_group(GaugeMetricFamily, "group_kv_pages_used", "Pages in use", stats.group_kv_pages_used)


def _totals(stats: Stats) -> Iterator[Metric]:
    for name, what, value in (
        ("preemptions", "Texts preempted for lack of pages", stats.preemptions),
        ("prompt_tokens", "Tokens of prompts", stats.prompt_tokens),
        ("cached_prompt_tokens", "Tokens of prompts found in the prefix cache", stats.cached_prompt_tokens),
        ("output_tokens", "Tokens generated", stats.output_tokens),
        ("steps", "Steps run", stats.steps),
        ("restarts", "Times that new ranks took the place of failed ones", stats.restarts),
    ):
        yield CounterMetricFamily(f"narrows_{name}", what, value)
    for name, what, values in (
        ("idle_rows", "Rows that a group waited for", stats.idle_rows),
        ("group_preemptions", "Texts that the group put back", stats.group_preemptions),
        ("group_short_steps", "Steps in which the group had too few pages", stats.short_steps),
    ):
        yield _by_group(CounterMetricFamily, name, what, values)
    bound = CounterMetricFamily(
        "narrows_bound_steps", "Steps in which a request waited for this limit", labels=["limit"]
    )
    for limit, steps in stats.bound_steps.items():
        bound.add_metric([limit], steps)
    yield bound


def _by_group(
    kind: type[GaugeMetricFamily] | type[CounterMetricFamily], name: str, what: str, values: Sequence[int]
) -> Metric:
    family = kind(f"narrows_{name}", what, labels=["group"])
    for group, value in enumerate(values):
        family.add_metric([str(group)], value)
    return family


def _by_plan(stats: Stats) -> Iterator[Metric]:
    plans = CounterMetricFamily(
        "narrows_plan_steps", "Steps run, by phase, bucket of rows and layout", labels=["phase", "rows", "layout"]
    )
    for (phase, rows, layout), steps in stats.plans.items():
        plans.add_metric([phase, str(rows), layout], steps)
    yield plans
    names = ["phase", "rows", "layout"]
    predicted = CounterMetricFamily("narrows_plan_predicted_seconds", "Seconds predicted for steps", labels=names)
    measured = CounterMetricFamily("narrows_plan_measured_seconds", "Seconds the same steps took", labels=names)
    for (phase, rows, layout), (expected, taken_s) in stats.plan_seconds.items():
        predicted.add_metric([phase, str(rows), layout], expected)
        measured.add_metric([phase, str(rows), layout], taken_s)
    yield from (predicted, measured)
    labels = ["layout", "collective"]
    counted = CounterMetricFamily("narrows_collectives", "Collectives run", labels=labels)
    crossed = CounterMetricFamily("narrows_collective_bytes", "Bytes that crossed ranks", labels=labels)
    taken = CounterMetricFamily("narrows_collective_seconds", "Seconds in collectives", labels=labels)
    for key, (calls, nbytes, seconds) in stats.collectives.items():
        for family, value in ((counted, calls), (crossed, nbytes), (taken, seconds)):
            family.add_metric(list(key), value)
    priced = CounterMetricFamily(
        "narrows_collective_predicted_seconds", "Seconds predicted for collectives", labels=labels
    )
    for key, expected in stats.predicted_collectives.items():
        priced.add_metric(list(key), expected)
    yield from (counted, crossed, taken, priced)
