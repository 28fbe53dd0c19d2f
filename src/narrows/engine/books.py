"""The plans of an engine: a book for each layout it was asked to run, and what all of them rest on.

Knows planners, books, batches and limits; no rank. Beside each book there is one for steps that need whole rows of
logits. Where one plan runs at every step (a saved one, or of a batch-invariant engine) it is in place of all.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from time import perf_counter

from narrows.engine.config import Resolved
from narrows.errors import ConfigError
from narrows.layout import Encoding, deal
from narrows.plan.book import BookKey, PinnedBook, PlanBook
from narrows.plan.deploy import book_context
from narrows.plan.evidence import evidence_line
from narrows.plan.expected import expected_keys
from narrows.plan.plan import Plan
from narrows.plan.planner import Planner
from narrows.sched.batch import Batch

__all__ = ["Books"]

_MOST_AHEAD = 128
"""Buckets whose plans are made before a step asks for them, 20 KB each in every process."""


class Books:
    """All plan books over one deployment; ``current`` is the one that steps are planned by."""

    def __init__(self, resolved: Resolved) -> None:
        self._resolved = resolved
        self.planner = Planner(resolved.deployment, resolved.forms)
        self._logits_planner = Planner(replace(resolved.deployment, want_logits=True), resolved.forms)
        self._books: dict[str, tuple[PlanBook, PlanBook]] = {}
        self._expected = self._expected_keys()
        self.use(resolved.asked.layout)

    def use(self, layout: str) -> None:
        """Plan the steps from now on under another layout, for weights held as this engine's are.

        Raises:
            ConfigError: the layout cannot apply, or one plan runs at every step.
        """
        if layout != self._resolved.asked.layout and self._resolved.plan is not None:
            raise ConfigError(f"one plan runs at every step of this engine, so {layout} cannot be used beside it")
        if layout not in self._books:
            book = self.of(layout)
            self._books[layout] = book, PlanBook(self._logits_planner, layout, book.context)
        self.current, self._of_logits = self._books[layout]

    def of(self, layout: str) -> PlanBook:
        """A book of plans under another layout, for weights held as this engine's are."""
        return PlanBook(self.planner, layout, book_context(self._resolved.limits.max_context))

    def plan_for(self, batch: Batch, *, keep_logits: bool = False) -> Plan:
        """The plan that a step of this batch runs."""
        book: PlanBook | PinnedBook = self._of_logits if keep_logits or batch.needs_logits else self.current
        if self._resolved.plan is not None:
            book = PinnedBook(self._resolved.plan)
        return book.plan_for(batch.phase, batch.group_rows, batch.num_logit_rows)

    def plan_ahead(self) -> Plan | None:
        """Make one more plan that no step has asked for yet; None: enough of them are made."""
        found = next(self._expected, None)
        if found is None:
            return None
        key, needs_logits = found
        return (self._of_logits if needs_logits else self.current).plan_of(key)

    def warm(self, seconds: float) -> int:
        """Make plans for the buckets that steps will ask for first, for so long; how many were made."""
        count, end = 0, perf_counter() + seconds
        while perf_counter() < end and self.plan_ahead() is not None:
            count += 1
        return count

    def _expected_keys(self) -> Iterator[tuple[BookKey, bool]]:
        if self._resolved.plan is not None:
            return
        limits = self._resolved.limits
        keys = expected_keys(limits.num_groups, most_decoding=limits.most_decoding, rows_per_step=limits.rows_per_step)
        for key in itertools.islice(keys, _MOST_AHEAD):
            yield key, False
            yield key, True  # somebody draws, or asks for log-probabilities

    def planned(self) -> tuple[tuple[BookKey | None, Plan], ...]:
        """Every plan made so far with what it is for; None: any step."""
        if self._resolved.plan is not None:
            return ((None, self._resolved.plan),)
        books = dict.fromkeys(book for pair in list(self._books.values()) for book in pair)
        return tuple(found for book in books for found in book.plans())

    def plans(self) -> tuple[Plan, ...]:
        """Every plan made so far."""
        return tuple(plan for _, plan in self.planned())

    @property
    def encodings(self) -> frozenset[Encoding]:
        """What rows travel as before gathers, where not plain, in the plans made so far."""
        return frozenset[Encoding]().union(*(plan.encodings for plan in self.plans()))

    def evidence(self) -> str:
        """One line if what is predicted rests on prices that were not measured, of a full prefill step and of a decode
        step of one row per group; empty if it does not."""
        resolved, limits = self._resolved, self._resolved.limits
        device = resolved.deployment.device.name
        if resolved.plan is not None:
            return evidence_line(device, {"the plan": resolved.plan})
        rows, groups = limits.rows_per_step, limits.num_groups
        return evidence_line(
            device,
            {
                f"prefill of {rows} rows": self.current.plan_for("prefill", deal(rows, groups), 1),
                f"decode of {groups} row{'s' * (groups > 1)}": self.current.plan_for("decode", (1,) * groups, groups),
            },
        )
