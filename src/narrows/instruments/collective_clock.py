"""How long collectives take while an engine serves, and what they carry: sums cheap enough to stay on.

Two clock readings per collective and nothing per stage. A GPU is not waited for, so there the seconds would be those of
launching; ask on CPU ranks. A collective's seconds hold the wait for the slowest rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from narrows.engine.step_record import StepRecord, Wants

if TYPE_CHECKING:
    from narrows.engine.worker import Worker

__all__ = ["CollectiveClock", "Counted", "added"]


class Counted(NamedTuple):
    """Collectives of one kind. ``nbytes``: received from other ranks. Of one rank, or added over ranks."""

    calls: int = 0
    nbytes: int = 0
    seconds: float = 0.0


Kind = tuple[str, str]
"""(layouts, collective), as in ``("(S,S) -> (S,R)", "all_gather")``."""


class CollectiveClock:
    """Sums of one rank's collectives; a reader of :meth:`Engine.instrument`."""

    wants = Wants.COLLECTIVES

    def __init__(self, worker: Worker) -> None:
        self._counts: dict[Kind, Counted] = {}
        self._kinds: dict[int, tuple[object, list[Kind | None]]] = {}

    def readings(self) -> dict[Kind, Counted]:
        """By layouts and collective."""
        counts, self._counts = self._counts, {}
        return counts

    def take(self, record: StepRecord) -> None:
        """Add a step's collectives."""
        kinds = self._kinds_of(record)
        recorded = zip(record.numbers, record.starts, record.ends, record.received, strict=True)
        for number, start, end, received in recorded:
            if (kind := kinds[number]) is not None:
                old = self._counts.get(kind, _NONE)
                self._counts[kind] = Counted(old.calls + 1, old.nbytes + received, old.seconds + end - start)

    def _kinds_of(self, record: StepRecord) -> list[Kind | None]:
        """By number of the operation; made once per bound plan."""
        held = self._kinds.get(id(record.ops))
        if held is None or held[0] is not record.ops:
            moves = [op.move for op in record.ops]
            kinds = [None if move is None else (f"{move.src} -> {move.dst}", str(move.kind)) for move in moves]
            held = self._kinds[id(record.ops)] = (record.ops, kinds)
        return held[1]


_NONE = Counted()


def added(ranks: Sequence[Mapping[Kind, Counted]], to: Mapping[Kind, Counted]) -> dict[Kind, Counted]:
    """``to`` and one reading of every rank: calls are those of one rank, bytes of all, seconds the ranks' mean."""
    out = dict(to)
    for kind in dict.fromkeys(kind for counts in ranks for kind in counts):
        found = [counts[kind] for counts in ranks if kind in counts]
        old = out.get(kind, Counted())
        out[kind] = Counted(
            old.calls + max(each.calls for each in found),
            old.nbytes + sum(each.nbytes for each in found),
            old.seconds + sum(each.seconds for each in found) / len(ranks),
        )
    return out
