"""Sharded equals one rank: over meshes, layouts, forms, row counts and phases; and equal sums are equal bits.

Each mesh runs a fixed list of steps under every layout, and one rank runs the same rows in the same order. Every rank's
logits are compared, not one's. The one rank's choice of experts is replayed (a near-tie may fall either way); a row
whose own choice differs must have been such a tie. Caches are filled with NaN between layouts, so that a layout reads
what it wrote itself.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from narrows.arch.forms import Forms, form_choices
from narrows.arch.stages import RowSet, Stage
from narrows.cost.price import Source
from narrows.cost.stage import StepPrice, StepShape
from narrows.engine.config import EngineConfig, resolve
from narrows.engine.core import Engine
from narrows.engine.program import Wrap
from narrows.engine.recorder import Recorder
from narrows.engine.worker import StepResult, Worker
from narrows.layout import Layout, Move, deal
from narrows.plan.graph import Graph
from narrows.plan.named import AUTO, applicable_layouts, named_layout
from narrows.plan.plan import Plan, Step, StepKind
from narrows.plan.search import Search
from narrows.sched.batch import Batch, Chunk

MESHES = [(1, 1), (1, 2), (1, 3), (1, 4), (1, 8), (2, 1), (2, 2), (2, 4), (4, 2), (8, 1)]
VOCAB = 67
PAGE = 16
LONG_PAGES = 1024 // PAGE
TOLERANCE = 1e-4
"""Largest difference of a logit, relative to the root mean square of the step's logits (which are of order 1)."""


# -- steps -----------------------------------------------------------------------------------------------------------


