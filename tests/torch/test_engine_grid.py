"""Sharded equals one rank: over meshes, layouts, weight sharding, row counts and phases; and equal sums are equal bits.

Each mesh runs a fixed list of steps under every layout, and one rank runs the same rows in the same order. Every rank's
logits are compared, not one's. The one rank's choice of experts is replayed (a near-tie may fall either way); a row
whose own choice differs must have been such a tie. Caches are filled with NaN between layouts, so that a layout reads
what it wrote itself.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from narrows.arch.stages import RowSet, Stage
from narrows.arch.weight_sharding import WeightSharding, sharding_choices
from narrows.cost.price import Source
from narrows.cost.pricer import OpPrice, Pricer, StepShape
from narrows.engine.config import EngineConfig, resolve
from narrows.engine.core import Engine
from narrows.engine.program import Wrap
from narrows.engine.worker import StepResult, Worker
from narrows.evaluate.recorder import Recorder
from narrows.layout import Layout, Move, MoveKind, split_evenly
from narrows.plan.cache import PlanCache
from narrows.plan.graph import Graph
from narrows.plan.named import AUTO, applicable_layouts, named_layout
from narrows.plan.plan import OpKind, Plan
from narrows.plan.planner import Deployment
from narrows.plan.search import Search
from narrows.sched.batch import Batch, Chunk

MESHES = [(1, 1), (1, 2), (1, 3), (1, 4), (1, 8), (2, 1), (2, 2), (2, 4), (4, 2), (8, 1)]


def full(*case: object) -> Any:
    """A case of ``make test-full``: in ``make test`` each of its values is in another case."""
    return pytest.param(*case, marks=pytest.mark.full)


VOCAB = 67
PAGE = 16
LONG_PAGES = 1024 // PAGE + 1  # two prompts of 1023 rows together
TOLERANCE = 1e-4
"""Largest difference of a logit, relative to the root mean square of the step's logits (which are of order 1)."""


# -- steps -----------------------------------------------------------------------------------------------------------


class Steps:
    """A list of named batches for ``dp`` groups of ``tp`` ranks. The first one fills the cache for the others.

    In every group, page i holds the first tokens of request i, which decode rows and later chunks continue; the pages
    behind are for prompts. Steps do not depend on each other: each continues the first one.
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
        without = [[replace(chunk, num_logits=0) for chunk in self._prefill(n + 2)] for n in range(dp)]
        self.named.append(("prefill without logits", self._batch(without)))
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
                [*split_evenly(dp, dp - 1), 19],
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
        """Decode rows, then a later chunk of a prompt without logits, then a prompt; as far as there are rows."""
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
class OneRank:
    """One rank's logits of every step, and its choice of experts."""

    steps: Steps
    logits: list[Tensor]
    routing: dict[tuple[int, int], Tensor]


class Sharded:
    """An engine whose plans are given to it, put beside one rank's run of the same steps."""

    def __init__(self, folder: Path, one: OneRank, sharding: WeightSharding | None = None, **options: object) -> None:
        self.one = one
        self.recorder = Recorder(one.steps.dp * one.steps.tp, replay=one.routing)
        self.workers: list[Worker] = []
        engine_config = config_for(folder, one.steps, dp=one.steps.dp, tp=one.steps.tp, **options)
        self.engine = Engine(resolve(engine_config, sharding), wrap=self._wrap)

    def _wrap(self, worker: Worker) -> Wrap:
        self.workers.append(worker)
        return self.recorder.wrap(worker)

    def plans_of(self, layout: str) -> Callable[[Batch], Plan]:
        """How a step gets its plan under a named layout."""
        cache = self.engine.plans.cache_of(layout)
        return lambda batch: cache.plan_for(batch)

    def run(self, where: str, plan_of: Callable[[Batch], Plan]) -> Iterator[tuple[str, Tensor, list[StepResult]]]:
        """(name, one rank's logits, every rank's result) of every step, with nothing in the cache at first."""
        self.spoil_caches()
        for number, (name, batch) in enumerate(self.one.steps.named):
            self.recorder.begin(number)
            yield f"{where}, {name}", self.one.logits[number], self.engine.run_plan(batch, plan_of(batch))
        flips, self.recorder.flips = self.recorder.flips, []
        assert all(abs(flip.margin) < 1e-4 for flip in flips), f"{where}: experts flipped without a tie: {flips}"

    def check(self, where: str, plan_of: Callable[[Batch], Plan]) -> None:
        """Every step's logits, on every rank, are those of one rank."""
        for name, want, results in self.run(where, plan_of):
            compare(name, want, results)

    @torch.inference_mode()
    def spoil_caches(self) -> None:
        """NaN in every slot but those of the null page, which padding reads."""
        for worker in self.workers:
            for layer in worker.model.layers:
                for name in ("cache_SC", "k_cache_SKD", "v_cache_SKD"):
                    if hasattr(layer, name):
                        getattr(layer, name)[PAGE:] = float("nan")


