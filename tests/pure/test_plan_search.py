"""The search is exact: equal to a plain search over all stages, and to one written here from the rules alone."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from zlib import crc32

import pytest
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from narrows.arch.chain import build_chain
from narrows.arch.config import ModelConfig, read_config
from narrows.arch.presets import preset
from narrows.arch.stages import Chain, Role, RowSet, Stage, StageKind
from narrows.arch.weight_sharding import WeightSharding, sharding_choices
from narrows.cost.devices import device
from narrows.cost.price import Source
from narrows.cost.pricer import OpPrice, StepShape
from narrows.errors import PlanError
from narrows.layout import Encoding, Layout, Mesh, Move, MoveKind, Topology, full, moves_from, scattered, split_evenly
from narrows.plan.graph import Graph
from narrows.plan.named import AUTO, NamedLayout, applicable_layouts, inapplicable, named_layout
from narrows.plan.plan import Op, Plan, Segment
from narrows.plan.planner import Deployment, Planner
from narrows.plan.search import Search

MESHES = [
    Mesh.of(dp=1, tp=1),
    Mesh.of(dp=1, tp=4),
    Mesh.of(dp=4, tp=1),
    Mesh.of(dp=2, tp=2),
    Mesh.of(pod=2, dp=2, tp=2),
]


def tiny(family: str, layers: int) -> ModelConfig:
    mla = {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
    routed = {
        "n_routed_experts": 16,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    }
    fields: dict[str, dict[str, object]] = {
        "v3": {"model_type": "deepseek_v3", "q_lora_rank": 48} | mla | routed,
        "v2-lite": {"model_type": "deepseek_v2", "q_lora_rank": None} | mla | routed,
        "llama": {"model_type": "llama", "num_key_value_heads": 2},
        "qwen3-moe": {
            "model_type": "qwen3_moe",
            "num_key_value_heads": 2,
            "num_experts": 16,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
        },
    }
    fields["in turns"] = fields["qwen3-moe"] | {"decoder_sparse_step": 2}
    kinds = ["sliding_attention", "full_attention", "sliding_attention"] * layers
    fields["windows"] = {"model_type": "qwen2", "num_key_value_heads": 2, "layer_types": kinds[:layers]}
    fields["windows"] |= {"use_sliding_window": True, "sliding_window": 4}
    common = {
        "hidden_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "intermediate_size": 128,
        "vocab_size": 512,
    }
    return read_config(common | fields[family], family)


@dataclass(frozen=True)
class RandomPrices:
    """A price from a hash of its arguments: any price may be the dearest, and equal arguments give equal prices.

    ``scale`` small makes many ties.
    """

    seed: int
    scale: int

    def stage(self, stage: Stage, layout: Layout, fused: bool, row_set: RowSet) -> OpPrice:
        return self._price("stage", stage.name, stage.window, layout, fused, row_set)

    def move(self, move: Move, row_bytes: int, row_set: RowSet) -> OpPrice:
        return self._price("move", move.kind, move.algorithm, move.src, move.dst, row_bytes, row_set)

    def reduce_norm(self, move: Move, stage: Stage, fused: bool, row_bytes: int, row_set: RowSet) -> OpPrice:
        return self._price("reduce_norm", move.src, stage.name, fused, row_bytes, row_set)

    def add(self, layout: Layout, row_bytes: int, row_set: RowSet, *, joins: bool) -> OpPrice:
        return self._price("add", layout, row_bytes, row_set, joins)

    def recode(self, layout: Layout, row_bytes: int, row_set: RowSet) -> OpPrice:
        return self._price("recode", layout, row_bytes, row_set)

    def select(self, layout: Layout, row_bytes: int) -> OpPrice:
        return self._price("select", layout, row_bytes)

    def _price(self, *what: object) -> OpPrice:
        ps = 1 + crc32(repr((self.seed, *map(str, what))).encode()) % self.scale
        return OpPrice(ps, 1, 1, Source.ROOFLINE)


seeds = st.integers(0, 10**6)
scales = st.sampled_from([3, 50, 10**6])
families = st.sampled_from(["v3", "v2-lite", "llama", "qwen3-moe", "in turns", "windows"])
meshes = st.sampled_from(MESHES)


@st.composite
def chains(draw: st.DrawFn, layers: st.SearchStrategy[int]) -> tuple[Chain, Mesh]:
    config, mesh = tiny(draw(families), draw(layers)), draw(meshes)
    sharding = draw(st.sampled_from(sharding_choices(config, mesh)))
    return build_chain(config, mesh, sharding, want_logits=draw(st.booleans())), mesh


def plan_of(graph: Graph, prices: RandomPrices) -> Plan:
    shape = StepShape.of(graph.mesh, (1,) * graph.mesh.num_groups, phase="decode", context=1)
    segments = Search(graph, prices).solve()
    return Plan(layout_name=graph.rules.name, mesh=graph.mesh, shape=shape, segments=segments, roles=graph.chain.roles)


@pytest.mark.slow
@settings(deadline=None, max_examples=examples(120))
@given(chains(st.integers(1, 6)), seeds, scales)
def test_chained_tables_equal_a_plain_search(built: tuple[Chain, Mesh], seed: int, scale: int) -> None:
    chain, mesh = built
    graph, prices = Graph(chain, mesh, AUTO, fuses_norms=True), RandomPrices(seed, scale)
    plan = plan_of(graph, prices)
    plan.validate()
    assert (plan.ps, plan.num_ops) == Search(graph, prices).solve_plainly()
    assert plan == plan_of(
        Graph(chain, mesh, AUTO, fuses_norms=True), prices
    )  # deterministic, and no state is left in a graph


@settings(deadline=None, max_examples=examples(10))
@given(meshes, seeds, scales)
def test_61_layers_equal_a_plain_search(mesh: Mesh, seed: int, scale: int) -> None:
    config = preset("deepseek-v3")
    sharding = sharding_choices(config, mesh)
    chain = build_chain(config, mesh, sharding[seed % len(sharding)])
    graph, prices = Graph(chain, mesh, AUTO), RandomPrices(seed, scale)
    plan = plan_of(graph, prices)
    plan.validate()
    assert len({layer for layer, _ in plan.ops() if layer is not None}) == 61
    assert (plan.ps, plan.num_ops) == Search(graph, prices).solve_plainly()


# -- a search of its own -----------------------------------------------------------------------------------------------

State = tuple[int, frozenset[tuple[str, Layout]], bool]


def cheapest(
    chain: Chain, mesh: Mesh, prices: RandomPrices, *, fuses_norms: bool = False, nodes: Topology | None = None
) -> int:
    """Dijkstra over the whole model at once: any field may move before any stage, alone or packed with others."""
    stages = [*chain.prologue, *(s for t in chain.layers for s in chain.layer_types[t].stages), *chain.epilogue]
    last_attention = max(i for i, stage in enumerate(stages) if stage.name == "attention")
    row_bytes: dict[str, int] = {}
    for each in chain.fields.values():
        row_bytes[each.bundle] = row_bytes.get(each.bundle, 0) + each.row_bytes
    bundle_of = {each.name: each.bundle for each in chain.fields.values()}

    def next_states(at: int, held: dict[str, Layout], selected: bool) -> Iterator[tuple[State, OpPrice]]:
        stage = stages[at]
        row_set = RowSet.LOGITS if selected else RowSet.ALL

        def state(now: dict[str, Layout], picked: bool = selected, stage_index: int = at) -> State:
            return stage_index, frozenset(now.items()), picked

        for size in range(1, len(held) + 1):
            for chosen in itertools.combinations(held, size):
                if len({held[name] for name in chosen}) > 1:
                    continue
                for move in moves_from(mesh, held[chosen[0]], nodes):
                    if size > 1 and move.kind is not MoveKind.ALL_GATHER:
                        continue
                    total = sum(row_bytes[name] for name in chosen)
                    yield state(held | dict.fromkeys(chosen, move.dst)), prices.move(move, total, row_set)
        if stage.kind is StageKind.NORM:
            for addend in {"residual", "shared"} & set(held):
                hidden = held["hidden"]
                wanted = scattered(mesh) if hidden.owes_sum else hidden
                if held[addend] == wanted and not hidden.holds_columns:
                    rest = {name: layout for name, layout in held.items() if name != addend}
                    yield state(rest), prices.add(wanted, row_bytes["hidden"], row_set, joins=hidden.owes_sum)
        if at > last_attention and not selected:
            total = sum(row_bytes[name] for name in held)
            yield state(held, True), prices.select(held["hidden"], total)
        for now, layout, fused in ways_to_run(stage, held, selected):
            yield state(now, stage_index=at + 1), prices.stage(stage, layout, fused, row_set)
        for move in moves_from(mesh, held["hidden"]) if fuses_norms and stage.kind is StageKind.NORM else ():
            for now, _, fused in ways_to_run(stage, held | {"hidden": move.dst}, selected):
                price = prices.reduce_norm(move, stage, fused, row_bytes["hidden"], row_set)
                if move.kind is MoveKind.ALL_REDUCE:
                    yield state(now, stage_index=at + 1), price

    def ways_to_run(
        stage: Stage, held: dict[str, Layout], selected: bool
    ) -> Iterator[tuple[dict[str, Layout], Layout, bool]]:
        """(state after the stage, its layout, whether it added the residual); nothing if it cannot run."""
        reads = {bundle_of[name] for name in stage.reads}
        fused = stage.kind is StageKind.NORM and "residual" in held
        if stage.kind is StageKind.NORM and not fused:
            reads.discard("residual")
        layouts = {held.get(name) for name in reads}
        layout = next(iter(layouts))
        wrong_rows = not selected and stage.row_set is RowSet.LOGITS
        if len(layouts) > 1 or layout is None or wrong_rows or (stage.kind is StageKind.NORM and "shared" in held):
            return
        if layout != stage.accepts if stage.accepts is not None else not layout.is_whole:
            return
        after = {name: where for name, where in held.items() if name not in {bundle_of[f] for f in stage.frees}}
        after |= {bundle_of[name]: stage.leaves or layout for name in stage.writes}
        yield after, layout, fused

    start: State = (0, frozenset({("ids", full(mesh))}), False)
    best, heap, count = {start: 0}, [(0, 0, start)], 0
    while heap:
        cost, _, here = heapq.heappop(heap)
        if cost > best[here]:
            continue
        if here[0] == len(stages):
            return cost
        for there, price in next_states(here[0], dict(here[1]), here[2]):
            if cost + price.ps < best.get(there, 1 << 62):
                best[there] = cost + price.ps
                count += 1
                heapq.heappush(heap, (cost + price.ps, count, there))
    raise AssertionError("no way through")


SMALL = [Mesh.of(dp=1, tp=1), Mesh.of(dp=1, tp=4), Mesh.of(dp=4, tp=1)]


@settings(deadline=None, max_examples=examples(25))
@given(families, st.sampled_from(SMALL), seeds, scales)
def test_no_cheaper_way_exists(family: str, mesh: Mesh, seed: int, scale: int) -> None:
    config = tiny(family, 2)
    sharding = sharding_choices(config, mesh)
    chain, prices = build_chain(config, mesh, sharding[seed % len(sharding)]), RandomPrices(seed, scale)
    for fuses in (False, True):
        plan = plan_of(Graph(chain, mesh, AUTO, fuses_norms=fuses), prices)
        plan.validate()
        assert plan.ps == cheapest(chain, mesh, prices, fuses_norms=fuses)


@settings(deadline=None, max_examples=examples(15))
@given(families, seeds, scales, st.booleans())
def test_no_cheaper_way_exists_on_two_nodes(family: str, seed: int, scale: int, fuses: bool) -> None:
    mesh, nodes, config = Mesh.of(dp=1, tp=4), Topology(2, 2), tiny(family, 2)
    sharding = sharding_choices(config, mesh)
    chain, prices = build_chain(config, mesh, sharding[seed % len(sharding)]), RandomPrices(seed, scale)
    graph = Graph(chain, mesh, AUTO, fuses_norms=fuses, topology=nodes)
    plan = plan_of(graph, prices)
    plan.validate()
    assert plan.ps == cheapest(chain, mesh, prices, fuses_norms=fuses, nodes=nodes)
    assert (plan.ps, plan.num_ops) == Search(graph, prices).solve_plainly()
    assert plan.ps <= plan_of(Graph(chain, mesh, AUTO, fuses_norms=fuses), prices).ps


@pytest.mark.parametrize("seed", [0, 3, *(pytest.param(seed, marks=pytest.mark.full) for seed in (1, 2))])
def test_no_cheaper_way_exists_on_two_axes(seed: int) -> None:
    mesh, config = Mesh.of(dp=2, tp=2), tiny("v3", 1)
    sharding = WeightSharding(qkv_a_proj="column") if seed % 2 else WeightSharding()
    chain, prices = build_chain(config, mesh, sharding), RandomPrices(seed, 1000)
    fuses = seed < 2
    plan = plan_of(Graph(chain, mesh, AUTO, fuses_norms=fuses), prices)
    assert plan.ps == cheapest(chain, mesh, prices, fuses_norms=fuses)


# -- named layouts, and plans that are wrong ---------------------------------------------------------------------------


@pytest.mark.slow
@settings(deadline=None, max_examples=examples(60))
@given(families, meshes, seeds, scales)
def test_auto_is_never_dearer_than_a_named_layout(family: str, mesh: Mesh, seed: int, scale: int) -> None:
    config, prices = tiny(family, 3), RandomPrices(seed, scale)
    chain = build_chain(config, mesh)
    auto = plan_of(Graph(chain, mesh, AUTO), prices)
    for name in applicable_layouts(config, mesh):
        graph = Graph(chain, mesh, named_layout(name, config, mesh))
        plan = plan_of(graph, prices)
        plan.validate()
        assert plan.ps >= auto.ps
        assert (plan.ps, plan.num_ops) == Search(graph, prices).solve_plainly()


def real_plans(name: str, mesh: Mesh, rows: int) -> Iterator[Plan]:
    deployment = Deployment(config=preset(name), mesh=mesh, device=device("h100"), dtype="bf16")
    phase = "prefill" if rows > 64 else "decode"
    shape = StepShape.of(mesh, split_evenly(rows, mesh.num_groups), phase=phase, context=4096)
    planner = Planner(deployment, WeightSharding())
    for layout in applicable_layouts(deployment.config, mesh):
        yield planner.plan(shape, layout)
    for sharding in sharding_choices(deployment.config, mesh)[1:]:
        yield Planner(deployment, sharding).plan(shape)


CASES = [("deepseek-v3", 16384), ("deepseek-v3", 7), ("deepseek-v2-lite", 1023), ("llama-3.1-8b", 1), ("glm-4.5", 4096)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rows", "mesh"),
    [
        pytest.param(*case, mesh, marks=[] if i % 3 == j else [pytest.mark.full])
        for i, case in enumerate(CASES)
        for j, mesh in enumerate((Mesh.of(dp=1, tp=8), Mesh.of(dp=2, tp=4), Mesh.of(dp=8, tp=1)))
    ],
    ids=str,
)
def test_a_plan_with_one_sum_not_taken_is_refused(name: str, rows: int, mesh: Mesh) -> None:
    """Whichever reduction is taken out, the stage that would read an owed sum is named."""
    seen = 0
    for plan in real_plans(name, mesh, rows):
        plan.validate()
        for at, segment in enumerate(plan.segments):
            for i, op in enumerate(segment.ops):
                if op.move is None or not op.move.src.owes_sum:
                    continue
                seen += 1
                layer = f"layer {segment.layers[0]} " if segment.layers else ""
                with pytest.raises(PlanError, match=f"^{layer}.*{op.boundary}.*sum is still owed"):
                    without(plan, at, i).validate()
    assert seen >= 4


def without(plan: Plan, segment_index: int, step_index: int) -> Plan:
    """The plan less one step, in all layers of its segment."""
    segments = list(plan.segments)
    ops = segments[segment_index].ops
    segments[segment_index] = replace(segments[segment_index], ops=ops[:step_index] + ops[step_index + 1 :])
    return replace(plan, segments=tuple(segments))


def changed(plan: Plan, name: str, boundary: str, **changes: object) -> Plan:
    """The plan with every op of that name and boundary changed."""

    def change(op: Op) -> Op:
        return replace(op, **changes) if (op.name, op.boundary) == (name, boundary) else op  # type: ignore[arg-type]

    def steps(segment: Segment) -> Segment:
        return replace(segment, ops=tuple(change(op) for op in segment.ops))

    return replace(plan, segments=tuple(steps(segment) for segment in plan.segments))


def test_other_wrong_plans_are_refused() -> None:
    mesh = Mesh.of(dp=1, tp=8)
    plans = {plan.layout_name: plan for plan in real_plans("deepseek-v3", mesh, 16384)}
    published = plans["attn-tp-input-scattered"]
    at = next(i for i, segment in enumerate(published.segments) if segment.name == "moe")
    joined = [i for i, op in enumerate(published.segments[at].ops) if op.name == "add_residual"]
    with pytest.raises(PlanError, match="post_attn_norm would lose residual"):
        without(published, at, joined[0]).validate()
    router = [i for i, op in enumerate(published.segments[at].ops) if op.name == "router"]
    with pytest.raises(PlanError, match="experts reads topk_ids, which no op has left"):
        without(published, at, router[0]).validate()
    with pytest.raises(PlanError, match=r"qkv_a_proj reads hidden at \(-,R\), but it is at \(-,S\)"):
        changed(published, "qkv_a_proj", "qkv_a_proj", reads_at=(full(mesh),)).validate()
    everywhere = (Layout.on(mesh, "RP"), full(mesh))
    twice = changed(published, "add_residual", "post_attn_norm", reads_at=everywhere)
    with pytest.raises(PlanError, match="add_residual before post_attn_norm reads residual at"):
        twice.validate()


def test_rules_that_leave_no_way_name_the_stage() -> None:
    config, mesh = tiny("v3", 2), Mesh.of(dp=1, tp=4)
    rules = NamedLayout(name="impossible", summary="a sum that may not be taken", sums_by={Role.MLP_NORM: ()})
    search = Search(Graph(build_chain(config, mesh), mesh, rules), RandomPrices(1, 100))
    with pytest.raises(PlanError, match="layout impossible leaves no way to run post_attn_norm on dp 1 x tp 4"):
        search.solve()


@pytest.mark.slow
def test_inapplicable_agrees_with_the_planner() -> None:
    """Every applicable layout has a plan, on every mesh and model."""
    for family, mesh in itertools.product(("v3", "v2-lite", "llama", "qwen3-moe"), MESHES):
        config = tiny(family, 2)
        chain = build_chain(config, mesh)
        for name in applicable_layouts(config, mesh):
            assert not inapplicable(name, config, mesh)
            plan_of(Graph(chain, mesh, named_layout(name, config, mesh)), RandomPrices(0, 1000)).validate()


@dataclass(frozen=True)
class CountedPrices(RandomPrices):
    """The requested prices, in order."""

    asked: list[object] = field(default_factory=list)

    def _price(self, *what: object) -> OpPrice:
        self.asked.append(tuple(map(str, what)))
        return super()._price(*what)


@pytest.mark.parametrize(("dp", "tp"), [(1, 8), (2, 4), (8, 1)])
def test_a_plan_of_61_layers_takes_no_more_prices_than_one_of_5(dp: int, tp: int) -> None:
    """And none twice, so that planning stays in milliseconds: `benchmarks/planning.py` has them."""
    mesh = Mesh.of(dp=dp, tp=tp)
    counts = []
    for layers in (5, 61):
        chain = build_chain(replace(preset("deepseek-v3"), num_hidden_layers=layers), mesh, WeightSharding())
        graph = Graph(chain, mesh, AUTO)
        prices = CountedPrices(0, 1000)
        plan_of(graph, prices)
        assert len(prices.asked) == len(set(prices.asked))
        counts.append(len(prices.asked))
    assert counts[0] == counts[1] < 400


# -- encoded rows ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recoding(RandomPrices):
    """Random prices, but encoding and decoding cost ``ps``; None: they must not be priced."""

    ps: int | None

    def recode(self, layout: Layout, row_bytes: int, row_set: RowSet) -> OpPrice:
        assert self.ps is not None, "rows are not to be encoded"
        return OpPrice(self.ps, 1, 1, Source.ROOFLINE)


def solved(chain: Chain, mesh: Mesh, prices: RandomPrices, *encoding: Encoding, always: bool = False) -> Plan:
    graph = Graph(chain, mesh, AUTO, *encoding, always=always)
    shape = StepShape.of(mesh, (1,) * mesh.num_groups, phase="decode", context=1)
    plan = Plan(layout_name="auto", mesh=mesh, shape=shape, segments=Search(graph, prices).solve(), roles=chain.roles)
    assert (plan.ps, plan.num_ops) == Search(graph, prices).solve_plainly()
    return plan


@pytest.mark.slow
@settings(deadline=None, max_examples=examples(60))
@given(chains(st.integers(1, 4)), seeds, scales)
def test_dear_encodings_change_no_plan_and_free_ones_never_cost(built: tuple, seed: int, scale: int) -> None:
    chain, mesh = built
    off = solved(chain, mesh, Recoding(seed, scale, None))
    assert not off.encodings
    dear = solved(chain, mesh, Recoding(seed, scale, 10**9), Encoding.INT8)
    assert dear == off
    free = solved(chain, mesh, Recoding(seed, scale, 0), Encoding.INT8)
    assert free.ps <= off.ps


@pytest.mark.slow
@settings(deadline=None, max_examples=examples(60))
@given(chains(st.integers(1, 4)), seeds, st.booleans())
def test_only_outputs_of_norms_and_gemms_are_encoded(built: tuple, seed: int, always: bool) -> None:
    """Never an owed sum, the residual stream, ids or the choice of experts, even if it were free."""
    chain, mesh = built
    plan = solved(chain, mesh, Recoding(seed, 10**6, 0), Encoding.FP8, always=always)
    plan.validate()
    norms = {stage.name for stage in all_stages(chain) if stage.kind is StageKind.NORM}
    for _, op in plan.ops():
        if op.encoded:
            assert op.move is not None and op.move.kind is MoveKind.ALL_GATHER
            assert set(op.encoded) <= {"hidden", "qkv_latent"} and op.boundary not in norms
            assert set(op.encoded.values()) == {Encoding.FP8} and len(op.encodings) == len(op.reads)
        elif always and op.name == "all_gather" and op.boundary not in norms:
            assert not {"hidden", "qkv_latent"} & set(op.reads)


def all_stages(chain: Chain) -> Sequence:
    return [*chain.prologue, *(stage for kind in chain.layer_types for stage in kind.stages), *chain.epilogue]
