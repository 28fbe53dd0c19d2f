"""Where the time went: seconds, rows and bytes per stage and move, measured on every rank as plans are walked.

Knows bound steps and clocks. A collective's seconds hold the wait for the slowest rank, as they do in any profiler.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter

from narrows.engine.program import Frame, Operation, Registers, Wrap
from narrows.engine.worker import Worker
from narrows.plan.plan import Step

__all__ = ["Profile", "ProfileRow"]


@dataclass(slots=True)
class _Count:
    calls: int = 0
    seconds: float = 0.0
    rows: int = 0
    nbytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileRow:
    """One kind of step over a whole run. Seconds are the mean over ranks; rows are those of the busiest rank,
    bytes what its steps wrote."""

    phase: str
    price_class: str
    name: str
    boundary: str
    fields: tuple[str, ...]
    layouts: str
    calls: int
    seconds: float
    rows: int
    nbytes: int


class Profile:
    """Pass :meth:`wrap` to an engine; ask for :meth:`rows` when it has run."""

    def __init__(self) -> None:
        self._ranks: list[dict[tuple[str, ...], _Count]] = []

    def wrap(self, worker: Worker) -> Wrap:
        """What puts a clock around every step that ``worker`` binds."""
        counts: dict[tuple[str, ...], _Count] = {}
        self._ranks.append(counts)

        def around(
            layer: int | None, step: Step, reads: tuple[int, ...], writes: tuple[int, ...], operation: Operation
        ) -> Operation:
            where = "" if step.boundary == step.name else step.boundary
            layouts = str(step.layout) if step.layout == step.leaves else f"{step.layout} -> {step.leaves}"
            what = (step.price_class.value, step.name, where, "+".join(step.writes), layouts)

            def timed(regs: Registers, frame: Frame) -> None:
                start = perf_counter()
                operation(regs, frame)
                seconds = perf_counter() - start
                count = counts.setdefault((frame.phase, *what), _Count())
                count.calls += 1
                count.seconds += seconds
                count.rows += regs[writes[0]].shape[0]
                count.nbytes += sum(regs[i].nbytes for i in writes)

            return timed

        return around

    def reset(self) -> None:
        """Forget what was measured so far (after a warm-up)."""
        for counts in self._ranks:
            counts.clear()

    def rows(self) -> list[ProfileRow]:
        """One row per kind of step, prefill before decode, in the order in which the steps first ran."""
        keys = list(dict.fromkeys(key for counts in self._ranks for key in counts))
        keys.sort(key=lambda key: key[0] != "prefill")
        out: list[ProfileRow] = []
        for key in keys:
            held = [counts[key] for counts in self._ranks if key in counts]
            phase, price_class, name, boundary, fields, layouts = key
            out.append(
                ProfileRow(
                    phase=phase,
                    price_class=price_class,
                    name=name,
                    boundary=boundary,
                    fields=tuple(fields.split("+")),
                    layouts=layouts,
                    calls=max(count.calls for count in held),
                    seconds=sum(count.seconds for count in held) / len(self._ranks),
                    rows=max(count.rows for count in held),
                    nbytes=max(count.nbytes for count in held),
                )
            )
        return out