def config_for(folder: Path, steps: Steps, *, dp: int, tp: int, **options: object) -> EngineConfig:
    defaults = {"dtype": "float32", "want_logits": True, "checked": True, "max_context": 1024, "page_size": PAGE}
    tokens = steps.pages_per_group * PAGE * (steps.dp // dp)
    return EngineConfig(model=str(folder), dp=dp, tp=tp, kv_tokens=tokens, **{**defaults, **options})  # type: ignore[arg-type]


def run_on_one_rank(folder: Path, steps: Steps, dtype: str = "float32") -> OneRank:
    recorder = Recorder(1)
    logits = []
    # Under a layout that keeps all rows up to the head, so that every row's routing is there to be replayed.
    engine_config = config_for(folder, steps, dp=1, tp=1, dtype=dtype, layout="all-reduce")
    with Engine(resolve(engine_config), wrap=recorder.wrap) as engine:
        for number, (_, batch) in enumerate(steps.named):
            recorder.begin(number)
            (result,) = engine.submit(steps.merged(batch), keep_logits=True).result()
            assert result.logits is not None
            logits.append(result.logits)
    return OneRank(steps, logits, recorder.routing)


@contextmanager
def sharded(folder: Path, one: OneRank, sharding: WeightSharding | None = None, **options: object) -> Iterator[Sharded]:
    run = Sharded(folder, one, sharding, **options)
    with run.engine:
        yield run


def compare(where: str, want: Tensor, results: Sequence[StepResult]) -> None:
    """Every rank has all logits, within tolerance, and every rank chose the same tokens: the best of its logits."""
    size = want.square().mean().sqrt().item() if want.numel() else 1.0
    assert 0.3 < size < 3, f"{where}: logits of size {size}"
    for rank, result in enumerate(results):
        assert result.logits is not None and result.logits.shape == want.shape, f"{where}: rank {rank}"
        assert result.ids == tuple(result.logits.argmax(-1).tolist()) == results[0].ids, f"{where}: rank {rank}'s ids"
        worst = (result.logits - want).abs().max().item() if want.numel() else 0.0
        assert worst <= TOLERANCE * size, f"{where}: rank {rank}'s logits differ by {worst:.1e} (size {size:.1e})"


def check_all_layouts(folder: Path, steps: Steps) -> None:
    """Every layout that applies, on engines with the sharding that it pins; `auto` with its own and with that."""
    one = run_on_one_rank(folder, steps)
    with sharded(folder, one, layout="auto") as run:
        config, mesh, own = run.engine.resolved.config, run.engine.resolved.mesh, run.engine.resolved.sharding
        run.check("auto", run.plans_of("auto"))
    names = applicable_layouts(config, mesh)
    pinned = {named_layout(name, config, mesh).sharding for name in names} - {None}
    assert pinned == {WeightSharding()}
    with sharded(folder, one, WeightSharding()) as run:
        for name in names:
            if name != "auto" or own != WeightSharding():
                run.check(name, run.plans_of(name))


# -- V3: the whole grid ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dp", "tp"),
    [
        (1, 1),
        full(1, 2),
        (1, 3),
        full(1, 4),
        (1, 8),
        full(2, 1),
        (2, 2),
        full(2, 4),
        (4, 2),
        full(8, 1),
    ],
)
def test_sharded_equals_one_rank(tiny_model: Callable[..., Path], dp: int, tp: int) -> None:
    check_all_layouts(tiny_model("v3"), Steps(dp, tp))


@pytest.mark.parametrize(
    ("dp", "tp", "num_changed"),
    [
        (2, 2, (0, 3)),  # these five have every pair of two parts' alternatives
        full(2, 2, (1, 2, 4)),
        full(1, 4, (0, 1, 2, 3, 4)),
    ],
)
def test_every_weight_sharding_equals_one_rank(
    tiny_model: Callable[..., Path], dp: int, tp: int, num_changed: tuple[int, ...]
) -> None:
    """``num_changed``: how many of the four are not as published."""
    folder, steps = tiny_model("v3"), Steps(dp, tp, longest=70)
    one = run_on_one_rank(folder, steps)
    resolved = resolve(config_for(folder, steps, dp=dp, tp=tp))
    choices = sharding_choices(resolved.config, resolved.mesh)
    assert len(choices) == 16
    published = asdict(WeightSharding())
    for sharding in choices:
        if sum(way != published[part] for part, way in asdict(sharding).items()) not in num_changed:
            continue
        with sharded(folder, one, sharding) as run:
            run.check(f"auto with {sharding}", run.plans_of("auto"))


