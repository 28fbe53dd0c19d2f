"""Bugs of other engines, as plans: each test is one line of docs/field-bugs.md.

Every test runs unchanged, and once with each mistake planted (`planted`), where its own check must fail. The other
half, on tensors, is tests/torch/test_field_bugs.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import ceil
from zlib import crc32

import pytest

from narrows.arch.chain import build_chain
from narrows.arch.config import ModelConfig, read_config
from narrows.arch.presets import preset
from narrows.arch.stages import RowSet, Stage, StageKind
from narrows.arch.weight_sharding import WeightSharding
from narrows.cost.devices import device
from narrows.cost.price import Source
from narrows.cost.pricer import OpPrice, StepShape
from narrows.errors import ConfigError, LayoutError, PlanError
from narrows.layout import (
    Layout,
    Mesh,
    Move,
    MoveKind,
    RowSplit,
    Topology,
    full,
    legal_layouts,
    moves_from,
    owed,
    scattered,
    split_evenly,
)
from narrows.plan import named, planner
from narrows.plan.graph import Graph
from narrows.plan.named import AUTO, NamedLayout, applicable_layouts, inapplicable, named_layout
from narrows.plan.plan import Op, OpKind, Plan, Segment
from narrows.plan.planner import Deployment, Planner
from narrows.plan.search import Search
from narrows.sched.batch import Batch
from narrows.sched.scheduler import Limits, Request, Scheduler

MESHES = [Mesh.of(dp=1, tp=4), Mesh.of(dp=2, tp=2), Mesh.of(dp=4, tp=1), Mesh.of(dp=2, tp=4)]
REDUCTIONS = (MoveKind.ALL_REDUCE, MoveKind.REDUCE_SCATTER)


# -- mistakes, and how they are put in ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mistake:
    """``put`` puts it into the product; the test's own check then fails with ``seen``, whose text has ``words``."""

    name: str
    put: Callable[[pytest.MonkeyPatch], None]
    seen: type[BaseException] = AssertionError
    words: str = ""


def planted(*mistakes: Mistake) -> pytest.MarkDecorator:
    """The test unchanged, and once with each mistake."""
    return pytest.mark.parametrize("mistake", [None, *mistakes], ids=lambda m: m.name if m else "as-it-is")


