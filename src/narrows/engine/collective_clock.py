"""How long collectives take while an engine serves, and what they carry: an instrument cheap enough to stay on.

Knows bound steps and clocks; not what the numbers are for. Two clock readings per collective and nothing per stage:
under a microsecond each. A GPU is not waited for, so there the seconds would be those of launching; ask on CPU ranks.
A collective's seconds hold the wait for the slowest rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

from narrows.engine.program import Frame, Operation, Registers, Repeated
from narrows.engine.worker import Worker
from narrows.layout import Encoding, Move, MoveKind
from narrows.plan.plan import Step

__all__ = ["CollectiveClock", "Counted", "added", "crossing", "received"]


class Counted(NamedTuple):
    """Collectives of one kind. ``nbytes``: received from other ranks. Of one rank, or added over ranks."""

    calls: int = 0
    nbytes: int = 0
    seconds: float = 0.0


Kind = tuple[str, str]
"""(layouts, collective), as in ``("(S,S) -> (S,R)", "all_gather")``."""


class CollectiveClock:
    """Counts the collectives of one rank; an instrument of :meth:`Engine.instrument`."""

    def __init__(self, worker: Worker) -> None:
        self._counts: dict[Kind, Counted] = {}

    def readings(self) -> dict[Kind, Counted]:
        """By layouts and collective."""
        counts, self._counts = self._counts, {}
        return counts

    def __call__(
        self, layer: int | None, step: Step, reads: tuple[int, ...], writes: tuple[int, ...], operation: Operation
    ) -> Operation:
        move = step.move
        if move is None or move.kind is MoveKind.SLICE:
            return operation
        reads, writes, encodings = crossing(step, reads, writes)
        return _Timed(move, encodings, reads, writes, operation, self._count)

    def _count(self, kind: Kind, nbytes: int, seconds: float) -> None:
        old = self._counts.get(kind, Counted())
        self._counts[kind] = Counted(old.calls + 1, old.nbytes + nbytes, old.seconds + seconds)


class _Timed(Repeated):
    """A collective with the clock around it; a tape that repeats it tells the clock."""

    def __init__(
        self,
        move: Move,
        encodings: Sequence[Encoding],
        reads: tuple[int, ...],
        writes: tuple[int, ...],
        operation: Operation,
        count: Callable[[Kind, int, float], None],
    ) -> None:
        self._kind = (f"{move.src} -> {move.dst}", str(move.kind))
        self._move, self._encodings, self._reads, self._writes = move, encodings, reads, writes
        self._operation, self._count = operation, count
        self._nbytes = 0

    def __call__(self, regs: Registers, frame: Frame) -> None:
        held = [regs[i].nbytes for i in self._reads]
        start = perf_counter()
        self._operation(regs, frame)
        seconds = perf_counter() - start
        self._nbytes = sum(
            received(self._move, before, regs[i], encoding)
            for before, i, encoding in zip(held, self._writes, self._encodings, strict=True)
        )
        if not frame.rehearsed:
            self._count(self._kind, self._nbytes, seconds)

    def repeated(self, regs: Registers, frame: Frame) -> Callable[[float], None]:
        return partial(self._count, self._kind, self._nbytes)


def crossing(
    step: Step, reads: tuple[int, ...], writes: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[Encoding, ...]]:
    """Registers of the fields that cross ranks, before and after, and how each travels. Where a reduction and the norm
    after it are one step, the residual crosses none."""
    num = len(writes) if step.stage is None else 1
    return reads[:num], writes[:num], step.encodings or (Encoding.PLAIN,) * num


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


def received(move: Move, held: int, left: Any, encoding: Encoding) -> int:
    """Bytes of one field that a rank gets from the others: it holds ``held`` bytes and has ``left`` afterwards."""
    others = move.num_ranks - 1
    if move.kind is MoveKind.REDUCE_SCATTER:
        return int(left.nbytes) * others
    if move.kind is MoveKind.ALL_REDUCE:  # a share of the sum from each, then each one's sum
        return 2 * int(left.nbytes) * others // move.num_ranks
    came = int(left.nbytes) - held
    if encoding is Encoding.PLAIN or not came:
        return came
    row_bytes = int(left.shape[-1] * left.element_size())
    return came // row_bytes * encoding.row_bytes(left.shape[-1], left.element_size())