# -- other families --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "dp", "tp"),
    [
        ("v2", 1, 3),
        full("v2", 2, 2),
        full("v2", 4, 1),
        ("v2-lite", 1, 4),
        full("v2-lite", 2, 2),
        full("v2-lite", 3, 1),
        full("llama", 1, 3),
        ("llama", 1, 8),
        full("llama", 2, 4),
        full("llama-9", 1, 2),
        full("llama-9", 1, 4),
        ("llama-9", 1, 5),
        ("llama-9", 2, 2),
        full("llama-9", 2, 5),
        ("llama-9", 3, 1),
        ("qwen2", 1, 3),
        full("qwen2", 2, 2),
        ("qwen3", 1, 4),
        full("qwen3", 2, 1),
        full("qwen3-moe", 1, 3),
        ("qwen3-moe", 2, 2),
    ],
)
def test_other_families(tiny_model: Callable[..., Path], kind: str, dp: int, tp: int) -> None:
    check_all_layouts(tiny_model(kind), Steps(dp, tp, longest=70))


@pytest.mark.full
@pytest.mark.parametrize(("dp", "tp"), MESHES)
@pytest.mark.parametrize("kind", ["v2", "v2-lite", "llama", "llama-9", "qwen2", "qwen3", "qwen3-moe"])
def test_every_other_family_on_every_mesh(tiny_model: Callable[..., Path], kind: str, dp: int, tp: int) -> None:
    """The whole grid that V3 is held to (1023 rows too), for the families that CI covers by pairs."""
    check_all_layouts(tiny_model(kind), Steps(dp, tp))


@pytest.mark.parametrize(("kind", "dp", "tp"), [("v2", 1, 3), ("v2-lite", 2, 2), ("llama", 2, 2), ("llama-9", 1, 4)])
def test_other_families_with_the_sharding_furthest_from_the_published(
    tiny_model: Callable[..., Path], kind: str, dp: int, tp: int
) -> None:
    folder, steps = tiny_model(kind), Steps(dp, tp, longest=0)
    resolved = resolve(config_for(folder, steps, dp=dp, tp=tp))
    sharding = sharding_choices(resolved.config, resolved.mesh)[-1]
    with sharded(folder, run_on_one_rank(folder, steps), sharding) as run:
        run.check(f"auto with {sharding}", run.plans_of("auto"))


# -- plans that no price would choose --------------------------------------------------------------------------------


class RandomPrices:
    """A price of its own for everything, over six orders of magnitude: the cheapest plan is then any legal one."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def _price(self, *_: object) -> OpPrice:
        ps = int(10 ** self._random.uniform(0, 6))
        return OpPrice(ps=ps, rows=0, nbytes=0, source=Source.MEASURED)

    def stage(self, stage: Stage, layout: Layout, fused: bool, row_set: RowSet) -> OpPrice:
        return self._price()

    def move(self, move: Move, row_bytes: int, row_set: RowSet) -> OpPrice:
        if row_bytes == 4 and move.kind is MoveKind.ALL_GATHER:  # ids, which every rank has had all along
            return OpPrice(ps=10**12, rows=0, nbytes=0, source=Source.MEASURED)
        return self._price()

    def reduce_norm(self, move: Move, stage: Stage, fused: bool, row_bytes: int, row_set: RowSet) -> OpPrice:
        return self._price()

    def add(self, layout: Layout, row_bytes: int, row_set: RowSet, *, joins: bool) -> OpPrice:
        return self._price()

    def recode(self, layout: Layout, row_bytes: int, row_set: RowSet) -> OpPrice:
        return self._price()

    def select(self, layout: Layout, row_bytes: int) -> OpPrice:
        return self._price()


def ways(plan: Plan) -> set[str]:
    """The plan's actions, in enough detail to tell which paths of the runner it uses."""
    found: set[str] = set()
    joined = False
    for _, op in plan.ops():
        joined |= op.joins
        if op.kind is OpKind.MOVE:
            completes = op.layout.owes_sum and not op.leaves.owes_sum
            with_addends = " with addends" if completes and joined else ""
            joined &= not completes
            num = len(op.reads)
            found.add(f"{op.name} {op.row_set}{f' of {num} fields' if num > 1 else ''}{with_addends}")
        elif op.kind is OpKind.ADD:
            found.add(f"{op.name} {'joins' if op.joins else 'is added'} {op.row_set}")
        elif op.kind is OpKind.SELECT:
            found.add(f"select from {'an owed sum' if op.layout.owes_sum else 'rows'}{' with addends' * joined}")
        else:
            found.add(f"{op.name}{' fused' * op.fused} {op.row_set}")
    return found


