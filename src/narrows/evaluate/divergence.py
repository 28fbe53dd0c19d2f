"""How far an engine's distributions are from one rank's, row by row: KL divergence, greedy agreement, and a verdict.

The one rank's logits are kept (float32, a bounded number of rows), the judged engine's only for the batch at hand. The
one rank runs op by op; the judged engine runs as a server does, and where that is a replay of a captured step, its bits
must be those of op by op (`served.py`).

What a right layout may differ by comes from the arithmetic, not from experience with layouts:

- Judged in float32, sums in another order move logits by less than ``TOLERANCE`` (of `verify`) times their spread s,
  which is a KL divergence of at most ``(TOLERANCE s)^2 / 2``. A row beyond that is wrong, or behind a choice of experts
  that fell the other way in the last bit; that is rare, and a wrong rank touches at least its share of the rows. So the
  verdict falls where more rows, of all or of decode steps, are beyond than half a rank's share.
- In another dtype one rank itself rounds, and float32 says how much: it is ``KL(float32 || one rank)``. A layout
  rounds at other points and once more for each addend of a sum, so its ``KL(float32 || layout)`` has the same size. The
  verdict falls where the geometric mean of their ratio, over all rows, those of decode steps, or those that one rank
  holds where rows are scattered, is above NOISE_RATIO by more than SIGMAS standard errors (rows of one text count as
  dependent).
- The greedy token may change where the two best logits are closer than SIGMAS times the noise of their difference. Rows
  that change above that are counted, and allowed as often as twice between one rank and float32, and SIGMAS standard
  errors of that count.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from narrows.engine.core import Engine
from narrows.evaluate.batches import ForcedStep
from narrows.evaluate.served import BothWays, ServedPath
from narrows.evaluate.statistics import SIGMAS, Mean, clustered_mean
from narrows.evaluate.verify import TOLERANCE
from narrows.layout import Mesh, RowSplit

__all__ = ["NOISE_RATIO", "Baseline", "Distance", "measure", "run_rows"]

NOISE_RATIO = 2.0
"""How many times one rank's distance from float32 a layout's may be."""

_LEAST_KL, _MOST_KL = 1e-12, 1e12
"""KL divergences below are rounding of the sum itself; a row above (infinite, say) must not undo every average."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Distance:
    """One engine against one rank over the same rows. ``kl``, ``kl_max`` in nats per row; ``agreement`` the share of
    rows with the same greedy token, ``near_ties`` the rows that are excused, ``clear_changes`` those that are not.

    ``noise``: the layout's distance from float32 relative to one rank's, as a natural logarithm; None in float32.
    ``beyond``: the share of rows above the bound of float32. ``failure``: one line, empty when all is within bounds.
    ``served``: how decode steps ran, and where a replay left other bits than op by op.
    """

    num_rows: int
    kl: float
    kl_max: float
    agreement: float
    near_ties: int
    clear_changes: int
    beyond: float | None
    noise: Mean | None
    failure: str
    served: ServedPath


@dataclass(slots=True, kw_only=True)
class Baseline:
    """One rank's logits of every step, and if its dtype is not float32, those of one rank in float32."""

    steps: list[ForcedStep]
    logits: list[Tensor]
    exact: list[Tensor] | None
    dtype: torch.dtype
    noise: float = field(init=False)
    """Root mean square of how far a logit may be off, relative to nothing: in logits."""
    allowed_changes: float = field(init=False)

    def __post_init__(self) -> None:
        if self.exact is None:
            self.noise = TOLERANCE[self.dtype] * _root_mean(logits.var(dim=-1) for logits in self.logits)
            changes = 0
        else:
            pairs = list(zip(self.logits, self.exact, strict=True))
            self.noise = _root_mean((ours - exact).var(dim=-1) for ours, exact in pairs)
            changes = sum(_changes(ours, exact, self.tie)[1] for ours, exact in pairs)
        self.allowed_changes = 2 * changes + SIGMAS * math.sqrt(2 * changes + 1)

    @property
    def tie(self) -> float:
        """Two logits that are closer than this are a tie: each is off by ``noise``, in both runs."""
        return SIGMAS * 2 * self.noise


def run_rows(engine: Engine, steps: Iterable[ForcedStep], both: BothWays | None = None) -> Iterable[Tensor]:
    """The logits [rows, vocabulary] of every step, in float32: of its groups as ``both`` runs them, or (None) as one
    group's rows, op by op.

    The engine's cache is written over: it must not be running anything else.
    """
    for step in steps:
        batch = step.merged if both is None else step.batch
        plan = engine.plans.plan_for(batch, keep_logits=True)
        results = engine.run_op_by_op(batch, plan) if both is None else both.run(batch, plan)
        logits = results[0].logits
        assert logits is not None
        yield logits.float()


