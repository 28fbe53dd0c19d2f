"""The plans of an engine: two plan caches per layout, and the plans that are made before a step needs them.

One cache of a layout is for steps that choose the best token, the other for steps that need whole rows of logits. A
saved plan, and the one plan of a batch-invariant engine, replace all caches.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from time import perf_counter

from narrows.engine.config import Resolved
from narrows.errors import ConfigError
from narrows.layout import Encoding, split_evenly
from narrows.plan.cache import FixedPlan, PlanCache, PlanKey
from narrows.plan.context_prices import ContextPrices
from narrows.plan.deploy import priced_context
from narrows.plan.expected import expected_keys
from narrows.plan.plan import Plan
from narrows.plan.planner import Planner
from narrows.plan.report.evidence import evidence_line
from narrows.sched.batch import Batch

__all__ = ["EnginePlans"]

_MOST_AHEAD = 128
"""Buckets whose plans are made before a step needs them, 20 KB each in every process."""


class EnginePlans:
    """The plan caches of one deployment; ``current`` is the one that steps are planned by."""

    def __init__(self, resolved: Resolved) -> None:
        self._resolved = resolved
        self.planner = Planner(resolved.deployment, resolved.sharding)
        self._logits_planner = Planner(replace(resolved.deployment, want_logits=True), resolved.sharding)
        self._prices = ContextPrices(self.planner)
        self._logits_prices = ContextPrices(self._logits_planner)
        self._caches: dict[str, tuple[PlanCache, PlanCache]] = {}
        self._expected = self._expected_keys()
        self.select(resolved.engine_config.layout)

    def select(self, layout: str) -> None:
        """Plan the steps from now on under another layout, for weights held as this engine's are.

        Raises:
            ConfigError: the layout cannot apply, or one plan runs at every step.
        """
        if layout != self._resolved.engine_config.layout and self._resolved.plan is not None:
            raise ConfigError(f"one plan runs at every step of this engine, so {layout} cannot be used beside it")
        if layout not in self._caches:
            cache = self.cache_of(layout)
            self._caches[layout] = cache, PlanCache(self._logits_planner, layout, cache.context)
        self.current, self._of_logits = self._caches[layout]

    def cache_of(self, layout: str) -> PlanCache:
        """A new plan cache under another layout, for weights held as this engine's are."""
        return PlanCache(self.planner, layout, priced_context(self._resolved.limits.max_context))

    def plan_for(self, batch: Batch, *, keep_logits: bool = False) -> Plan:
        """The plan that a step of this batch runs."""
        cache: PlanCache | FixedPlan = self._of_logits if keep_logits or batch.needs_logits else self.current
        if self._resolved.plan is not None:
            cache = FixedPlan(self._resolved.plan)
        return cache.plan_for(batch)

    def predicted_seconds(self, plan: Plan, batch: Batch, *, keep_logits: bool = False) -> float:
        """What :meth:`plan_for`'s ``plan`` predicts for the batch, at the context of its rows."""
        return (self._logits_prices if keep_logits or batch.needs_logits else self._prices).seconds(plan, batch)

    def plan_ahead(self) -> Plan | None:
        """Make one more plan ahead of need; None: enough of them are made."""
        found = next(self._expected, None)
        if found is None:
            return None
        key, needs_logits = found
        return (self._of_logits if needs_logits else self.current).plan_of(key)

    def plan_ahead_for(self, seconds: float) -> int:
        """Make plans for the buckets that steps will ask for first, for so long; how many were made."""
        count, end = 0, perf_counter() + seconds
        while perf_counter() < end and self.plan_ahead() is not None:
            count += 1
        return count

    def _expected_keys(self) -> Iterator[tuple[PlanKey, bool]]:
        if self._resolved.plan is not None:
            return
        limits = self._resolved.limits
        keys = expected_keys(limits.num_groups, most_decoding=limits.most_decoding, rows_per_step=limits.rows_per_step)
        for key in itertools.islice(keys, _MOST_AHEAD):
            yield key, False
            yield key, True  # a request samples, or wants log-probabilities

    def items(self) -> tuple[tuple[PlanKey | None, Plan], ...]:
        """Every plan made so far with the steps it is for; None: any step."""
        if self._resolved.plan is not None:
            return ((None, self._resolved.plan),)
        caches = dict.fromkeys(cache for pair in list(self._caches.values()) for cache in pair)
        return tuple(item for cache in caches for item in cache.items())

    def values(self) -> tuple[Plan, ...]:
        """Every plan made so far."""
        return tuple(plan for _, plan in self.items())

    @property
    def encodings(self) -> frozenset[Encoding]:
        """The encodings of rows before gathers, where not plain, in the plans made so far."""
        return frozenset[Encoding]().union(*(plan.encodings for plan in self.values()))

    def evidence(self) -> str:
        """One line if predictions rest on unmeasured prices, of a full prefill step and of a decode
        step of one row per group; empty if it does not."""
        resolved, limits = self._resolved, self._resolved.limits
        device = resolved.deployment.device.name
        if resolved.plan is not None:
            return evidence_line(device, {"the plan": resolved.plan})
        rows, groups = limits.rows_per_step, limits.num_groups
        return evidence_line(
            device,
            {
                f"prefill of {rows} rows": self.current.plan_of(PlanKey.of("prefill", split_evenly(rows, groups), 1)),
                f"decode of {groups} row{'s' * (groups > 1)}": self.current.plan_of(
                    PlanKey.of("decode", (1,) * groups, groups)
                ),
            },
        )