MUST_BE_SEEN = {
    "add_residual joins all",
    "add_residual joins logits",
    "add_residual is added all",
    "add_residual is added logits",
    "add_shared joins all",
    "add_shared is added all",
    "select from an owed sum",
    "select from an owed sum with addends",
    "select from rows",
    "post_attn_norm fused logits",
    "router logits",
    "experts logits",
    "all_reduce_norm all with addends",
    "all_reduce_norm all of 2 fields",
    "all_reduce_norm logits of 2 fields",
    "all_gather logits of 3 fields",
    "input_norm all",
    "input_norm fused all",
    "final_norm fused all",
    "final_norm fused logits",
    "column_gather all",
    "column_gather logits",
    "all_reduce all",
    "all_reduce all with addends",
    "all_reduce logits with addends",
    "reduce_scatter all",
    "reduce_scatter all with addends",
    "reduce_scatter logits with addends",
    "slice all",
    "all_gather all of 2 fields",
    "all_gather all of 3 fields",
}


@pytest.mark.parametrize(
    "sharding",
    [
        full(WeightSharding()),
        full(WeightSharding(qkv_a_proj="column", shared_expert="replicated")),
        full(WeightSharding(embed="replicated", experts="whole")),
        WeightSharding(embed="replicated", qkv_a_proj="column", shared_expert="replicated", experts="whole"),
    ],
    ids=str,
)
def test_any_legal_plan_equals_one_rank(tiny_model: Callable[..., Path], sharding: WeightSharding) -> None:
    """Of many random plans those that do most that no plan before them did."""
    folder, steps = tiny_model("v3"), Steps(2, 2, longest=0)
    one = run_on_one_rank(folder, steps)
    with sharded(folder, one, sharding) as run:
        mesh = run.engine.resolved.mesh
        graph, shape = (
            Graph(run.engine.plans.planner.chain, mesh, AUTO, fuses_norms=True),
            StepShape.of(mesh, (2, 2), phase="prefill", context=4),
        )
        plans = [
            Plan(
                layout_name="random",
                mesh=mesh,
                shape=shape,
                segments=Search(graph, RandomPrices(seed)).solve(),
                roles=graph.chain.roles,
            )
            for seed in range(250)
        ]
        found = [(plan, ways(plan)) for plan in plans]
        seen: set[str] = set()
        for _ in range(10):
            plan, new = max(found, key=lambda each: (len(each[1] & MUST_BE_SEEN - seen), len(each[1] - seen)))
            seen |= new
            plan.validate()
            run.check(f"{sharding}, a plan of {plan.num_ops} steps", lambda batch, plan=plan: plan)  # type: ignore[misc]
    missing = MUST_BE_SEEN - seen
    if sharding.shared_expert == "sharded":
        missing -= {"add_shared joins all", "add_shared is added all"}
    if sharding.qkv_a_proj == "replicated":
        missing -= {"column_gather all"}
    assert not missing, f"no plan did {missing}; they did {sorted(seen)}"


class Forced:
    """The engine's own prices, but an all-reduce and its norm in one step costs nothing, and the last layer after
    attention is out of the question on rows without logits."""

    def __init__(self, prices: Pricer) -> None:
        self._prices = prices

    def __getattr__(self, name: str) -> object:
        return getattr(self._prices, name)

    def stage(self, stage: Stage, layout: Layout, fused: bool, row_set: RowSet) -> OpPrice:
        price = self._prices.stage(stage, layout, fused, row_set)
        return replace(price, ps=10**15) if stage.any_rows and row_set is RowSet.ALL else price

    def reduce_norm(self, move: Move, stage: Stage, fused: bool, row_bytes: int, row_set: RowSet) -> OpPrice:
        return OpPrice(
            ps=1 if row_set is RowSet.ALL or not stage.any_rows else 2, rows=0, nbytes=0, source=Source.MEASURED
        )


