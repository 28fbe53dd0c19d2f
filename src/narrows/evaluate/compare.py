"""Outcomes of a task as one row of a table: shares, perplexity, and changes against one rank.

Item i of both lists is the same item.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from narrows.evaluate.statistics import SIGMAS, Mean, binomial_error, clustered_mean, paired_p_value, significance

__all__ = ["LEAST_NATS", "Outcome", "Perplexity", "Score", "Share", "score_of"]

LEAST_NATS = 1e-3
"""A difference of mean log-probability that never counts, however significant: a thousandth of the perplexity."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The outcome of one item: right or wrong by each measure, the answer, and log-probabilities of tokens with their
    bytes and words."""

    kind: str = ""
    right: dict[str, bool] = field(default_factory=dict)
    answer: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    num_bytes: int = 0
    num_words: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """The share of items that are right, its binomial standard error, and how many one rank has wrong (right) that are
    right (wrong) here, with McNemar's p-value of that."""

    share: float
    error: float
    gained: int = 0
    lost: int = 0
    p_value: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity:
    """Of held-out text: per token (``exp`` of the mean negative log-probability, ``error`` its standard error), per
    word, and bits per byte. ``more_nats``: mean log-probability lost against one rank, token by token; None for itself.
    """

    num_tokens: int
    perplexity: float
    error: float
    word_perplexity: float
    bits_per_byte: float
    more_nats: Mean | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One task, batched or one at a time. ``shares`` by measure, ``kinds`` by kind of item, of the first measure.

    ``same``: the share of items with the answer that one rank gave; None for itself. ``failure``: one line on changes
    beyond chance, empty if there are none.
    """

    task: str
    alone: bool
    num_items: int
    shares: dict[str, Share]
    kinds: dict[str, Share]
    perplexity: Perplexity | None
    same: float | None
    failure: str


def score_of(task: str, outcomes: Sequence[Outcome], one_rank: Sequence[Outcome] | None, *, alone: bool) -> Score:
    """The score of ``outcomes``, against those of one rank over the same items (None: they are its own)."""
    base = outcomes if one_rank is None else one_rank
    pairs = list(zip(outcomes, base, strict=True))
    measures = list(outcomes[0].right)
    shares = {name: _share([(ours.right[name], its.right[name]) for ours, its in pairs]) for name in measures}
    kinds = {}
    for kind in sorted({outcome.kind for outcome in outcomes} - {""}):
        of_kind = [(ours.right[measures[0]], its.right[measures[0]]) for ours, its in pairs if ours.kind == kind]
        kinds[kind] = _share(of_kind)
    perplexity = _perplexity(outcomes, one_rank) if outcomes[0].logprobs else None
    same = None if one_rank is None else sum(ours.answer == its.answer for ours, its in pairs) / len(pairs)
    return Score(
        task=task,
        alone=alone,
        num_items=len(outcomes),
        shares=shares,
        kinds=kinds,
        perplexity=perplexity,
        same=same if measures else None,
        failure=_failure(shares, perplexity),
    )


def _share(pairs: Sequence[tuple[bool, bool]]) -> Share:
    share = sum(ours for ours, _ in pairs) / len(pairs)
    gained = sum(ours and not its for ours, its in pairs)
    lost = sum(its and not ours for ours, its in pairs)
    error = binomial_error(share, len(pairs))
    return Share(share=share, error=error, gained=gained, lost=lost, p_value=paired_p_value(gained, lost))


def _perplexity(outcomes: Sequence[Outcome], one_rank: Sequence[Outcome] | None) -> Perplexity:
    nats = [-logprob for outcome in outcomes for logprob in outcome.logprobs]
    item = [i for i, outcome in enumerate(outcomes) for _ in outcome.logprobs]
    mean = clustered_mean(nats, item)
    more = None
    if one_rank is not None:
        its = [-logprob for outcome in one_rank for logprob in outcome.logprobs]
        more = clustered_mean([ours - other for ours, other in zip(nats, its, strict=True)], item)
    total = math.fsum(nats)
    return Perplexity(
        num_tokens=len(nats),
        perplexity=_exp(mean.value),
        error=_exp(mean.value) * mean.error,
        word_perplexity=_exp(total / max(1, sum(outcome.num_words for outcome in outcomes))),
        bits_per_byte=total / math.log(2) / max(1, sum(outcome.num_bytes for outcome in outcomes)),
        more_nats=more,
    )


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


def _failure(shares: dict[str, Share], perplexity: Perplexity | None) -> str:
    for name, share in shares.items():
        if share.p_value < significance():
            return (
                f"{name}: {share.lost} items that one rank has right are wrong here, {share.gained} the other way "
                f"(chance: p = {share.p_value:.1e}, McNemar)"
            )
    if perplexity is None or perplexity.more_nats is None:
        return ""
    more = perplexity.more_nats
    if math.isnan(more.value):
        return "log-probabilities are not numbers"
    if math.isfinite(more.error) and abs(more.value) > LEAST_NATS + SIGMAS * more.error:
        return (
            f"tokens are {abs(more.value):.2e} nats {'less' if more.value > 0 else 'more'} likely than on one rank, "
            f"with a standard error of {more.error:.1e}"
        )
    return ""
