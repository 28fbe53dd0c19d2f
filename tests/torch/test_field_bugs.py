"""Bugs of other engines, on tensors: each test is one line of docs/field-bugs.md.

Every test runs twice or more: as it is, and with the mistake of others put into the product (`planted`), where its own
check must fail. The other half, on plans, is tests/pure/test_field_bugs.py.

A sharded run is put beside one rank's run of the same rows. Ranks are threads, in checked mode.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from narrows.arch.weight_sharding import WeightSharding
from narrows.arch.weights import embed_weights
from narrows.comm import Communicator, Geometry, Mover
from narrows.comm.buffers import Buffers
from narrows.comm.process_groups import NcclTransport
from narrows.cost.devices import device
from narrows.engine.calls import RankWorker
from narrows.engine.config import EngineConfig, resolve
from narrows.engine.core import Engine
from narrows.engine.program import Wrap
from narrows.engine.worker import StepResult, Worker
from narrows.errors import CollectiveMismatchError, ConfigError, PlanError, RankError
from narrows.evaluate.recorder import Recorder
from narrows.layout import Mesh, MoveKind, RowSplit
from narrows.models import decoder, moe
from narrows.models.decoder import StepInputs
from narrows.models.moe import MoeLayer
from narrows.ops import experts as experts_op
from narrows.ops import paged, rope_cache
from narrows.ops.experts import experts_mlp
from narrows.ops.mlp import mlp
from narrows.ops.paged import PagedRows, build_paged_rows
from narrows.plan.plan import Plan
from narrows.plan.planner import Deployment, Planner
from narrows.ranks import ThreadRanks, run_ranks
from narrows.sched.batch import Batch, Chunk

PAGE = 4
PAGES_EACH = 8
TOLERANCE = 1e-4
"""Largest difference of a logit, relative to the root mean square of the step's logits (which are of order 1)."""
TINY = Callable[..., Path]


# -- mistakes, and how they are put in ---------------------------------------------------------------------------------


class Differs(AssertionError):  # noqa: N818
    """A sharded run's logits are not one rank's."""


class Patience:
    """How long a rank may keep the others waiting: long on a busy machine, short where a rank will not come."""

    seconds = 60.0


Fault = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Mistake:
    """``put`` puts it into the product; the test's own check then fails with ``seen``, whose text has ``words``."""

    name: str
    put: Fault
    seen: type[BaseException] | tuple[type[BaseException], ...] = Differs
    words: str | None = "differ"
    hangs: bool = False
    """A rank does not come, so that the others wait until they give it up."""


def planted(*mistakes: Mistake) -> pytest.MarkDecorator:
    """The test unchanged, and once with each mistake."""
    return pytest.mark.parametrize("mistake", [None, *mistakes], ids=lambda m: m.name if m else "as-it-is")


def planted_in_one(names: str | tuple[str, ...], cases: Sequence[Any], *mistakes: Mistake) -> pytest.MarkDecorator:
    """Every case unchanged, and each mistake in one of them, the next mistake in the next; in the others it is for
    ``make test-full``."""
    found = []
    for index, case in enumerate(cases):
        values = case if isinstance(case, tuple) else (case,)
        ids = "-".join(map(str, values))
        found.append(pytest.param(*values, None, id=f"{ids}-as-it-is"))
        for number, mistake in enumerate(mistakes):
            marks = () if number % len(cases) == index else pytest.mark.full
            found.append(pytest.param(*values, mistake, id=f"{ids}-{mistake.name}", marks=marks))
    names = (names,) if isinstance(names, str) else names
    return pytest.mark.parametrize((*names, "mistake"), found)


@contextmanager
def noticed(mistake: Mistake | None, monkeypatch: pytest.MonkeyPatch, *, here: bool = True) -> Iterator[None]:
    """The block must pass or, with a planted mistake, fail in that mistake's way.

    ``here`` False: the mistake does no harm in this case, which is why others missed it; it must pass then too.
    """
    with monkeypatch.context() as patch:
        if mistake is not None:
            mistake.put(patch)
            patch.setattr(Patience, "seconds", 1.0 if mistake.hangs else Patience.seconds)
        if mistake is None or not here:
            yield
            return
        with pytest.raises(mistake.seen, match=mistake.words):
            yield


# -- work, and runs of it ----------------------------------------------------------------------------------------------