@contextmanager
def noticed(mistake: Mistake | None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The block must pass or, with a planted mistake, fail in that mistake's way."""
    if mistake is None:
        yield
        return
    with monkeypatch.context() as patch:
        mistake.put(patch)
        with pytest.raises(mistake.seen, match=mistake.words):
            yield


def _believe(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Plan, "_check", lambda self, where, state, name, wanted, step: None)


BELIEVES_THE_CONSUMER = Mistake("consumer-believes-what-it-expects", _believe, pytest.fail.Exception, "DID NOT RAISE")
"""The common mistake: an op takes its input to be in the layout that it expects."""


# -- plans, and plans that were tampered with --------------------------------------------------------------------------


def tiny(**changes: object) -> ModelConfig:
    """Three layers of a DeepSeek V3: one dense, two with experts and a shared expert."""
    raw = {
        "model_type": "deepseek_v3",
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "intermediate_size": 128,
        "vocab_size": 512,
        "q_lora_rank": 48,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "n_routed_experts": 16,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    }
    return read_config(raw | changes, "tiny")


def planner_of(
    mesh: Mesh, sharding: WeightSharding | None = None, config: ModelConfig | None = None, on: str = "h100"
) -> Planner:
    deployment = Deployment(config=config or tiny(), mesh=mesh, device=device(on))
    return Planner(deployment, sharding or WeightSharding())


def shape_of(mesh: Mesh, rows: int, phase: str = "prefill") -> StepShape:
    return StepShape.of(mesh, split_evenly(rows, mesh.num_groups), phase=phase, context=64)


def named_plans(mesh: Mesh, rows: int = 100) -> list[Plan]:
    """A plan under every named layout that applies, `auto` too."""
    made = planner_of(mesh)
    return [made.plan(shape_of(mesh, rows), name) for name in applicable_layouts(made.deployment.config, mesh)]


@dataclass(frozen=True)
class RandomPrices:
    """A price from a hash of what is asked for, so that any legal plan may be the cheapest."""

    seed: int

    def stage(self, stage: Stage, layout: Layout, fused: bool, row_set: RowSet) -> OpPrice:
        return self._price("stage", stage.name, layout, fused, row_set)

    def move(self, move: Move, row_bytes: int, row_set: RowSet) -> OpPrice:
        return self._price("move", move.kind, move.src, move.dst, row_bytes, row_set)

    def add(self, layout: Layout, row_bytes: int, row_set: RowSet, *, joins: bool) -> OpPrice:
        return self._price("add", layout, row_bytes, row_set, joins)

    def recode(self, layout: Layout, row_bytes: int, row_set: RowSet) -> OpPrice:
        return self._price("recode", layout, row_bytes, row_set)

    def select(self, layout: Layout, row_bytes: int) -> OpPrice:
        return self._price("select", layout, row_bytes)

    def _price(self, *what: object) -> OpPrice:
        return OpPrice(1 + crc32(repr((self.seed, *map(str, what))).encode()) % 10**6, 1, 1, Source.ROOFLINE)


def any_plans(mesh: Mesh, sharding: WeightSharding | None = None, number: int = 25) -> Iterator[Plan]:
    """Plans that no device's prices would choose, the published one's edges and all others."""
    graph = Graph(build_chain(tiny(), mesh, sharding), mesh, AUTO)
    for seed in range(number):
        segments = Search(graph, RandomPrices(seed)).solve()
        yield Plan(layout_name="any", mesh=mesh, shape=shape_of(mesh, 8), segments=segments, roles=graph.chain.roles)


Place = tuple[int, int]
"""A step of a plan: which segment, and which of its steps."""


def places(plan: Plan, wanted: Callable[[Op], bool]) -> list[tuple[Place, Op]]:
    return [((i, j), op) for i, segment in enumerate(plan.segments) for j, op in enumerate(segment.ops) if wanted(op)]


def instead(plan: Plan, place: Place, *ops: Op) -> Plan:
    """``plan`` with these steps in place of the one at ``place``."""
    i, j = place
    segments: list[Segment] = list(plan.segments)
    old = segments[i].ops
    segments[i] = replace(segments[i], ops=(*old[:j], *ops, *old[j + 1 :]))
    return replace(plan, segments=tuple(segments))


def takes_a_sum(op: Op) -> bool:
    return op.move is not None and op.move.kind in REDUCTIONS


# -- A. which rank completes the sum -----------------------------------------------------------------------------------


@planted(BELIEVES_THE_CONSUMER)
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_a_sum_taken_twice_is_refused_before_it_runs(
    mesh: Mesh, mistake: Mistake | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sglang #23431 (accuracy 0.951 -> 0.005), #24785, #37187 (MoE output scaled by 4): two consumers, one sum."""
    cases = [(plan, place, op) for plan in named_plans(mesh) for place, op in places(plan, takes_a_sum)]
    assert len(cases) > 10
    with noticed(mistake, monkeypatch):
        for plan, place, op in cases:
            twice = instead(plan, place, op, op)
            with pytest.raises(PlanError, match=rf"{op.name} before {op.boundary} reads hidden at "):
                twice.validate()


@planted(BELIEVES_THE_CONSUMER)
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_a_missing_reduction_is_refused_before_it_runs(
    mesh: Mesh, mistake: Mistake | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sglang #23431, #24785, #23729 (first 2 of 100 tokens right): producer and consumer each leave it to the other."""
    cases = [(plan, place) for plan in named_plans(mesh) for place, _ in places(plan, takes_a_sum)]
    with noticed(mistake, monkeypatch):
        for plan, place in cases:
            with pytest.raises(PlanError, match="its sum is still owed"):
                instead(plan, place).validate()


def _reduce_replicas(patch: pytest.MonkeyPatch) -> None:
    def moves(mesh: Mesh, layout: Layout, nodes: Topology | None) -> tuple[Move, ...]:
        found = moves_from(mesh, layout, nodes)
        return tuple(replace(m, kind=MoveKind.REDUCE_SCATTER) if m.kind is MoveKind.SLICE else m for m in found)

    patch.setattr("narrows.plan.graph.moves_from", moves)


@planted(Mistake("replicas-are-reduced-too", _reduce_replicas, words="sums rows that are equal"))
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_equal_rows_of_all_ranks_are_never_summed(
    mesh: Mesh, mistake: Mistake | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sglang #31699, #32609: DP1 and DP8 right, DP2 and DP4 corrupt. No legal plan reduces what owes no sum."""
    with noticed(mistake, monkeypatch):
        for plan in any_plans(mesh):
            for _, op in places(plan, takes_a_sum):
                assert op.layout.owes_sum, f"{op.move} sums rows that are equal on its ranks"


def _any_letters(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Layout, "on", classmethod(lambda cls, mesh, placements: cls(placements)))


@planted(Mistake("any-letters-are-a-layout", _any_letters, pytest.fail.Exception, "DID NOT RAISE"))
@pytest.mark.parametrize("placements", ["RS", "PS", "RP", "PR", "CP"])
def test_a_sum_over_ranks_with_different_rows_is_no_layout(
    placements: str, mistake: Mistake | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sglang #31699: the layouts in which such a sum would be legal do not exist as values."""
    with noticed(mistake, monkeypatch), pytest.raises(LayoutError, match="is not legal"):
        Layout.on(Mesh.of(dp=2, tp=2), placements)


@planted(BELIEVES_THE_CONSUMER)
@pytest.mark.parametrize("mesh", [m for m in MESHES if m.num_groups > 1], ids=str)
def test_a_reduction_of_equal_rows_is_refused(
    mesh: Mesh, mistake: Mistake | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sglang #31699, #32609, in a plan from a file or written by hand: the layout says that a sum is owed."""
    plan = planner_of(mesh).plan(shape_of(mesh, 100), "norm-before-gather")
    slices = places(plan, lambda s: s.name == "slice" and s.reads == ("hidden",))
    assert slices
    with noticed(mistake, monkeypatch):
        for place, op in slices:
            assert op.move is not None
            (reduction,) = [m for m in moves_from(mesh, owed(mesh)) if m.last == mesh.num_axes - 1]
            wrong = replace(
                op,
                name=reduction.kind.value,
                move=reduction,
                reads_at=(reduction.src,),
                writes_at=(op.move.dst,),
            )
            with pytest.raises(PlanError, match=r"reads hidden at \(P,.\), but it is at"):
                instead(plan, place, wrong).validate()


def _join_where_replicated(patch: pytest.MonkeyPatch) -> None:
    make = Graph.__init__

    def init(self: Graph, *args: object) -> None:
        make(self, *args)  # type: ignore[arg-type]
        self._scattered = self._index[full(self.mesh)]

    patch.setattr(Graph, "__init__", init)


@pytest.mark.slow
@planted(Mistake("joins-on-every-rank", _join_where_replicated, PlanError, "where it would not be added once"))
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_a_replicated_shared_expert_joins_a_sum_only_as_a_slice(
    mesh: Mesh, mistake: Mistake | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sglang #31475: a replicated shared expert in every rank's partial gave R + ep * S."""
    sharding = WeightSharding(shared_expert="replicated")
    with noticed(mistake, monkeypatch):
        joins = 0
        for plan in any_plans(mesh, sharding):
            plan.validate()
            adds = places(plan, lambda s: s.kind is OpKind.ADD and s.reads[1] == "shared")
            assert adds
            for _, op in adds:
                joins += op.joins
                assert op.reads_at[1] == (scattered(mesh) if op.joins else op.layout)
        assert joins


@planted(BELIEVES_THE_CONSUMER)
@pytest.mark.parametrize("addend", ["shared", "residual"])
def test_an_addend_that_joins_a_sum_on_every_rank_is_refused(
    addend: str, mistake: Mistake | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sglang #31475, and the residual's twin of it: the slice before the join left out."""
    mesh = Mesh.of(dp=1, tp=4)
    cases = []
    for plan in any_plans(mesh, WeightSharding(shared_expert="replicated")):
        for place, op in places(plan, lambda s: s.joins and s.reads[1] == addend):
            everywhere = replace(op, reads_at=(op.layout, full(mesh)))
            before, at = plan.segments[place[0]].ops, place[1]
            slices = [i for i in range(at) if before[i].name == "slice" and before[i].reads == (addend,)]
            if slices and not [s for s in before[slices[-1] + 1 : at] if addend in s.reads]:
                cases.append(instead(instead(plan, place, everywhere), (place[0], slices[-1])))
    assert cases
    with noticed(mistake, monkeypatch):
        for wrong in cases:
            with pytest.raises(PlanError, match="where it would not be added once"):
                wrong.validate()


def _owe_complete_embeddings(patch: pytest.MonkeyPatch) -> None:
    def build(config: ModelConfig, mesh: Mesh, sharding: WeightSharding, **options: object) -> object:
        chain = build_chain(config, mesh, sharding, **options)  # type: ignore[arg-type]
        (embed,) = chain.prologue
        return replace(
            chain,
            prologue=(replace(embed, kind=StageKind.SHARDED, accepts=full(mesh), leaves=owed(mesh)),),
        )

    patch.setattr(planner, "build_chain", build)


@planted(Mistake("embeddings-always-owe", _owe_complete_embeddings, words="reduces complete embeddings"))
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_embeddings_that_are_complete_are_not_reduced(
    mesh: Mesh, mistake: Mistake | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sglang #21215: embeddings handed in complete went into the first layer's reduce-scatter all the same."""
    with noticed(mistake, monkeypatch):
        for rows in (1, 7, 2000):
            plan = planner_of(mesh, WeightSharding(embed="replicated")).plan(shape_of(mesh, rows))
            names = [op.name for _, op in plan.ops()]
            before_layers = list(plan.ops())[: names.index("attention")]
            for _, op in before_layers:
                assert not takes_a_sum(op), f"{op.move} reduces complete embeddings"


@planted(BELIEVES_THE_CONSUMER)
def test_a_plan_that_reduces_complete_embeddings_is_refused(
    mistake: Mistake | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sglang #21215, in a plan that came from elsewhere."""
    mesh = Mesh.of(dp=1, tp=4)
    complete = planner_of(mesh, WeightSharding(embed="replicated")).plan(shape_of(mesh, 100)).segments[0]
    plan = planner_of(mesh).plan(shape_of(mesh, 100), "sequence-parallel")
    (embed,) = [op for op in complete.ops if op.name == "embed"]
    (place, _), *_ = places(plan, lambda s: s.name == "embed")
    assert embed.leaves.is_whole
    with noticed(mistake, monkeypatch), pytest.raises(PlanError, match=r"layer 0 reduce_scatter .* but it is at"):
        instead(plan, place, embed).validate()


def _guess_from_rows(patch: pytest.MonkeyPatch) -> None:
    real = RowSplit.span

    def span(self: RowSplit, layout: Layout, rank: int) -> tuple[int, int]:
        start, stop = real(self, layout, rank)
        return (0, self.total) if ceil(self.total / self.mesh.group_size) == self.total else (start, stop)

    patch.setattr(RowSplit, "span", span)


@planted(Mistake("as-many-rows-as-all-is-all", _guess_from_rows, words="row 0 is held by 2 ranks"))
def test_the_layout_of_one_row_on_two_ranks_is_not_its_shape(
    mistake: Mistake | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vllm #50681, #50685: [1, H] on rank 0 of TP2 may be all rows, its own row or an addend. The layout says which."""
    mesh = Mesh.of(dp=1, tp=2)
    split = RowSplit.from_groups(mesh, (1,))
    alike = [layout for layout in legal_layouts(mesh) if split.num_rows(layout, 0) == 1]
    assert {full(mesh), scattered(mesh), owed(mesh)} <= set(alike)
    with noticed(mistake, monkeypatch):
        held = [rank for rank in range(2) if split.span(scattered(mesh), rank) == (0, 1)]
        assert len(held) == 1, f"row 0 is held by {len(held)} ranks when scattered"
        for plan in named_plans(mesh, rows=1):
            plan.validate()
            for _, op in plan.ops():
                assert all(layout in legal_layouts(mesh) for layout in (*op.reads_at, *op.writes_at))


def _every_rank_the_first_rows(patch: pytest.MonkeyPatch) -> None:
    real = RowSplit.span

    def span(self: RowSplit, layout: Layout, rank: int) -> tuple[int, int]:
        start, stop = real(self, layout, rank)
        return 0, stop - start

    patch.setattr(RowSplit, "span", span)


def _floor_of_the_mean(patch: pytest.MonkeyPatch) -> None:
    def from_groups(cls: type[RowSplit], mesh: Mesh, group_rows: tuple[int, ...]) -> RowSplit:
        return cls(mesh, tuple(n // mesh.group_size for n in group_rows for _ in range(mesh.group_size)))

    patch.setattr(RowSplit, "from_groups", classmethod(from_groups))


def _ceiling_of_the_mean(patch: pytest.MonkeyPatch) -> None:
    def from_groups(cls: type[RowSplit], mesh: Mesh, group_rows: tuple[int, ...]) -> RowSplit:
        return cls(mesh, tuple(-(-n // mesh.group_size) for n in group_rows for _ in range(mesh.group_size)))

    patch.setattr(RowSplit, "from_groups", classmethod(from_groups))


FIRST_ROWS = Mistake("zero-to-local-on-every-rank", _every_rank_the_first_rows, words="has rows")
FLOOR = Mistake("rounded-down-to-a-multiple", _floor_of_the_mean, words="has rows")
CEILING = Mistake("rounded-up-to-a-multiple", _ceiling_of_the_mean, words="has rows")


def check_partition(mesh: Mesh, group_rows: tuple[int, ...]) -> None:
    """Under every layout, the ranks of one replica hold all rows, each once, a group's rows in the group."""
    split = RowSplit.from_groups(mesh, group_rows)
    total = sum(group_rows)
    for layout in legal_layouts(mesh):
        block = len(mesh.group(0, layout.num_leading, mesh.num_axes))
        held = [row for rank in range(0, mesh.size, block) for row in range(*split.span(layout, rank))]
        assert held == list(range(total)), f"{layout} of {total} rows on {mesh} has rows {held}"
    at = 0
    for index, rows in enumerate(group_rows):
        ranks = range(index * mesh.group_size, (index + 1) * mesh.group_size)
        own = [row for rank in ranks for row in range(*split.span(scattered(mesh), rank))]
        assert own == list(range(at, at + rows)), f"group {index} of {group_rows} on {mesh} has rows {own}"
        at += rows


@planted(FIRST_ROWS)
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_each_rank_slices_the_residual_at_its_own_rows(
    mesh: Mesh, mistake: Mistake | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vllm #33322: every rank took the residual's rows [0:local]."""
    with noticed(mistake, monkeypatch):
        check_partition(mesh, tuple(range(3, 3 + mesh.num_groups)))


def _norms_may_read_addends(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Layout, "is_whole", property(lambda self: not self.holds_columns))


@planted(Mistake("norm-at-an-owed-sum", _norms_may_read_addends, words="norm at "))
@pytest.mark.parametrize("mesh", [Mesh.of(dp=2, tp=2), Mesh.of(dp=2, tp=4)], ids=str)
def test_no_plan_norms_rows_whose_sum_over_tp_is_owed(
    mesh: Mesh, mistake: Mistake | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sglang #8631's own limit: with TP > DP, ranks of a group norm their addends and diverge silently."""
    with noticed(mistake, monkeypatch):
        for plan in any_plans(mesh):
            for _, op in places(plan, lambda s: s.stage is not None and s.name.endswith("_norm")):
                assert not op.layout.owes_sum, f"{op.name}: norm at {op.layout}"


@planted(BELIEVES_THE_CONSUMER)
@pytest.mark.parametrize("mesh", [Mesh.of(dp=2, tp=2), Mesh.of(dp=2, tp=4)], ids=str)
def test_norm_before_gather_with_tp_above_1_takes_the_groups_sum_first(
    mesh: Mesh, mistake: Mistake | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sglang #8631's own limit, at its own layout: the sum over attention-TP is taken before the norm."""
    plan = planner_of(mesh).plan(shape_of(mesh, 100), "norm-before-gather")
    sums = places(plan, lambda s: takes_a_sum(s) and s.boundary == "post_attn_norm")
    assert {op.move.axes for _, op in sums if op.move} == {"tp"}
    with noticed(mistake, monkeypatch):
        for place, _ in sums:
            with pytest.raises(PlanError, match=r"post_attn_norm reads hidden at .* still owed"):
                instead(plan, place).validate()


# -- C. odd counts -----------------------------------------------------------------------------------------------------


@planted(FLOOR, CEILING)
@pytest.mark.parametrize("mesh", [Mesh.of(dp=1, tp=8), Mesh.of(dp=2, tp=4), Mesh.of(dp=4, tp=2)], ids=str)
def test_1023_rows_on_8_ranks_are_1023_rows(
    mesh: Mesh, mistake: Mistake | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The review question of sglang #10568: [1023, 7168] at TP8. There it is padded; here a split is uneven."""
    with noticed(mistake, monkeypatch):
        check_partition(mesh, split_evenly(1023, mesh.num_groups))


@planted(FLOOR, CEILING)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 7])
def test_fewer_rows_than_ranks_leave_ranks_without_rows(
    rows: int, mistake: Mistake | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sglang #19918, vllm-ascend #7801: rows < ranks."""
    with noticed(mistake, monkeypatch):
        check_partition(Mesh.of(dp=1, tp=8), (rows,))


def _an_idle_group_gets_a_row(patch: pytest.MonkeyPatch) -> None:
    real = RowSplit.from_groups.__func__  # type: ignore[attr-defined]

    def from_groups(cls: type[RowSplit], mesh: Mesh, group_rows: tuple[int, ...]) -> RowSplit:
        split: RowSplit = real(cls, mesh, tuple(max(n, 1) for n in group_rows))
        return split

    patch.setattr(RowSplit, "from_groups", classmethod(from_groups))


@planted(Mistake("an-idle-group-gets-a-row", _an_idle_group_gets_a_row, words="has rows"))
@pytest.mark.parametrize("rows", [(5, 0), (0, 5), (0, 1), (0, 0)])
def test_a_group_with_no_rows_has_none(
    rows: tuple[int, ...], mistake: Mistake | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sglang #19918: one group with zero rows, which other engines fill with a dummy row."""
    with noticed(mistake, monkeypatch):
        check_partition(Mesh.of(dp=2, tp=2), rows)


def _round_up_requests(patch: pytest.MonkeyPatch) -> None:
    schedule = Scheduler.schedule

    def rounded(self: Scheduler) -> Batch | None:
        batch = schedule(self)
        if batch is None:
            return None
        (group,) = batch.groups
        return replace(batch, groups=((*group, *group[:1] * (-len(group) % 4)),))

    patch.setattr(Scheduler, "schedule", rounded)


@planted(Mistake("rounded-up-to-tp-requests", _round_up_requests, words="rows for"))
@pytest.mark.parametrize("running", [1, 3, 5, 6, 7])
def test_running_requests_need_not_be_a_multiple_of_tp(
    running: int, mistake: Mistake | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sglang #19918, vllm-ascend #7801: max running requests not a multiple of TP. One row each, no more."""
    with noticed(mistake, monkeypatch):
        scheduler = Scheduler(Limits(requests_per_group=running))
        for number in range(running + 2):
            scheduler.add(Request(id=number, prompt=(1, 2, 3), max_tokens=4))
        first = scheduler.schedule()
        assert first is not None
        scheduler.commit((7,) * first.num_logit_rows)
        batch = scheduler.schedule()
        assert batch is not None and batch.phase == "decode"
        assert batch.num_rows == running, f"{batch.num_rows} rows for {running} requests"
        assert RowSplit.from_groups(Mesh.of(dp=1, tp=4), batch.group_rows).counts == split_evenly(running, 4)


# -- E. silently off, silently slow ------------------------------------------------------------------------------------


def _nothing_is_inapplicable(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(named, "inapplicable", lambda name, config, mesh: "")


CANNOT = [
    ("attn-tp-input-scattered", "deepseek-v3", Mesh.of(dp=8, tp=1), "tp is 1"),
    ("attn-tp-input-scattered", "deepseek-v2-lite", Mesh.of(dp=1, tp=8), "q_lora_rank is null"),
    ("attn-tp-input-scattered", "llama-3.1-8b", Mesh.of(dp=1, tp=8), "no latent attention"),
    ("norm-before-gather", "deepseek-v3", Mesh.of(dp=1, tp=8), "dp is 1"),
    ("sequence-parallel", "deepseek-v3", Mesh.of(dp=1, tp=1), "one rank"),
]


@planted(Mistake("inert-without-a-word", _nothing_is_inapplicable, pytest.fail.Exception, "DID NOT RAISE"))
@pytest.mark.parametrize(("layout", "model", "mesh", "condition"), CANNOT, ids=str)
def test_an_inapplicable_layout_names_the_failed_condition(
    layout: str, model: str, mesh: Mesh, condition: str, mistake: Mistake | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang's switch goes off with one INFO line, and guides recommend it where it is inert. Here that is an error."""
    assert condition in inapplicable(layout, preset(model), mesh)
    with (
        noticed(mistake, monkeypatch),
        pytest.raises(ConfigError, match=f"{layout} cannot apply to {model}.*{condition}"),
    ):
        named_layout(layout, preset(model), mesh)


MARKS: dict[str, Callable[[Plan], set[bool]]] = {
    "all-reduce": lambda plan: {
        op.name == "all_reduce" for _, op in places(plan, lambda s: takes_a_sum(s) and s.boundary.endswith("norm"))
    },
    "attn-tp-input-scattered": lambda plan: {
        op.layout == scattered(plan.mesh) for _, op in places(plan, lambda s: s.name in ("input_norm", "qkv_a_proj"))
    },
    "norm-before-gather": lambda plan: {
        op.layout.title(plan.mesh) in ("GROUP", "SCATTERED") and op.layout != full(plan.mesh)
        for _, op in places(plan, lambda s: s.name == "post_attn_norm")
    },
    "sequence-parallel": lambda plan: {
        op.layout == scattered(plan.mesh) for _, op in places(plan, lambda s: s.kind is OpKind.STAGE and s.fused)
    },
}
"""The defining property of each named layout, checked on every op that it concerns."""


def _name_without_rules(patch: pytest.MonkeyPatch) -> None:
    def named_only(name: str, config: ModelConfig, mesh: Mesh) -> NamedLayout:
        return replace(
            named_layout("all-reduce" if name != "all-reduce" else "sequence-parallel", config, mesh), name=name
        )

    patch.setattr(planner, "named_layout", named_only)


@planted(Mistake("only-the-name", _name_without_rules, words="is not what it is called"))
@pytest.mark.parametrize("rows", [1, 8, 300, 20000])
@pytest.mark.parametrize("layout", MARKS)
def test_a_named_layout_is_in_force_at_every_row_count(
    layout: str, rows: int, mistake: Mistake | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A switch that is on without effect: one row, decode, or a small chunk. Here the named layout always runs."""
    mesh = Mesh.of(dp=2, tp=2)
    with noticed(mistake, monkeypatch):
        for phase in ("prefill", "decode"):
            plan = planner_of(mesh).plan(shape_of(mesh, rows, phase), layout)
            assert MARKS[layout](plan) == {True}, f"{layout} with {rows} rows is not what it is called"


def _rule_above_256_rows(patch: pytest.MonkeyPatch) -> None:
    plan = Planner.plan

    def ruled(self: Planner, shape: StepShape, layout: str = "auto") -> Plan:
        by_rule = layout == "auto" and shape.rows.total >= 256
        return plan(self, shape, "sequence-parallel" if by_rule else layout)

    patch.setattr(Planner, "plan", ruled)


@planted(Mistake("on-above-256-rows", _rule_above_256_rows, words="auto costs"))
@pytest.mark.parametrize("on", ["h100", "h20"])
def test_no_rule_switches_sequence_parallelism_on(
    on: str, mistake: Mistake | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vllm #48656: sequence parallelism by rule, -19 % tokens/s, no opt-out. `auto` is never dearer than any name."""
    mesh, config = Mesh.of(dp=1, tp=8), preset("deepseek-v2-lite")
    made = planner_of(mesh, config=config, on=on)
    with noticed(mistake, monkeypatch):
        for rows in (1, 64, 512, 4096, 32768):
            auto = made.plan(shape_of(mesh, rows))
            for name in applicable_layouts(config, mesh)[:-1]:
                plan = made.plan(shape_of(mesh, rows), name)
                assert plan.layout_name == name  # the opt-out: any layout can be had by its name
                assert auto.ps <= plan.ps, f"with {rows} rows auto costs {auto.ps}, {name} {plan.ps}"
