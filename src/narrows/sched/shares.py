"""Max-min fair shares of running slots, pages and rows among clients, by which turns are decided.

If every request is from a different client, or all are from one client, turns alone decide. Else the second running
request of a client comes after the first of every other, and so on. ``docs/scheduling.md`` has the rules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter

from narrows.sched.limits import Limits
from narrows.sched.request import Request

__all__ = ["RowShares", "Shares"]

_TURN = attrgetter("turn")
_SINCE = attrgetter("since")
_RANK = attrgetter("rank", "since")


@dataclass(frozen=True, slots=True, kw_only=True)
class RowShares:
    """How clients share the rows of one step.

    ``most``: rows of single tokens that a client has regardless of others. ``kept``: rows that its further ones leave
    to the prompts of clients that have fewer. ``for_prompts``: rows that are left if no client has more than ``most``.
    """

    most: int
    kept: int
    for_prompts: int


class Shares:
    """The clients of one scheduler, notified when a text arrives, runs, stops running and ends."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._num_texts = 0
        self._texts: Counter[str] = Counter()
        self._running: Counter[str] = Counter()
        self._waiting: Counter[str] = Counter()
        self._stopped: dict[str, tuple[int, int]] = {}  # of each client: when a text last stopped running, and which

    # -- notifications -----------------------------------------------------------------------------------------------

    def came(self, request: Request) -> None:
        """A text has come and waits."""
        self._num_texts += 1
        self._texts[request.client] += 1
        self._waiting[request.client] += 1

    def placed(self, request: Request) -> None:
        """A text that waited runs."""
        request.since = self.since(request)
        _less(self._waiting, request.client)
        self._running[request.client] += 1

    def put_back(self, request: Request, step: int) -> None:
        """A text that ran waits again."""
        self._stop(request, step)
        self._waiting[request.client] += 1

    def ended(self, request: Request, step: int, *, ran: bool) -> None:
        """A text is no more; ``ran``: until now, else it waited."""
        if ran:
            self._stop(request, step)
        else:
            _less(self._waiting, request.client)
        self._num_texts -= 1
        _less(self._texts, request.client)
        if request.client not in self._texts:
            self._stopped.pop(request.client, None)

    def _stop(self, request: Request, step: int) -> None:
        _less(self._running, request.client)
        self._stopped[request.client] = step + 1, request.id

    # -- what it says --------------------------------------------------------------------------------------------------

    @property
    def compete(self) -> bool:
        """Whether there are several clients, and one of them has several texts."""
        return 1 < len(self._texts) < self._num_texts

    @property
    def waiting(self) -> dict[str, int]:
        """How many texts of each client wait."""
        return dict(self._waiting)

    def running(self, client: str) -> int:
        """How many of its texts run."""
        return self._running[client]

    def since(self, request: Request) -> tuple[int, int]:
        """Its turn beside other clients' texts: as if it had come when another of its client's last stopped running."""
        step, number = self._stopped.get(request.client, (0, request.id))
        if number == request.id:
            return request.turn
        return max(request.turn, (step + request.priority * self._limits.aging_steps, request.arrival))

    def first(self, waiting: Iterable[Request]) -> Request | None:
        """The waiting request, by the order of turns, that runs next; None if none waits.

        Of those as urgent as the first in turn, or more: the first of the client that has the fewest texts running.
        """
        heads: dict[str, Request] = {}
        least_urgent = 0
        for request in waiting:
            if not heads:
                if not self.compete or (not self._running[request.client] and self.since(request) == request.turn):
                    return request
                least_urgent = request.priority
            if request.priority <= least_urgent:
                heads.setdefault(request.client, request)
        return min(heads.values(), key=lambda head: (self._running[head.client], self.since(head)), default=None)

    def order(self, running: Iterable[Request]) -> list[Request]:
        """Texts that run in the order in which they get rows; the last is the first to be put back.

        Sets the ``rank`` of each: how many of its client's texts go before it.
        """
        if not self.compete:
            return sorted(running, key=_TURN)
        seen: Counter[str] = Counter()
        texts = sorted(running, key=_SINCE)
        for text in texts:
            text.rank = seen[text.client]
            seen[text.client] += 1
        return list(_by_rank(texts))

    def waves(self, order: Sequence[Request]) -> Iterator[list[Request]]:
        """Texts in their order, cut where no text in one group may take rows from another in another group.

        None takes them from a more urgent one before it, nor a client's further text from another's first.
        """
        left = list(order)
        while left:
            first, wave, rest = left[0], list[Request](), list[Request]()
            closed = set[int]()  # groups in which an earlier text goes with a later wave
            firsts_only = self.compete and not first.rank
            for text in left:
                late = text.priority > first.priority or (firsts_only and text.rank > 0) or text.group in closed
                (rest if late else wave).append(text)
                if late:
                    closed.add(text.group)
            left = rest
            yield wave

    def row_shares(self, order: Sequence[Request]) -> RowShares:
        """How the clients of these texts, which run or are about to, share the rows of the next step."""
        rows, chunk = self._limits.rows_per_step, self._limits.prefill_chunk
        if not self.compete:
            return RowShares(most=rows, kept=0, for_prompts=rows)
        tokens: Counter[str] = Counter()
        prompts: Counter[str] = Counter()
        for text in order:
            if text.wants_rows and text.rows_left:
                (tokens if text.prefilled else prompts)[text.client] += text.rows_left
        most = max((rows - chunk) // max(len(tokens | prompts), 1), 1)
        kept = sum(min(wanted, max(most - tokens[client], 0)) for client, wanted in prompts.items())
        if kept:
            kept = max(kept, chunk)  # a chunk that may not be cut needs room for all of it
        return RowShares(most=most, kept=kept, for_prompts=rows - sum(min(each, most) for each in tokens.values()))


def _less(counts: Counter[str], client: str) -> None:
    """One fewer; a client that has none is forgotten."""
    counts[client] -= 1
    if not counts[client]:
        del counts[client]


def _by_rank(texts: Sequence[Request]) -> Iterator[Request]:
    """Texts of rising ``since`` by rank, except that a less urgent one passes none that comes before it.

    Of those left, the first decides how urgent the next must be at least; of these it is the one of the lowest rank.
    """
    levels: dict[int, list[Request]] = {}
    for text in sorted(texts, key=_RANK, reverse=True):
        levels.setdefault(text.priority, []).append(text)
    done: set[Request] = set()
    for first in texts:
        while first not in done:
            heads = (level for priority, level in levels.items() if level and priority <= first.priority)
            chosen = min(heads, key=lambda level: _RANK(level[-1])).pop()
            done.add(chosen)
            yield chosen