class Steps:
    """A list of named batches for ``dp`` groups of ``tp`` ranks. The first one fills the cache for the others.

    In every group, page i holds the first tokens of request i, which decode rows and later chunks go on from; the pages
    behind are for prompts. Steps do not depend on each other: each goes on from the first one.
    """

    def __init__(self, dp: int, tp: int, *, longest: int = 1023) -> None:
        self.dp, self.tp = dp, tp
        self.num_requests = tp + 5
        self.pages_per_group = self.num_requests + LONG_PAGES
        self._random = random.Random(1000 * dp + tp)
        self.named: list[tuple[str, Batch]] = [("warm-up", self._batch([self._warm_up() for _ in range(dp)]))]
        for rows in self._patterns():
            self.named.append((f"prefill {rows}", self._batch([self._prefill(n) for n in rows])))
            if max(rows) <= self.num_requests:
                self.named.append((f"decode {rows}", self._batch([self._decode(n) for n in rows])))
            if len(rows) > 1 or rows[0] > 1:
                self.named.append((f"mixed {rows}", self._batch([self._mixed(n) for n in rows])))
        if longest:
            rows = [longest - 3 * (dp - 1), *[3] * (dp - 1)]
            self.named.append((f"prefill {rows}", self._batch([self._prefill(n) for n in rows])))

    def _patterns(self) -> list[list[int]]:
        """Rows per group: one row in all, around the group's size in every group, a group without, very different."""
        dp, tp = self.dp, self.tp
        patterns = [[1, *[0] * (dp - 1)], [tp - 1] * dp, [tp] * dp, [tp + 1] * dp]
        if dp > 1:
            patterns += [
                [*[0] * (dp - 1), 1],
                [0, *[tp + 1] * (dp - 1)],
                [tp + 2, *[0] * (dp - 1)],
                [37, *[1] * (dp - 1)],
                [*deal(dp, dp - 1), 19],
            ]
        seen: list[list[int]] = []
        for rows in patterns:
            if sum(rows) and rows not in seen:
                seen.append(rows)
        return seen

    def _batch(self, groups: Sequence[Sequence[Chunk]]) -> Batch:
        numbered = [
            tuple(replace(chunk, request=1000 * index + chunk.request) for chunk in group)
            for index, group in enumerate(groups)
        ]
        return Batch(groups=tuple(numbered))

    def _tokens(self, number: int) -> tuple[int, ...]:
        return tuple(self._random.randrange(VOCAB) for _ in range(number))

    def _length(self, request: int) -> int:
        """Tokens of a request after the first step: different lengths, a page's edge among them."""
        return (3, 1, 15, 7, 2)[request % 5]

    def _warm_up(self) -> list[Chunk]:
        return [
            Chunk(request=i, start=0, tokens=self._tokens(self._length(i)), pages=(i + 1,), num_logits=i % 2)
            for i in range(self.num_requests)
        ]

    def _long(self, number: int, rows: int, num_logits: int, at: int = 0) -> Chunk:
        first = 1 + self.num_requests + at
        pages = tuple(range(first, first + -(-rows // PAGE)))
        return Chunk(request=500 + number, start=0, tokens=self._tokens(rows), pages=pages, num_logits=num_logits)

    def _prefill(self, rows: int) -> list[Chunk]:
        """One prompt, or from 6 rows on two: one that asks for all logits and one that asks for the last."""
        if rows == 0:
            return []
        if rows < 6:
            return [self._long(0, rows, self._random.choice((rows, 1)))]
        first = rows // 3
        return [self._long(0, first, min(first, 40)), self._long(1, rows - first, 1, at=-(-first // PAGE))]

    def _decode(self, rows: int) -> list[Chunk]:
        return [
            Chunk(request=i, start=self._length(i), tokens=self._tokens(1), pages=(i + 1,), num_logits=1)
            for i in range(rows)
        ]

    def _mixed(self, rows: int) -> list[Chunk]:
        """Decode rows, then a later chunk of a prompt without logits, then a prompt; as many of these as there are."""
        if rows < 3:
            return self._decode(rows)
        decode = self._decode(min(rows // 3, 3))
        later = Chunk(request=3, start=7, tokens=self._tokens(1 + (rows > 5)), pages=(4,))
        left = rows - len(decode) - len(later.tokens)
        return [*decode, later, *([self._long(0, left, min(left, 2))] if left else [])]

    def merged(self, batch: Batch) -> Batch:
        """The same rows in the same order as one group."""
        chunks = [
            replace(chunk, pages=tuple(page + index * self.pages_per_group for page in chunk.pages))
            for index, group in enumerate(batch.groups)
            for chunk in group
        ]
        return Batch(groups=(tuple(chunks),))


# -- runs ------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """One rank's logits of every step, and its choice of experts."""

    steps: Steps
    logits: list[Tensor]
    recorder: Recorder


def engine_for(
    folder: Path, steps: Steps, recorder: Recorder, forms: Forms | None = None, *, one: bool = False, **options: object
) -> tuple[Engine, list[Worker]]:
    """An engine whose cache holds the steps' pages, and its workers."""
    workers: list[Worker] = []

    def wrap(worker: Worker) -> Wrap:
        workers.append(worker)
        return recorder.wrap(worker)

    asked = EngineConfig(
        model=str(folder),
        dp=1 if one else steps.dp,
        tp=1 if one else steps.tp,
        max_context=1024,
        kv_tokens=steps.pages_per_group * PAGE * (steps.dp if one else 1),
        page_size=PAGE,
        **{"dtype": "float32", "want_logits": True, "checked": True, **options},  # type: ignore[arg-type]
    )
    return Engine(resolve(asked, forms), wrap=wrap), workers


def run_on_one_rank(folder: Path, steps: Steps, dtype: str = "float32") -> Run:
    recorder = Recorder(1)
    engine, _ = engine_for(folder, steps, recorder, one=True, dtype=dtype)
    logits = []
    with engine:
        for number, (_, batch) in enumerate(steps.named):
            recorder.begin(number)
            (result,) = engine.submit(steps.merged(batch), keep_logits=True).result()
            assert result.logits is not None
            logits.append(result.logits)
    return Run(steps, logits, recorder)


@torch.inference_mode()
def spoil_caches(workers: Sequence[Worker]) -> None:
    """NaN in every slot but those of the null page, which padding reads."""
    for worker in workers:
        for layer in worker.model.layers:
            for name in ("cache_SC", "k_cache_SKD", "v_cache_SKD"):
                cache = getattr(layer, name, None)
                if cache is not None:
                    cache[PAGE:] = float("nan")


def compare(where: str, want: Tensor, results: Sequence[StepResult]) -> None:
    """Every rank has all logits, within tolerance, and every rank the same best tokens of its own logits."""
    size = want.square().mean().sqrt().item() if want.numel() else 1.0
    assert not want.numel() or 0.3 < size < 3, f"{where}: logits of size {size}"
    for rank, result in enumerate(results):
        assert result.logits is not None and result.logits.shape == want.shape, f"{where}: rank {rank}"
        assert result.ids == tuple(result.logits.argmax(-1).tolist()) == results[0].ids, f"{where}: rank {rank}'s ids"
        worst = (result.logits - want).abs().max().item() if want.numel() else 0.0
        assert worst <= TOLERANCE * size, f"{where}: rank {rank}'s logits differ by {worst:.1e} (their size is {size:.1e})"


def run_all(where: str, engine: Engine, workers: Sequence[Worker], plan_of: Callable[[Batch], Plan], one: Run) -> None:
    """Every step of ``one`` again, under other plans."""
    spoil_caches(workers)
    for number, (name, batch) in enumerate(one.steps.named):
        recorder_of(engine).begin(number)
        compare(f"{where}, {name}", one.logits[number], engine.run_plan(batch, plan_of(batch)))
    flips = recorder_of(engine).flips
    assert all(abs(flip.margin) < 1e-4 for flip in flips), f"{where}: experts chosen otherwise without a tie: {flips}"
    flips.clear()


_RECORDERS: dict[int, Recorder] = {}
