"""How the clients of a load fared: their waiting times, and Jain's index of what each got."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from narrows.workload.arrivals import Ask
from narrows.workload.figures import Answer, Latency

__all__ = ["ClientFigures", "Fairness", "by_client", "jain", "max_min"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientFigures:
    """Of one client, or of all that sent one request each (``clients`` of them)."""

    name: str
    clients: int
    requests: int
    output_tokens: int
    ttft_ms: Latency
    e2e_ms: Latency


@dataclass(frozen=True, slots=True, kw_only=True)
class Fairness:
    """``jain``: Jain's index over clients of the part of its max-min fair share of running slots that each had
    while texts waited; 1: all the same part, 1 / clients: one had everything. ``least``: the smallest of those parts.
    ``clients``: how many are in it."""

    jain: float
    least: float
    clients: int
    by_client: tuple[ClientFigures, ...]


def by_client(asks: Sequence[Ask], answers: Sequence[Answer]) -> tuple[ClientFigures, ...]:
    """Every client that sent several requests, by name, and the others together; failed requests count nowhere."""
    found: dict[str, list[Answer]] = {}
    for ask, answer in zip(asks, answers, strict=True):
        found.setdefault(ask.client, [])
        if not answer.error and answer.pieces_s:
            found[ask.client].append(answer)
    single = found.pop("", [])
    rows = [_figures(name, 1, found[name]) for name in sorted(found)]
    return (*rows, _figures("others, one request each", len(single), single)) if single else tuple(rows)


def _figures(name: str, clients: int, answers: Sequence[Answer]) -> ClientFigures:
    return ClientFigures(
        name=name,
        clients=clients,
        requests=len(answers),
        output_tokens=sum(answer.output_tokens for answer in answers),
        ttft_ms=Latency.of([answer.ttft_s for answer in answers]),
        e2e_ms=Latency.of([answer.e2e_s for answer in answers]),
    )


def jain(values: Sequence[float]) -> float:
    """Jain's index of fairness: 1 if all are equal, 1 / n if one has everything (and if there are none, 1).

    >>> jain([1.0, 1.0, 1.0]), jain([3.0, 0.0, 0.0])
    (1.0, 0.3333333333333333)
    """
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0


def max_min(total: float, wanted: Mapping[str, int]) -> dict[str, float]:
    """The max-min fair shares of ``total``: no client gets more than it wants, and the rest goes to the others evenly.

    >>> max_min(10, {"a": 2, "b": 9, "c": 9})
    {'a': 2, 'b': 4.0, 'c': 4.0}
    """
    shares: dict[str, float] = {}
    for index, client in enumerate(sorted(wanted, key=lambda client: wanted[client])):
        shares[client] = min(wanted[client], total / (len(wanted) - index))
        total -= shares[client]
    return shares