def measure(engine: Engine, baseline: Baseline) -> Distance:
    """``engine`` against the one rank of ``baseline``, over its steps."""
    mesh = engine.resolved.mesh
    rows, both = _Rows(), BothWays(engine)
    num_equal = near_ties = clear = 0
    bound = TOLERANCE[baseline.dtype] ** 2 / 2
    for i, got in enumerate(run_rows(engine, baseline.steps, both)):
        step, ours = baseline.steps[i], baseline.logits[i]
        kl_T = _divergence(ours, got)
        equal, changed = _changes(got, ours, baseline.tie)
        num_equal, clear = num_equal + equal, clear + changed
        near_ties += len(kl_T) - equal - changed
        rows.kl += kl_T.tolist()
        rows.text += step.text_of_row
        rows.owner += _owners(mesh, step)
        rows.is_decode += [step.batch.phase == "decode"] * len(kl_T)
        if baseline.exact is None:
            rows.beyond += (~(kl_T <= bound * ours.double().var(dim=-1))).tolist()
        else:
            exact = baseline.exact[i]
            log_got_T, log_ours_T = (_divergence(exact, x).clamp(_LEAST_KL, _MOST_KL).log() for x in (got, ours))
            rows.log_ratio += (log_got_T - log_ours_T).tolist()
    count = len(rows.kl)
    return Distance(
        num_rows=count,
        kl=math.fsum(rows.kl) / count,
        kl_max=max(rows.kl),
        agreement=num_equal / count,
        near_ties=near_ties,
        clear_changes=clear,
        beyond=sum(rows.beyond) / count if rows.beyond else None,
        noise=rows.noise(range(count)) if rows.log_ratio else None,
        failure=_verdict(mesh, baseline, rows, clear),
        served=both.path,
    )


@dataclass(slots=True)
class _Rows:
    """The measures of every row, in the order in which they were run."""

    kl: list[float] = field(default_factory=list)
    beyond: list[bool] = field(default_factory=list)
    log_ratio: list[float] = field(default_factory=list)
    text: list[int] = field(default_factory=list)
    owner: list[int] = field(default_factory=list)
    is_decode: list[bool] = field(default_factory=list)

    def noise(self, picked: Sequence[int]) -> Mean:
        return clustered_mean([self.log_ratio[i] for i in picked], [self.text[i] for i in picked])


def _verdict(mesh: Mesh, baseline: Baseline, rows: _Rows, clear: int) -> str:
    if not_numbers := sum(math.isinf(kl) for kl in rows.kl):
        return f"{not_numbers} rows have logits that are not numbers"
    decode = [i for i, is_decode in enumerate(rows.is_decode) if is_decode]
    parts = [("all rows", range(len(rows.kl))), ("rows of decode steps", decode)]
    if rows.beyond:
        # A row that is alone in its step touches every rank of its group, or one: half a group's share then.
        alone = all(step.batch.num_rows == 1 for step in baseline.steps if step.batch.phase == "decode")
        for where, picked in parts:
            most = 1 / (2 * (mesh.num_groups if alone and picked is decode else mesh.size))
            share = sum(rows.beyond[i] for i in picked) / max(len(picked), 1)
            if share > most:
                return _too_many(where, share, most, baseline.dtype)
    if rows.log_ratio:
        for rank in range(mesh.size):
            held = [i for i, owner in enumerate(rows.owner) if owner == rank]
            parts.append((f"the rows that rank {rank} holds when they are scattered", held))
        for where, picked in parts:
            noise = rows.noise(picked)
            if noise.value - SIGMAS * noise.error > math.log(NOISE_RATIO):
                return (
                    f"{where}: the distance from float32 is x {math.exp(noise.value):.2f} that of one rank; by more "
                    f"than {SIGMAS:g} standard errors above x {NOISE_RATIO:g}, which rounding at other points explains"
                )
    if clear > baseline.allowed_changes:
        return (
            f"{clear} greedy tokens changed that were no near-tie (two best logits within {baseline.tie:.1e}); "
            f"rounding explains {baseline.allowed_changes:.0f} at most"
        )
    return ""


def _too_many(where: str, share: float, most: float, dtype: torch.dtype) -> str:
    return (
        f"{where}: {100 * share:.1f} % are further from one rank than sums in another order explain (KL above "
        f"{TOLERANCE[dtype]:g}^2 / 2 of the logits' variance); at most {100 * most:.1f} % may be, half a rank's share"
    )


def _owners(mesh: Mesh, step: ForcedStep) -> list[int]:
    """The rank that holds each row of the step where rows are scattered."""
    counts = RowSplit.from_groups(mesh, step.batch.group_rows).counts
    return [rank for rank, count in enumerate(counts) for _ in range(count)]


def _divergence(expected: Tensor, got: Tensor) -> Tensor:
    """KL(expected || got) per row in nats, [rows] float64; infinite where a logit is not a number."""
    log_p, log_q = expected.double().log_softmax(-1), got.double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).nan_to_num(nan=math.inf, posinf=math.inf).clamp_min(0.0)


def _changes(got: Tensor, expected: Tensor, tie: float) -> tuple[int, int]:
    """How many rows have the same greedy token, and how many another although the two best were further apart."""
    best = expected.topk(2, dim=-1)
    differs = got.argmax(-1) != best.indices[:, 0]
    clear = differs & (best.values[:, 0] - best.values[:, 1] > tie)
    return int((~differs).sum()), int(clear.sum())


def _root_mean(squares: Iterable[Tensor]) -> float:
    everything: Sequence[Tensor] = list(squares)
    return math.sqrt(torch.cat(list(everything)).double().mean().item()) if everything else 0.0