class Work:
    """Requests of fixed tokens in groups, and steps of so many rows of each. Every row asks for its logits.

    ``steps[step][group][request]`` are the next rows of a request. Pages of all requests are different ones, so the
    rows of all groups can run as one group too.
    """

    def __init__(
        self, steps: Sequence[Sequence[Sequence[int]]], *, pages_each: int = PAGES_EACH, seed: int = 5
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        first = steps[0]
        self.pages_each, self.num_groups = pages_each, len(first)
        self.num_requests = sum(len(group) for group in first)
        done = [[0] * len(group) for group in first]
        total = [[sum(step[g][i] for step in steps) for i in range(len(group))] for g, group in enumerate(first)]
        tokens = [[torch.randint(0, 67, (n,), generator=generator).tolist() for n in group] for group in total]
        self.batches: list[Batch] = []
        for step in steps:
            groups: list[tuple[Chunk, ...]] = []
            number = 0
            for g, group in enumerate(step):
                chunks = []
                for i, rows in enumerate(group):
                    pages = range(1 + number * pages_each, 1 + (number + 1) * pages_each)
                    start, stop = done[g][i], done[g][i] + rows
                    if rows:
                        chunks.append(
                            Chunk(
                                request=number,
                                start=start,
                                tokens=tuple(tokens[g][i][start:stop]),
                                pages=tuple(pages[: -(-stop // PAGE)]),
                                num_logits=rows,
                            )
                        )
                    done[g][i] = stop
                    number += 1
                groups.append(tuple(chunks))
            self.batches.append(Batch(groups=tuple(groups)))

    def merged(self) -> list[Batch]:
        """The same rows in the same order, as one group."""
        return [Batch(groups=(tuple(c for group in batch.groups for c in group),)) for batch in self.batches]

    def alone(self, request: int) -> list[tuple[Batch, list[tuple[int, int]]]]:
        """The steps of one request alone in its group, and for each the rows, as (step, row), of the whole work."""
        out = []
        for number, batch in enumerate(self.batches):
            at, rows = 0, []
            groups: list[tuple[Chunk, ...]] = []
            for group in batch.groups:
                groups.append(tuple(chunk for chunk in group if chunk.request == request))
                for chunk in group:
                    if chunk.request == request:
                        rows += [(number, row) for row in range(at, at + len(chunk.tokens))]
                    at += len(chunk.tokens)
            if rows:
                out.append((Batch(groups=tuple(groups)), rows))
        return out


def every_kind(dp: int) -> Work:
    """Prefill, decode of all, a step of the first group only, and one single row in the last group."""
    prefill = [[5, 1, 3] if g % 2 == 0 else [2, 7] for g in range(dp)]
    decode = [[1] * len(group) for group in prefill]
    first_only = [[1, 1, 4] if g == 0 else [0] * len(group) for g, group in enumerate(prefill)]
    last_row = [[0] * (len(group) - 1) + [int(g == dp - 1)] for g, group in enumerate(prefill)]
    return Work([prefill, decode, first_only, last_row, decode])


@dataclass(kw_only=True)
class Outcome:
    """Every rank's result of every step."""

    steps: list[list[StepResult]] = field(default_factory=list)
    routing: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def logits(self, step: int) -> Tensor:
        found = self.steps[step][0].logits
        assert found is not None
        return found


def config_for(folder: Path, work: Work, dp: int, tp: int, layout: str) -> EngineConfig:
    return EngineConfig(
        model=str(folder),
        dp=dp,
        tp=tp,
        layout=layout,
        dtype="float32",
        checked=True,
        want_logits=True,
        page_size=PAGE,
        max_context=work.pages_each * PAGE,
        kv_tokens=work.num_requests * work.pages_each * PAGE,
        timeout_s=Patience.seconds,
    )


def run(
    engine_config: EngineConfig,
    batches: Sequence[Batch],
    *,
    sharding: WeightSharding | None = None,
    replay: dict[tuple[int, int], Tensor] | None = None,
    before: Callable[[list[Worker]], None] | None = None,
    after: Callable[[list[Worker]], None] | None = None,
) -> Outcome:
    """``batches`` one after the other, each under the plan of its layout.

    ``replay``: the choice of experts of another run, since a near-tie may fall either way. ``before``, ``after``: done
    to the workers of all ranks before the first step and after the last.
    """
    resolved, workers = resolve(engine_config, sharding), list[Worker]()
    recorder = Recorder(resolved.mesh.size, replay)

    def wrap(worker: Worker) -> Wrap:
        workers.append(worker)
        return recorder.wrap(worker)

    out = Outcome(routing=recorder.routing)
    with Engine(resolved, wrap=wrap) as engine, torch.inference_mode():
        if before is not None:
            before(workers)
        for number, batch in enumerate(batches):
            recorder.begin(number)
            plan = engine.plans.current.plan_for(batch)
            out.steps.append(engine.run_plan(batch, plan))
        if after is not None:
            after(workers)
    return out


def compare(where: str, got: Sequence[StepResult], want: Tensor) -> None:
    """Every rank's logits are ``want``.

    Raises:
        Differs: they are not, or are no numbers.
    """
    size = want.square().mean().sqrt().item()
    assert 0.3 < size < 3, f"{where}: logits of size {size}"
    for rank, result in enumerate(got):
        assert result.logits is not None and result.logits.shape == want.shape, f"{where}: rank {rank}"
        worst = (result.logits - want).abs().max().item()
        if not worst <= TOLERANCE * size:
            raise Differs(f"{where}: rank {rank}'s logits differ by {worst:.1e} (size {size:.1e})")


class Beside:
    """One rank's runs, kept, and sharded runs put beside them."""

    def __init__(self, tiny_model: TINY) -> None:
        self.tiny_model = tiny_model
        self._kept: dict[tuple[str, int, str], Outcome] = {}

    def one_rank(self, work: Work, kind: str = "v3") -> Outcome:
        """One rank's run of ``work``, without any mistake."""
        key = (kind, work.pages_each, repr(work.batches))
        if key not in self._kept:
            engine_config = config_for(self.tiny_model(kind), work, 1, 1, "all-reduce")
            self._kept[key] = run(engine_config, work.merged())
        return self._kept[key]

    def sharded(self, work: Work, dp: int, tp: int, layout: str, kind: str = "v3", **options: Any) -> Outcome:
        engine_config = config_for(self.tiny_model(kind), work, dp, tp, layout)
        options.setdefault("sharding", WeightSharding())  # choosing them takes longer than the run
        return run(engine_config, work.batches, replay=self.one_rank(work, kind).routing, **options)

    def check(self, work: Work, dp: int, tp: int, layout: str, kind: str = "v3", **options: Any) -> None:
        """The sharded run's logits are one rank's, on every rank, in every step."""
        one = self.one_rank(work, kind)
        many = self.sharded(work, dp, tp, layout, kind, **options)
        for number, got in enumerate(many.steps):
            rows = work.batches[number].group_rows
            compare(f"{kind}, dp {dp} x tp {tp}, {layout}, step {number} of rows {rows}", got, one.logits(number))


@pytest.fixture(scope="module")
def beside(tiny_model: TINY) -> Beside:
    made = Beside(tiny_model)
    for dp in (1, 2, 4, 8):
        made.one_rank(every_kind(dp))  # before any mistake is put in
    return made


LAYOUTS = ("all-reduce", "attn-tp-input-scattered", "norm-before-gather", "sequence-parallel", "auto")
REPLICATED = WeightSharding(shared_expert="replicated")


# -- A. which rank does the sum ---------------------------------------------------------------------------------------


Real = Callable[..., list[Tensor]]
Way = Callable[[Mover, Real, Tensor, Geometry, Sequence[Tensor]], list[Tensor]]
"""How a sum is taken: (mover, the way it should be, this rank's addend of the sum, row counts, addends that join)."""


def _sums_taken(patch: pytest.MonkeyPatch, way: Way) -> None:
    """Both moves that take sums go another way."""

    def other(name: str) -> Callable[..., list[Tensor]]:
        real = getattr(Mover, name)

        def reduced(self: Mover, xs: Sequence[Tensor], geometry: Geometry, addends: Sequence[Tensor]) -> list[Tensor]:
            (x,) = xs
            return way(self, partial(real, self), x, geometry, addends)

        return reduced

    for name in ("_all_reduce", "_reduce_scatter"):
        patch.setattr(Mover, name, other(name))


def _not_taken(mover: Mover, x: Tensor, geometry: Geometry) -> list[Tensor]:
    """The move's result without its sum: the right rows, this rank's addend."""
    whole = mover.move.kind is MoveKind.ALL_REDUCE
    return [(x if whole else x[geometry.start : geometry.stop]).clone()]


def _twice(patch: pytest.MonkeyPatch) -> None:
    _sums_taken(
        patch,
        lambda mover, real, x, geometry, addends: real(
            [mover._comm.all_reduce(x, mover.ranks, geometry.pieces, mover.label)], geometry, addends
        ),
    )


def _never(patch: pytest.MonkeyPatch) -> None:
    _sums_taken(patch, lambda mover, real, x, geometry, addends: _not_taken(mover, x, geometry))


def _experts_reduce_too(patch: pytest.MonkeyPatch) -> None:
    def scaled(mover: Mover, real: Real, x: Tensor, geometry: Geometry, addends: Sequence[Tensor]) -> list[Tensor]:
        times = len(mover.ranks) if "layer 2 input_norm" in mover.label else 1
        return real([x * times], geometry, addends)

    _sums_taken(patch, scaled)


@planted_in_one(
    "layout",
    LAYOUTS,
    Mistake("every-sum-twice", _twice),
    Mistake("no-sum-at-all", _never),
    Mistake("one-experts-output-times-the-ranks", _experts_reduce_too),
)
def test_a_sum_is_taken_once(
    beside: Beside, layout: str, mistake: Mistake | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sglang #23431 (accuracy 0.951 -> 0.005), #24785 (0.975 -> 0.564), #37187 (MoE output scaled by 4)."""
    with noticed(mistake, monkeypatch):
        beside.check(every_kind(2), 2, 2, layout)


def _lost_from_the_fourth_step(patch: pytest.MonkeyPatch) -> None:
    real_step = Worker.step

    def step(self: Worker, batch: Batch, plan: Plan, keep_logits: bool = False) -> StepResult:
        self.num_steps = getattr(self, "num_steps", 0) + 1  # type: ignore[attr-defined]
        self.comm.lost = self.num_steps > 3  # type: ignore[attr-defined]
        return real_step(self, batch, plan, keep_logits)

    def lost(mover: Mover, real: Real, x: Tensor, geometry: Geometry, addends: Sequence[Tensor]) -> list[Tensor]:
        if getattr(mover._comm, "lost", False) and "layer 1 post_attn_norm" in mover.label:
            return _not_taken(mover, x, geometry)
        return real([x], geometry, addends)

    patch.setattr(Worker, "step", step)
    _sums_taken(patch, lost)


@planted_in_one(
    "layout",
    ["all-reduce", "sequence-parallel"],
    Mistake("a-sum-is-lost-from-the-fourth-step", _lost_from_the_fourth_step, words=r"step 3 of .* differ"),
)
def test_later_tokens_are_as_right_as_the_first(
    beside: Beside, layout: str, mistake: Mistake | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sglang #23729: the first 2 of 100 tokens right. The steps before the fourth are right with the mistake too."""
    decode = [[[1, 1], [1]]]
    work = Work([[[3, 2], [4]], *decode * 9])
    beside.one_rank(work)
    first = Work([[[3, 2], [4]], *decode * 2])
    beside.one_rank(first)
    with noticed(mistake, monkeypatch, here=False):
        beside.check(first, 2, 2, layout)
    with noticed(mistake, monkeypatch):
        beside.check(work, 2, 2, layout)


def _gather_by_sum(patch: pytest.MonkeyPatch) -> None:
    real = Mover._all_gather

    def gather(self: Mover, xs: Sequence[Tensor], geometry: Geometry, addends: Sequence[Tensor]) -> list[Tensor]:
        (x, *others), mesh = xs, self.move.mesh
        if others or self.move.first != 0:
            return real(self, xs, geometry, addends)
        total = sum(geometry.pieces)
        mine = x.new_zeros((total, x.shape[1]))
        mine[geometry.start : geometry.stop] = x  # on every rank of the group, not only on its first
        whole = tuple(range(mesh.size))
        return [self._comm.all_reduce(mine, whole, (total, *(0,) * (mesh.size - 1)), self.label)]

    patch.setattr(Mover, "_all_gather", gather)


@planted(Mistake("gathered-as-a-sum-over-equal-rows", _gather_by_sum))
@pytest.mark.parametrize("dp", [1, 2, 4, 8])
def test_equal_rows_of_a_group_are_not_summed(
    beside: Beside, dp: int, mistake: Mistake | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sglang #31699, #32609: DP1 and DP8 right, DP2 and DP4 corrupt. The mistake shows exactly so here."""
    work = every_kind(dp)
    with noticed(mistake, monkeypatch, here=dp in (2, 4)):
        beside.check(work, dp, 8 // dp, "norm-before-gather" if dp > 1 else "all-reduce")


def _shared_on_every_rank(patch: pytest.MonkeyPatch) -> None:
    real = MoeLayer.experts

    def experts(self: MoeLayer, step: StepInputs, hidden: Tensor, *topk: Tensor, out: Tensor | None = None) -> Tensor:
        routed = real(self, step, hidden, *topk, out=out)
        routed += self.shared_expert(step, hidden)
        return routed

    patch.setattr(MoeLayer, "experts", experts)


def _joined_by_every_rank(patch: pytest.MonkeyPatch) -> None:
    _sums_taken(
        patch,
        lambda mover, real, x, geometry, addends: real([x], geometry, [a * len(mover.ranks) for a in addends]),
    )


@planted(
    Mistake("added-to-every-rank-s-partial", _shared_on_every_rank),
    Mistake("joined-by-every-rank", _joined_by_every_rank),
)
@pytest.mark.parametrize(("dp", "tp"), [(1, 4), (2, 2), (4, 1)])
@pytest.mark.parametrize("kind", ["v3", "v2"])
def test_a_replicated_shared_expert_is_counted_once(
    beside: Beside, dp: int, tp: int, kind: str, mistake: Mistake | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sglang #31475: R + ep * S. Here it is a field of its own: it joins the sum as a slice (these steps of several
    rows), or is added once the sum is taken (those of one)."""
    work = every_kind(dp)
    beside.one_rank(work, kind)
    with noticed(mistake, monkeypatch):
        beside.check(work, dp, tp, "auto", kind, sharding=REPLICATED)


def _complete_embeddings(patch: pytest.MonkeyPatch) -> None:
    def complete(config: Any, mesh: Mesh, sharding: WeightSharding) -> Any:
        return embed_weights(config, mesh, replace(sharding, embed="replicated"))

    patch.setattr(decoder, "embed_weights", complete)


@planted_in_one("layout", LAYOUTS, Mistake("complete-embeddings-handed-in", _complete_embeddings))
def test_embeddings_are_reduced_only_if_they_owe_a_sum(
    beside: Beside, layout: str, mistake: Mistake | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sglang #21215: embeddings handed in complete, then reduce-scattered: garbage. The sharding tells them apart."""
    work = every_kind(2)
    if layout == "auto":
        with noticed(mistake, monkeypatch, here=False):  # complete by its sharding: the plan takes no sum
            beside.check(work, 2, 2, layout, sharding=WeightSharding(embed="replicated"))
    with noticed(mistake, monkeypatch):
        beside.check(work, 2, 2, layout, sharding=WeightSharding())


def _scattered_by_its_shape(patch: pytest.MonkeyPatch) -> None:
    real = Mover._reduce_scatter

    def guess(self: Mover, xs: Sequence[Tensor], geometry: Geometry, addends: Sequence[Tensor]) -> list[Tensor]:
        (x,) = xs
        if x.shape[0] == max(geometry.pieces) and not addends:  # as many rows as a scattered one has (padded)
            return [x[: geometry.stop - geometry.start]]
        return real(self, xs, geometry, addends)

    patch.setattr(Mover, "_reduce_scatter", guess)


SCATTERED_BY_SHAPE = Mistake("scattered-if-its-rows-look-so", _scattered_by_its_shape)


@planted(SCATTERED_BY_SHAPE)
@pytest.mark.parametrize("layout", ["attn-tp-input-scattered", "sequence-parallel"])
@pytest.mark.parametrize(("rows", "harm"), [(1, True), (2, False), (3, False), (8, False)])
def test_one_row_on_two_ranks_is_not_ambiguous(
    beside: Beside, layout: str, rows: int, harm: bool, mistake: Mistake | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vllm #50681, #50685: a layout guessed from the shape is wrong for one row at TP2, and only there."""
    work = Work([[[rows]], [[rows]], [[rows]]])
    beside.one_rank(work)
    with noticed(mistake, monkeypatch, here=harm):
        beside.check(work, 1, 2, layout)


def _zero_to_local(patch: pytest.MonkeyPatch) -> None:
    def sliced(self: Mover, xs: Sequence[Tensor], geometry: Geometry, addends: Sequence[Tensor]) -> list[Tensor]:
        return [x[: geometry.stop - geometry.start] for x in xs]

    patch.setattr(Mover, "_slice", sliced)


@planted_in_one(
    ("dp", "tp", "layout"),
    [
        (1, 4, "attn-tp-input-scattered"),
        (2, 2, "attn-tp-input-scattered"),
        (2, 2, "norm-before-gather"),
        (2, 2, "all-reduce"),
        (4, 1, "all-reduce"),
    ],
    Mistake("zero-to-local-on-every-rank", _zero_to_local),
)
def test_each_rank_s_slice_of_the_residual_is_its_own(
    beside: Beside, dp: int, tp: int, layout: str, mistake: Mistake | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vllm #33322: the residual's slice taken as [0:local] on every rank."""
    with noticed(mistake, monkeypatch):
        beside.check(every_kind(dp), dp, tp, layout)


def _norm_before_the_sum_over_tp(patch: pytest.MonkeyPatch) -> None:
    def normed(mover: Mover, real: Real, x: Tensor, geometry: Geometry, addends: Sequence[Tensor]) -> list[Tensor]:
        if "post_attn_norm" in mover.label:
            return _not_taken(mover, x, geometry)
        return real([x], geometry, addends)

    _sums_taken(patch, normed)


@planted(Mistake("normed-while-tp-owes-the-sum", _norm_before_the_sum_over_tp))
@pytest.mark.parametrize(("dp", "tp"), [(4, 1), (2, 2), (4, 2), (2, 4)])
def test_norm_before_gather_is_right_with_tp_above_1(
    beside: Beside, dp: int, tp: int, mistake: Mistake | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sglang #8631's own limit: at DP = TP (here tp 1) nothing is owed; with more ranks per group it diverges."""
    with noticed(mistake, monkeypatch, here=tp > 1):
        beside.check(every_kind(dp), dp, tp, "norm-before-gather")


def _results_in_send_buffers(patch: pytest.MonkeyPatch) -> None:
    real = Communicator.all_reduce

    def all_reduce(self: Communicator, x: Tensor, ranks: tuple[int, ...], *args: Any, **options: Any) -> Tensor:
        return x.copy_(real(self, x, ranks, *args, **options))  # x lies in a send buffer that the next stage gets too

    patch.setattr(Communicator, "all_reduce", all_reduce)


@planted(Mistake("results-live-in-send-buffers", _results_in_send_buffers))
@pytest.mark.parametrize(("dp", "tp"), [(1, 4), (2, 2)])
def test_no_output_lives_in_a_buffer_that_is_used_again(
    beside: Beside, dp: int, tp: int, mistake: Mistake | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sglang #8785: the norm's output no longer lived apart from the gather buffer."""
    with noticed(mistake, monkeypatch):
        beside.check(every_kind(dp), dp, tp, "all-reduce")


# -- B. ranks disagree -------------------------------------------------------------------------------------------------


def _idle(worker: Worker, batch: Batch) -> bool:
    return not batch.groups[worker.rank_context.mesh.group_of(worker.rank_context.rank)]


def _idle_ranks_return(patch: pytest.MonkeyPatch) -> None:
    real = Worker.step

    def step(self: Worker, batch: Batch, plan: Plan, keep_logits: bool = False) -> StepResult:
        if _idle(self, batch):
            return StepResult(ids=())
        return real(self, batch, plan, keep_logits)

    patch.setattr(Worker, "step", step)


def _idle_ranks_take_another_plan(patch: pytest.MonkeyPatch) -> None:
    real = Worker.step

    def step(self: Worker, batch: Batch, plan: Plan, keep_logits: bool = False) -> StepResult:
        if _idle(self, batch):
            deployment = Deployment(
                config=self.model.config, mesh=plan.mesh, device=device("cpu-core"), dtype="fp32", want_logits=True
            )
            plan = Planner(deployment, self.rank_context.sharding).plan(plan.shape, "norm-before-gather")
        return real(self, batch, plan, keep_logits)

    patch.setattr(Worker, "step", step)


@planted(
    Mistake(
        "idle-ranks-return-at-once",
        _idle_ranks_return,
        RankError,
        r"ranks 2, 3 did not come within 1 s; rank 0 waits at #\d+",
        hangs=True,
    ),
    Mistake(
        "idle-ranks-take-another-plan",
        _idle_ranks_take_another_plan,
        CollectiveMismatchError,
        r'ranks 0, 1 came to #\d+ reduce_scatter "layer 0 .*ranks 2, 3 to #\d+ all_reduce "layer 0 ',
    ),
)
@pytest.mark.parametrize("layout", ["sequence-parallel", "attn-tp-input-scattered"])
def test_an_idle_group_takes_part_in_every_collective(
    beside: Beside, layout: str, mistake: Mistake | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sglang #37561, #34582, #36802: one rank idle and one not take different collectives, and hang."""
    with noticed(mistake, monkeypatch):
        beside.check(every_kind(2), 2, 2, layout)


def _skips_without_rows(patch: pytest.MonkeyPatch) -> None:
    real = Mover.__call__

    def call(self: Mover, xs: Sequence[Tensor], geometry: Geometry, addends: Sequence[Tensor] = ()) -> list[Tensor]:
        if geometry.start != geometry.stop:
            return real(self, xs, geometry, addends)
        to_all = self.move.kind in (MoveKind.ALL_GATHER, MoveKind.ALL_REDUCE)
        return [x.new_zeros((sum(geometry.pieces) if to_all else 0, x.shape[1])) for x in xs]

    patch.setattr(Mover, "__call__", call)


@planted_in_one(
    "layout",
    LAYOUTS,
    Mistake(
        "ranks-without-rows-skip-moves",
        _skips_without_rows,
        CollectiveMismatchError,
        r'ranks 0, 1 came to #\d+ .*layer 0 .*hidden.*, ranks 2, 3 to #\d+ column_gather "sample',
    ),
)
def test_a_rank_that_skips_for_lack_of_rows_is_named(
    beside: Beside, layout: str, mistake: Mistake | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sglang #37561, #34582, #36802: a rank short-circuits on zero rows. Named, with the collective, within seconds."""
    with noticed(mistake, monkeypatch):
        beside.check(every_kind(2), 2, 2, layout)


def _accepts_work_when_dead(patch: pytest.MonkeyPatch) -> None:
    real = ThreadRanks.submit

    def submit(self: ThreadRanks[Worker], method: Callable[..., Any], *args: Any) -> Future[list[Any]]:
        dead: Future[list[Any]] = Future()
        return dead if self._crew.shared.failure else real(self, method, *args)

    patch.setattr(ThreadRanks, "submit", submit)


@planted(Mistake("dead-ranks-accept-work", _accepts_work_when_dead, TimeoutError, None))
@pytest.mark.parametrize("fault", [_skips_without_rows, _idle_ranks_return])
def test_failed_ranks_report_it_at_once(
    beside: Beside, fault: Fault, mistake: Mistake | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sglang #29144, #36943: /health stays green during the deadlock.

    All steps are handed out before the first is done, as the engine does: the rank that skips one is in the next, and
    is distinguished from those that wait.
    """
    work = every_kind(2)
    engine_config = config_for(beside.tiny_model("v3"), work, 2, 2, "sequence-parallel")
    with noticed(mistake, monkeypatch), monkeypatch.context() as patch:
        fault(patch)
        with Engine(resolve(engine_config)) as engine:
            plans = [engine.plans.current.plan_for(b) for b in work.batches]
            steps = [
                engine.ranks.submit(RankWorker.step, *step, True) for step in zip(work.batches, plans, strict=True)
            ]
            with pytest.raises(CollectiveMismatchError, match=r"ranks 0, 1 .* ranks 2, 3 ") as first:
                steps[2].result()
            for later in (steps[3], steps[4], engine.ranks.submit(RankWorker.step, work.batches[0], plans[0], True)):
                with pytest.raises(CollectiveMismatchError) as told:
                    later.result(timeout=1)
                assert told.value is first.value


# -- C. odd counts and padding -----------------------------------------------------------------------------------------


def _offsets_as_if_even(patch: pytest.MonkeyPatch) -> None:
    real = Mover.geometry

    def geometry(self: Mover, split: RowSplit) -> Geometry:
        pieces, start, stop = real(self, split)
        if len(pieces) == len(self.ranks):
            even = self._me * (sum(pieces) // len(pieces))
            return Geometry(pieces, even, even + stop - start)
        return Geometry(pieces, start, stop)

    patch.setattr(Mover, "geometry", geometry)


def _pieces_as(change: Callable[[tuple[int, ...]], tuple[int, ...]]) -> Fault:
    def put(patch: pytest.MonkeyPatch) -> None:
        real = Mover.geometry

        def geometry(self: Mover, split: RowSplit) -> Geometry:
            pieces, start, stop = real(self, split)
            return (
                Geometry(change(pieces), start, stop)
                if len(pieces) == len(self.ranks)
                else Geometry(pieces, start, stop)
            )

        patch.setattr(Mover, "geometry", geometry)

    return put


OFFSETS = Mistake("offsets-as-if-even", _offsets_as_if_even)
ROUNDED = [
    Mistake(
        name, _pieces_as(change), CollectiveMismatchError, r"rank \d came to #0 .*where the counts \(.*\) say \d+ rows"
    )
    for name, change in (
        ("rounded-down", lambda pieces: (sum(pieces) // len(pieces),) * len(pieces)),
        ("rounded-up", lambda pieces: (-(-sum(pieces) // len(pieces)),) * len(pieces)),
    )
]
IDLE_GETS_A_ROW = Mistake(
    "an-idle-rank-gets-a-row",
    _pieces_as(lambda pieces: tuple(max(n, 1) for n in pieces)),
    CollectiveMismatchError,
    r"where the counts \(.*\) say \d+ rows",
)


@planted(OFFSETS, *ROUNDED)
@pytest.mark.parametrize("layout", ["all-reduce", "attn-tp-input-scattered", "sequence-parallel"])
def test_1023_rows_at_tp_8(
    beside: Beside, layout: str, mistake: Mistake | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The review question of sglang #10568; sglang #19918, vllm-ascend #7801. No rank is given a row more."""
    work = Work([[[1023]], [[1]]], pages_each=256)
    beside.one_rank(work)
    slices = layout == "attn-tp-input-scattered"
    with noticed(mistake, monkeypatch, here=slices or mistake is not OFFSETS):
        beside.check(work, 1, 8, layout)


@planted(OFFSETS, *ROUNDED)
@pytest.mark.parametrize("rows", [1, 3, 5])
def test_fewer_rows_than_ranks(
    beside: Beside, rows: int, mistake: Mistake | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sglang #19918, vllm-ascend #7801: rows < ranks, ranks without any."""
    work = Work([[[rows]], [[rows]]])
    beside.one_rank(work)
    with noticed(mistake, monkeypatch, here=rows > 1 or mistake is not OFFSETS):
        beside.check(work, 1, 8, "attn-tp-input-scattered")


@planted_in_one("layout", LAYOUTS, IDLE_GETS_A_ROW)
def test_a_group_without_rows(
    beside: Beside, layout: str, mistake: Mistake | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sglang #19918: one group with zero rows, in prefill and decode, either group, one row in the other."""
    work = Work([[[5], [0]], [[0], [5]], [[1], [0]], [[0], [1]]])
    beside.one_rank(work)
    with noticed(mistake, monkeypatch):
        beside.check(work, 2, 2, layout)


def generated(folder: Path, dp: int, tp: int, layout: str, num_requests: int, at_once: int) -> list[list[int]]:
    """The tokens of so many requests, of which each group has pages for ``at_once`` at a time."""
    work = Work([[[1]]])
    engine_config = replace(
        config_for(folder, work, dp, tp, layout), kv_tokens=at_once * 2 * PAGE, max_context=32, want_logits=False
    )
    generator = torch.Generator().manual_seed(11)
    with Engine(resolve(engine_config)) as engine:
        requests = [
            engine.add(tuple(torch.randint(0, 67, (2 + i % 3,), generator=generator).tolist()), 4)
            for i in range(num_requests)
        ]
        most = 0
        for _ in engine.run():
            most = max(most, *(len(group) for group in engine.scheduler.running))
        assert most == min(at_once, -(-num_requests // dp))
    return [request.output for request in requests]


@planted(*ROUNDED)
@pytest.mark.parametrize(("dp", "tp", "num_requests", "at_once"), [(1, 4, 7, 3), (1, 4, 6, 5), (2, 2, 5, 3)])
def test_running_requests_need_not_be_a_multiple_of_tp(
    tiny_model: TINY,
    dp: int,
    tp: int,
    num_requests: int,
    at_once: int,
    mistake: Mistake | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """sglang #19918, vllm-ascend #7801: max running requests not a multiple of TP; the same text as on one rank."""
    folder = tiny_model("v3")
    want = generated(folder, 1, 1, "all-reduce", num_requests, at_once)
    with noticed(mistake, monkeypatch):
        assert generated(folder, dp, tp, "sequence-parallel", num_requests, at_once) == want


@contextmanager
def unwritten_memory(*, is_nan: bool) -> Iterator[None]:
    """``torch.empty`` and related functions return NaN, or the old content of memory. Both with the same kernels."""
    old = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = is_nan
        if is_nan:  # without it memory keeps its old content, which may be the NaN of the test before
            assert torch.empty(1000).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(old[0])
        torch.utils.deterministic.fill_uninitialized_memory = old[1]


def caches(worker: Worker) -> list[Tensor]:
    names = ("cache_SC", "k_cache_SKD", "v_cache_SKD")
    return [getattr(layer, name) for layer in worker.model.layers for name in names if hasattr(layer, name)]


def spoil(workers: list[Worker]) -> None:
    """NaN in every unwritten slot, except the null page, whose content is finite by definition."""
    for worker in workers:
        for cache in caches(worker):
            cache[PAGE:] = float("nan")


def _nan_in_send_buffers(patch: pytest.MonkeyPatch) -> None:
    real = Buffers.lend

    def lend(self: Buffers, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        return real(self, rows, width, dtype).fill_(float("nan"))

    patch.setattr(Buffers, "lend", lend)


def _foreign_ids_left_unwritten(patch: pytest.MonkeyPatch) -> None:
    def embedding(ids_T: Tensor, weight_VH: Tensor, first_id: int, *, out: Tensor | None = None) -> Tensor:
        y_TH = weight_VH.new_empty((ids_T.shape[0], weight_VH.shape[1])) if out is None else out
        here_T = (ids_T >= first_id) & (ids_T < first_id + weight_VH.shape[0])
        y_TH[here_T] = weight_VH[ids_T[here_T] - first_id]
        return y_TH

    patch.setattr(decoder, "embedding", embedding)


def _slots_behind_the_context(patch: pytest.MonkeyPatch) -> None:
    real = paged._decode_slots

    def slots(pages_B: list[Sequence[int]], lens_B: list[int], page_size: int) -> Tensor:
        return real(pages_B, [max(lens_B, default=0)] * len(lens_B), page_size)

    patch.setattr(paged, "_decode_slots", slots)


def _no_expert_no_write(patch: pytest.MonkeyPatch) -> None:
    def mlp(x_TH: Tensor, ids_TK: Tensor, *args: Tensor, first_expert: int, **options: Any) -> Tensor:
        out, num = options.get("out"), args[1].shape[0]
        if not ((ids_TK >= first_expert) & (ids_TK < first_expert + num)).any():
            return torch.empty_like(x_TH) if out is None else out
        return experts_mlp(x_TH, ids_TK, *args, first_expert=first_expert, **options)

    patch.setattr(moe, "experts_mlp", mlp)


FOREIGN_IDS = Mistake("foreign-ids-left-unwritten", _foreign_ids_left_unwritten, words="unwritten")
BEHIND = Mistake("slots-behind-the-context-are-read", _slots_behind_the_context, words="unwritten")
NO_EXPERT = Mistake("without-an-expert-nothing-is-written", _no_expert_no_write, words="unwritten")


@pytest.mark.parametrize(
    ("layout", "whole", "mistake"),
    [
        *((layout, False, None) for layout in LAYOUTS),
        ("sequence-parallel", False, FOREIGN_IDS),
        ("norm-before-gather", False, BEHIND),
        *(
            pytest.param(layout, False, mistake, marks=pytest.mark.full)
            for layout in LAYOUTS
            for mistake in (FOREIGN_IDS, BEHIND)
            if (layout, mistake) not in (("sequence-parallel", FOREIGN_IDS), ("norm-before-gather", BEHIND))
        ),
        *(("auto", True, mistake) for mistake in (None, NO_EXPERT)),
        *(("all-reduce, batch invariant", False, mistake) for mistake in (None, FOREIGN_IDS)),
    ],
    ids=lambda value: value.name if isinstance(value, Mistake) else str(value),
)
def test_uninitialised_memory_never_shows(
    tiny_model: TINY, layout: str, whole: bool, mistake: Mistake | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sglang #21553, #18659-#18685, #28487: padding is uninitialised, and NaN comes through the residual.

    All unwritten memory is NaN: new tensors, send buffers, slots of the cache. Bit for bit the same logits as without.
    ``whole``: whole experts per rank, so that a rank may have none to run.
    """
    name, _, invariant = layout.partition(", ")
    sharding, work = WeightSharding(experts="whole") if whole else WeightSharding(), every_kind(2)
    engine_config = replace(config_for(tiny_model("v3"), work, 2, 2, name), batch_invariant=bool(invariant))
    with unwritten_memory(is_nan=False):
        want = run(engine_config, work.batches, sharding=sharding)
    with noticed(mistake, monkeypatch), monkeypatch.context() as patch, unwritten_memory(is_nan=True):
        _nan_in_send_buffers(patch)
        got = run(engine_config, work.batches, sharding=sharding, before=spoil)
        for number in range(len(work.batches)):
            for a, b in zip(want.steps[number], got.steps[number], strict=True):
                assert a.logits is not None and b.logits is not None
                if not torch.equal(a.logits, b.logits):
                    raise Differs(f"{layout}, step {number}: unwritten memory shows")


class EqualPieces:
    """The collectives of a backend that needs equal pieces, built on those of a communicator."""

    def __init__(self, comm: Communicator) -> None:
        self._comm, self._ranks = comm, tuple(range(comm.mesh.size))

    def wait(self) -> None:
        """Everything was done at once."""

    def _allgather_base(self, out: Tensor, x: Tensor) -> EqualPieces:
        out.copy_(self._comm.all_gather([x], self._ranks, (x.shape[0],) * len(self._ranks), "gather")[0])
        return self

    def _reduce_scatter_base(self, out: Tensor, x: Tensor) -> EqualPieces:
        out.copy_(self._comm.reduce_scatter(x, self._ranks, (out.shape[0],) * len(self._ranks), "scatter"))
        return self

    def allreduce(self, xs: list[Tensor]) -> EqualPieces:
        (x,) = xs
        x.copy_(self._comm.all_reduce(x, self._ranks, (x.shape[0], *(0,) * (len(self._ranks) - 1)), "reduce"))
        return self


def _trimmed_at_the_end(patch: pytest.MonkeyPatch) -> None:
    def gather(self: NcclTransport, x: Tensor, counts: Sequence[int]) -> Tensor:
        padded = x.new_empty((max(counts), *x.shape[1:]))
        padded[: x.shape[0]] = x
        out = x.new_empty((self.size * max(counts), *x.shape[1:]))
        self._group._allgather_base(out, padded)
        return out[: sum(counts)]

    patch.setattr(NcclTransport, "gather", gather)


@planted(Mistake("trimmed-at-the-end-only", _trimmed_at_the_end, AssertionError, "gathered"))
@pytest.mark.parametrize("counts", [(3, 0, 2), (0, 0, 1), (128, 128, 127), (0, 5, 0)])
def test_padding_of_equal_pieces_never_shows(
    counts: tuple[int, ...], mistake: Mistake | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sglang #21553, vllm-ascend #7801: where a backend needs equal pieces (NCCL), they are padded and trimmed inside
    the collective, piece by piece. NCCL's calls are made of thread ranks here; the padding is the product's own."""
    generator, start = torch.Generator().manual_seed(3), [sum(counts[:i]) for i in range(3)]
    x_RTW = torch.randn(3, sum(counts), 4, generator=generator)
    total = (x_RTW[0] + x_RTW[1]) + x_RTW[2]

    def rank(comm: Communicator) -> None:
        transport = NcclTransport.__new__(NcclTransport)
        transport.me, transport.size, transport._group = comm.rank, 3, EqualPieces(comm)
        own = slice(start[transport.me], start[transport.me] + counts[transport.me])
        x = x_RTW[transport.me]
        assert torch.equal(transport.gather(total[own], counts), total), "gathered"
        assert torch.equal(transport.reduce(x, counts, (), whole=False), total[own]), "scattered"
        assert torch.equal(transport.reduce(x, counts, (), whole=True), total), "reduced"

    with noticed(mistake, monkeypatch, here=counts != (128, 128, 127)), unwritten_memory(is_nan=True):
        run_ranks(Mesh.of(dp=1, tp=3), rank, checked=True)


def _lengths_lost(patch: pytest.MonkeyPatch) -> None:
    def build(*args: Any, **options: Any) -> PagedRows:
        rows = build_paged_rows(*args, **options)
        lens_B = rows.decode_lens_B
        return replace(rows, decode_lens_B=lens_B.clamp(min=int(lens_B.max())) if lens_B.numel() else lens_B)

    patch.setattr("narrows.engine.worker.build_paged_rows", build)


def _writes_the_null_page(patch: pytest.MonkeyPatch) -> None:
    def write_latents(
        q: Tensor, latents: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, *args: Tensor, **options: Any
    ) -> None:
        rope_cache.rope_write_latents(q, latents, cos, sin, cache, *args, **options)
        cache[0] = latents[:1].sum(0)  # a row that pads the batch

    def write_heads(qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, *args: Tensor, **options: Any) -> Tensor:
        q = rope_cache.rope_write_heads(qkv, cos, sin, keys, *args, **options)
        keys[0] = 1.0
        return q

    patch.setattr("narrows.models.deepseek.rope_write_latents", write_latents)
    patch.setattr("narrows.models.llama.rope_write_heads", write_heads)


@planted(
    Mistake("lengths-of-contexts-lost", _lengths_lost, words="the null page shows"),
    Mistake("padding-rows-written-there", _writes_the_null_page, AssertionError, "the null page was written"),
)
@pytest.mark.parametrize("kind", ["v3", "llama"])
def test_contents_of_the_null_page_never_show(
    tiny_model: TINY, kind: str, mistake: Mistake | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sglang #21553: padding read as if it were rows. Padding of short contexts reads page 0: nothing of it shows, as
    long as it is finite, and no row is written there."""
    work = every_kind(2)
    engine_config = config_for(tiny_model(kind), work, 2, 2, "norm-before-gather")
    want = run(engine_config, work.batches)

    def fill(workers: list[Worker]) -> None:
        for worker in workers:
            for cache in caches(worker):
                cache[:PAGE] = 7.25

    def look(workers: list[Worker]) -> None:
        for worker in workers:
            assert all(bool((cache[:PAGE] == 7.25).all()) for cache in caches(worker)), "the null page was written"

    with noticed(mistake, monkeypatch):
        got = run(engine_config, work.batches, before=fill, after=look)
        for number in range(len(work.batches)):
            if not torch.equal(want.logits(number), got.logits(number)):
                raise Differs(f"step {number}: the null page shows")


def _routes_padding(patch: pytest.MonkeyPatch) -> None:
    real = MoeLayer.experts

    def experts(
        self: MoeLayer, step: StepInputs, hidden: Tensor, ids: Tensor, weights: Tensor, *, out: Tensor | None = None
    ) -> Tensor:
        rows = hidden.shape[0]
        padded = torch.cat((hidden, hidden.new_zeros((-rows % 8, hidden.shape[1]))))
        of_padding = self.route(padded[rows:])
        ids = torch.cat((ids, of_padding.topk_ids_TK.to(ids.dtype)))
        weights = torch.cat((weights, of_padding.topk_weights_TK))
        y = real(self, step, padded, ids, weights)[:rows]
        return y if out is None else out.copy_(y)

    patch.setattr(MoeLayer, "experts", experts)


@planted_in_one("layout", LAYOUTS, Mistake("padding-is-routed", _routes_padding, AssertionError, "expert pairs"))
def test_padded_rows_are_never_routed_to_experts(
    beside: Beside, layout: str, mistake: Mistake | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vllm-ascend #14567: slower, and wrong load counts, with right text. So the pairs are counted, not the logits."""
    work, seen = every_kind(2), Counter[int]()
    want = Counter[int]()
    for batch in work.batches:
        want[3 * batch.num_rows] += 2 * 4  # 2 layers with experts, on 4 ranks, 3 experts per row
    with noticed(mistake, monkeypatch):

        def counted(x_TH: Tensor, ids_TK: Tensor, *args: Tensor, **options: Any) -> Tensor:
            seen[int(((ids_TK >= 0) & (ids_TK < 16)).sum())] += 1
            return experts_mlp(x_TH, ids_TK, *args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(moe, "experts_mlp", counted)
            beside.check(work, 2, 2, layout)
        assert seen == want, f"(row, expert pairs: times seen) are {seen}, not {want}"


def _dead_rows_clamped(patch: pytest.MonkeyPatch) -> None:
    real = experts_op._local_expert

    def local(topk_ids_TK: Tensor, first_expert: int, num_experts: int) -> Tensor:
        return real(topk_ids_TK.clamp(min=0), first_expert, num_experts)

    patch.setattr(experts_op, "_local_expert", local)


@planted(Mistake("dead-rows-go-to-expert-0", _dead_rows_clamped, AssertionError, "rows multiplied"))
def test_a_dead_row_loads_no_expert(mistake: Mistake | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """vllm-ascend #14567, for the dead rows that fixed-shape buckets will have: expert -1 has no work."""
    generator = torch.Generator().manual_seed(2)
    x_TH, gate_up, down = (torch.randn(n, generator=generator) for n in ((5, 8), (4, 12, 8), (4, 8, 6)))
    ids_TK = torch.tensor([[0, 3], [-1, -1], [2, 1], [-1, -1], [1, 0]])
    weights_TK = torch.rand(5, 2, generator=generator)
    multiplied: list[int] = []

    def counted(x: Tensor, *args: Any, **options: Any) -> Tensor:
        multiplied.append(x.shape[0])
        return mlp(x, *args, **options)

    with noticed(mistake, monkeypatch), monkeypatch.context() as patch:
        patch.setattr(experts_op, "mlp", counted)
        y_TH = experts_mlp(x_TH, ids_TK, weights_TK, gate_up, down, first_expert=0)
        assert sum(multiplied) == 6, f"{sum(multiplied)} rows multiplied for 6 pairs"
        assert not y_TH[[1, 3]].any() and y_TH[[0, 2, 4]].all()


# -- D. only visible at low load ---------------------------------------------------------------------------------------


def _one_row_needs_no_sum(patch: pytest.MonkeyPatch) -> None:
    def unless_one(mover: Mover, real: Real, x: Tensor, geometry: Geometry, addends: Sequence[Tensor]) -> list[Tensor]:
        return _not_taken(mover, x, geometry) if sum(geometry.pieces) == 1 else real([x], geometry, addends)

    _sums_taken(patch, unless_one)


@planted_in_one(
    ("layout", "dp", "tp"),
    [(layout, dp, tp) for dp, tp in ((1, 4), (2, 2)) for layout in LAYOUTS if dp > 1 or layout != "norm-before-gather"],
    Mistake("one-row-needs-no-sum", _one_row_needs_no_sum),
)
def test_one_request_at_a_time_equals_a_batch(
    beside: Beside, layout: str, dp: int, tp: int, mistake: Mistake | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sglang #37768: accuracy 0.10 at one request at a time, 0.65 at 32. The batch is right with the mistake too."""
    prefill = [[3, 5], [4, 2]][:dp]
    work = Work([prefill, *[[[1, 1]] * dp] * 3])
    batched = beside.one_rank(work)
    alone, rows_of, replay = [], [], {}
    for request in range(work.num_requests):
        for batch, rows in work.alone(request):
            step, at = rows[0][0], [row for _, row in rows]
            for layer in (1, 2):
                replay[len(alone), layer] = batched.routing[step, layer][at]
            alone.append(batch)
            rows_of.append((step, at))
    with noticed(mistake, monkeypatch, here=False):
        beside.check(work, dp, tp, layout)
    with noticed(mistake, monkeypatch):
        engine_config = config_for(beside.tiny_model("v3"), work, dp, tp, layout)
        got = run(engine_config, alone, sharding=WeightSharding(), replay=replay)
        for number, (step, at) in enumerate(rows_of):
            want = batched.logits(step)[at]
            compare(
                f"dp {dp} x tp {tp}, {layout}, step {step} of request {alone[number].groups}", got.steps[number], want
            )


# -- E. silently off ---------------------------------------------------------------------------------------------------


def _nothing_is_inapplicable(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("narrows.plan.named.inapplicable", lambda name, config, mesh: "")


@planted(
    Mistake(
        "inert-without-a-word", _nothing_is_inapplicable, (pytest.fail.Exception, PlanError), "DID NOT RAISE|no way"
    )
)
@pytest.mark.parametrize(
    ("kind", "dp", "tp", "layout", "condition"),
    [
        ("v3", 1, 2, "norm-before-gather", "dp is 1"),
        ("v3", 2, 1, "attn-tp-input-scattered", "tp is 1"),
        ("v2-lite", 1, 2, "attn-tp-input-scattered", "q_lora_rank is null"),
        ("llama", 2, 2, "attn-tp-input-scattered", "no latent attention"),
    ],
)
def test_an_engine_does_not_start_in_an_inapplicable_layout(
    tiny_model: TINY,
    kind: str,
    dp: int,
    tp: int,
    layout: str,
    condition: str,
    mistake: Mistake | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SGLang's one INFO line; guides recommend the switch where it is inert. Here the engine says so and stops."""
    engine_config = EngineConfig(model=str(tiny_model(kind)), dp=dp, tp=tp, layout=layout)
    with noticed(mistake, monkeypatch), pytest.raises(ConfigError, match=f"{layout} cannot apply to .*{condition}"):
        resolve(engine_config)