@pytest.mark.parametrize(
    ("dp", "tp"),
    [(dp, tp) if (dp, tp) in ((1, 3), (2, 4)) else full(dp, tp) for dp, tp in MESHES if dp * tp > 1],
)
def test_fused_norms_and_a_narrow_last_layer_equal_one_rank(tiny_model: Callable[..., Path], dp: int, tp: int) -> None:
    """Both forced on, with the published sharding and the furthest from it: groups without rows, one row on 8 ranks."""
    folder, steps = tiny_model("v3"), Steps(dp, tp, longest=70)
    one = run_on_one_rank(folder, steps)
    seen: set[str] = set()
    for index in (0, -1):
        resolved = resolve(config_for(folder, steps, dp=dp, tp=tp))
        sharding = sharding_choices(resolved.config, resolved.mesh)[index]
        with sharded(folder, one, sharding) as run:
            planner, mesh = run.engine.plans.planner, run.engine.resolved.mesh
            graph, d = Graph(planner.chain, mesh, AUTO, fuses_norms=True), planner.deployment

            def plan_of(batch: Batch, graph: Graph = graph, d: Deployment = d) -> Plan:
                shape = StepShape.of(
                    d.mesh, batch.group_rows, phase=batch.phase, context=16, logit_rows=batch.num_logit_rows
                )
                prices = Forced(Pricer(d.device, d.mesh, shape, d.dtype, itemsize=d.itemsize, graph=d.graph))
                segments = Search(graph, prices).solve()  # type: ignore[arg-type]
                plan = Plan(layout_name="forced", mesh=d.mesh, shape=shape, segments=segments, roles=graph.chain.roles)
                plan.validate()
                seen.update(ways(plan))
                return plan

            run.check(f"forced with {sharding}", plan_of)
    assert {"router logits", "experts logits"} <= seen and {"router all", "experts all"} <= seen
    assert any(way.startswith("all_reduce_norm all") for way in seen), sorted(seen)
    assert any(way.startswith("all_reduce_norm logits") for way in seen), sorted(seen)


# -- tokens without logits, and bits ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("dp", "tp"), [(1, 3), (2, 2), (8, 1)])
def test_the_best_token_without_gathering_logits_is_the_same(tiny_model: Callable[..., Path], dp: int, tp: int) -> None:
    folder, steps = tiny_model("v3"), Steps(dp, tp, longest=0)
    one = run_on_one_rank(folder, steps)
    with sharded(folder, one, want_logits=False) as run:
        plans = []

        def plan_of(batch: Batch) -> Plan:
            plans.append(run.plans_of("auto")(batch))
            return plans[-1]

        for name, want, results in run.run("auto", plan_of):
            assert {result.ids for result in results} == {tuple(want.argmax(-1).tolist())}, name
        assert all("pick" in [op.name for _, op in plan.ops()] for plan in plans)


@pytest.mark.parametrize(
    ("dtype", "dp", "tp", "layouts"),
    [
        ("float32", 1, 4, ("all-reduce", "sequence-parallel")),
        full("bfloat16", 1, 4, ("all-reduce", "sequence-parallel")),
        full("float32", 1, 3, ("all-reduce", "sequence-parallel")),
        ("bfloat16", 1, 3, ("all-reduce", "sequence-parallel")),
        ("float32", 2, 2, ("norm-before-gather", "sequence-parallel")),
        full("bfloat16", 2, 2, ("norm-before-gather", "sequence-parallel")),
        full("float32", 4, 2, ("norm-before-gather", "sequence-parallel")),
        ("bfloat16", 4, 2, ("norm-before-gather", "sequence-parallel")),
    ],
)
def test_layouts_with_the_same_sums_give_the_same_bits(
    tiny_model: Callable[..., Path], dtype: str, dp: int, tp: int, layouts: tuple[str, str]
) -> None:
    """All-reduce, or reduce-scatter and gather: sums in float32 in rank order, so the route does not show."""
    folder, steps = tiny_model("v3"), Steps(dp, tp, longest=200)
    caches: list[PlanCache] = []
    runs: list[list[list[StepResult]]] = []
    with Engine(resolve(config_for(folder, steps, dp=dp, tp=tp, dtype=dtype), WeightSharding())) as engine:
        for layout in layouts:
            caches.append(engine.plans.cache_of(layout))
            runs.append([])
            for _, batch in steps.named:
                plan = caches[-1].plan_for(batch)
                runs[-1].append(engine.run_plan(batch, plan))
    moves = [{op.name for _, plan in cache.items() for _, op in plan.ops()} for cache in caches]
    assert "reduce_scatter" not in moves[0] and "all_reduce" not in moves[1]
    for (name, _), first, second in zip(steps.named, *runs, strict=True):
        for rank, (a, b) in enumerate(zip(first, second, strict=True)):
            assert a.logits is not None and b.logits is not None
            assert torch.equal(a.logits, b.logits), f"{name}: rank {rank}"
            assert torch.equal(a.logits, first[0].logits), f"{name}: rank {rank} differs from rank 0"
