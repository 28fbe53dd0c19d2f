"""The bound program: refusals, checked mode, ownership of memory, and addends that count once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from patience import PATIENCE_S
from torch import Tensor

from narrows.arch.config import read_config
from narrows.arch.weight_sharding import WeightSharding, sharding_choices
from narrows.arch.weights import Weight
from narrows.engine.config import EngineConfig, resolve
from narrows.engine.core import Engine
from narrows.engine.program import Frame, Operation, Registers, Wrap
from narrows.engine.worker import StepResult, Worker, logit_split
from narrows.errors import CheckpointError, PlanError
from narrows.evaluate.recorder import Recorder, Spot
from narrows.layout import RowSplit
from narrows.plan.named import applicable_layouts
from narrows.plan.plan import ALL_REDUCE_NORM, Op, OpKind, Plan
from narrows.plan.planner import Planner
from narrows.sched.batch import Batch, Chunk
from narrows.weights.safetensors_folder import SafetensorsFolder

TinyModel = Callable[..., Path]
REDUCTIONS = ("all_reduce", "reduce_scatter")


def config_for(folder: Path, dp: int, tp: int, **options: Any) -> EngineConfig:
    return EngineConfig(
        model=str(folder), dp=dp, tp=tp, **{"dtype": "float32", "want_logits": True, "max_context": 64, **options}
    )


def prefill(dp: int, rows: int = 7) -> Batch:
    """A prompt of ``rows`` in the first group, of one row less in the next, and so on."""
    groups = []
    for group in range(dp):
        tokens = tuple((13 * group + 5 * i) % 67 for i in range(rows - group))
        groups.append((Chunk(request=group, start=0, tokens=tokens, pages=(1,), num_logits=len(tokens)),))
    return Batch(groups=tuple(groups))


def run(engine: Engine, batch: Batch, layout: str) -> list[StepResult]:
    return engine.run_plan(batch, plan_of(engine, batch, layout))


def plan_of(engine: Engine, batch: Batch, layout: str) -> Plan:
    return engine.plans.cache_of(layout).plan_for(batch)


def patched(rank: int, layer: int, stage: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Any:
    """An engine's ``wrap`` that puts ``around`` around one stage of one rank, before plans are bound."""

    def wrap(worker: Worker) -> Wrap:
        if worker.rank_context.rank == rank:
            owner = worker.model.layers[layer]
            setattr(owner, stage, around(getattr(owner, stage)))
        return lambda layer, op, reads, writes, operation: operation

    return wrap


def rank_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("narrows rank")]


# -- the chain and the model, name for name --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["v3", "v2", "v2-lite", "llama", "llama-9"])
@pytest.mark.parametrize("want_logits", [True, False])
def test_every_stage_of_the_chain_is_a_method_of_the_model(tiny_model: TinyModel, kind: str, want_logits: bool) -> None:
    folder = tiny_model(kind)
    workers: list[Worker] = []

    def wrap(worker: Worker) -> Wrap:
        workers.append(worker)
        return lambda layer, op, reads, writes, operation: operation

    resolved = resolve(config_for(folder, 1, 2, want_logits=want_logits))
    for sharding in sharding_choices(resolved.config, resolved.mesh):
        chain = Planner(resolved.deployment, sharding).chain
        with Engine(resolve(resolved.engine_config, sharding), wrap=wrap):
            model = workers[-1].model
            assert len(model.layers) == len(chain.layers)
            for stage in (*chain.prologue, *chain.epilogue):
                assert callable(getattr(model, stage.name))
            for layer, type_index in zip(model.layers, chain.layers, strict=True):
                for stage in chain.layer_types[type_index].stages:
                    assert callable(getattr(layer, stage.name))


# -- checked mode ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rank", "layer", "stage", "spoil", "said"),
    [
        (1, 0, "latent_norm", lambda y: y[:-1], r"rank 1: layer 0 latent_norm left qkv_latent with shape \(6, 36\)"),
        (2, 1, "qkv_a_proj", lambda y: y[:, 1:], r"rank 2: layer 1 qkv_a_proj left qkv_latent with shape \(\d, 35\)"),
        (3, 2, "attention", lambda y: y.repeat(2, 1), r"rank 3: layer 2 attention left hidden with shape \(12, 32\)"),
        (0, 0, "mlp", lambda y: y[:0], r"rank 0: layer 0 mlp left hidden with shape \(0, 32\)"),
        (1, 1, "post_attn_norm", lambda y: (y[0], y[1][:2]), r"rank 1: layer 1 post_attn_norm left residual with sha"),
        (1, 2, "router", lambda y: (y[0][:, :2], y[1]), r"rank 1: layer 2 router left topk_ids with shape \(13, 2\)"),
    ],
)
def test_checked_mode_names_a_stage_whose_output_contradicts_its_layout(
    tiny_model: TinyModel, rank: int, layer: int, stage: str, spoil: Callable[[Any], Any], said: str
) -> None:
    wrap = patched(rank, layer, stage, lambda method: lambda *args, **options: spoil(method(*args, **options)))
    engine_config = config_for(tiny_model("v3"), 2, 2, checked=True, layout="norm-before-gather")
    with Engine(resolve(engine_config), wrap=wrap) as engine, pytest.raises(AssertionError, match=said) as error:
        run(engine, prefill(2), "norm-before-gather")
    assert "means" in str(error.value) and f"raised on rank {rank}" in "".join(error.value.__notes__)


# -- plans that are refused ------------------------------------------------------------------------------------------


def edited(plan: Plan, segment: int, place: int, *instead: Op) -> Plan:
    """The plan with ``instead`` in the place of one step."""
    ops = plan.segments[segment].ops
    new = replace(plan.segments[segment], ops=(*ops[:place], *instead, *ops[place + 1 :]))
    return replace(plan, segments=(*plan.segments[:segment], new, *plan.segments[segment + 1 :]))


def places(plan: Plan, wanted: Callable[[Op], bool]) -> Iterator[tuple[int, int, str, Op]]:
    """(segment, place, how an error names the stage that the step is or prepares, step)."""
    for s, segment in enumerate(plan.segments):
        for i, op in enumerate(segment.ops):
            if wanted(op):
                yield s, i, f"layer {segment.layers[0]} {op.boundary}" if segment.layers else op.boundary, op


@pytest.mark.parametrize(("dp", "tp"), [(1, 2), (2, 2)])
def test_a_plan_without_one_of_its_reductions_is_refused_naming_the_stage(
    tiny_model: TinyModel, dp: int, tp: int
) -> None:
    batch = prefill(dp)
    resolved = resolve(config_for(tiny_model("v3"), dp, tp), WeightSharding())
    tried = 0
    for layout in applicable_layouts(resolved.config, resolved.mesh):
        with Engine(resolved) as engine:
            plan = plan_of(engine, batch, layout)
        for s, i, where, _ in places(plan, lambda op: op.name in REDUCTIONS):
            with Engine(resolved) as engine, pytest.raises(PlanError) as error:
                engine.run_plan(batch, edited(plan, s, i))
            # Without a sum over one axis the move over the others fails, which prepares the same stage.
            assert where.split()[-1] in str(error.value) and where.removesuffix(where.split()[-1]) in str(error.value)
            assert "sum is still owed" in str(error.value) or "but it is at" in str(error.value)
            tried += 1
    assert tried >= 15  # those that are one step with a norm aside


def test_doubled_reductions_and_missing_addends_or_stages_are_refused(tiny_model: TinyModel) -> None:
    batch = prefill(2)
    with Engine(resolve(config_for(tiny_model("v3"), 2, 2), WeightSharding())) as engine:
        plan = plan_of(engine, batch, "all-reduce")
    for s, i, _, op in places(plan, lambda op: op.name in REDUCTIONS):
        with pytest.raises(PlanError, match="reads hidden at"):
            edited(plan, s, i, op, op).validate()
    for s, i, where, _ in places(plan, lambda op: op.kind is OpKind.ADD):
        with pytest.raises(PlanError, match=f"{where} would lose residual"):
            edited(plan, s, i).validate()
    for s, i, _, _ in places(plan, lambda op: op.name in ("qkv_a_proj", "router", "embed")):
        with pytest.raises(PlanError, match="which no op has left"):
            edited(plan, s, i).validate()
    plan.validate()


# -- memory ----------------------------------------------------------------------------------------------------------


class Poisoner:
    """Fills every send buffer with NaN once its sum is taken, and finds the owner of memory that lives longer."""

    def __init__(self) -> None:
        self.shared: list[str] = []
        self.num_filled = 0

    def wrap(self, worker: Worker) -> Wrap:
        lent: dict[int, Tensor] = {}
        true_lend = worker.comm.send_buffer

        def lend(rows: int, width: int, dtype: torch.dtype) -> Tensor:
            buffer = true_lend(rows, width, dtype)
            lent[buffer.untyped_storage().data_ptr()] = buffer
            return buffer

        worker.comm.send_buffer = lend  # type: ignore[method-assign]

        def around(
            layer: int | None, op: Op, reads: tuple[int, ...], writes: tuple[int, ...], operation: Operation
        ) -> Operation:
            def watched(regs: Registers, frame: Frame) -> None:
                operation(regs, frame)
                if op.name in (*REDUCTIONS, ALL_REDUCE_NORM):
                    for buffer in lent.values():
                        whole = torch.empty(0, dtype=buffer.dtype).set_(buffer.untyped_storage())  # type: ignore[call-overload]
                        whole.fill_(float("nan"))
                        self.num_filled += 1
                for name, layout, register in zip(op.writes, op.writes_at, writes, strict=True):
                    if not layout.owes_sum and regs[register].untyped_storage().data_ptr() in lent:
                        self.shared.append(f"rank {worker.rank_context.rank}: {name} after {op.name} of layer {layer}")

            return watched

        return around


@pytest.mark.parametrize(("dp", "tp"), [(1, 2), (2, 2), (3, 1)])
@pytest.mark.parametrize("kind", ["v3", "llama"])
def test_nothing_that_lives_on_lies_in_a_send_buffer(tiny_model: TinyModel, kind: str, dp: int, tp: int) -> None:
    """After a plain norm the residual IS the hidden that came out of a sum; the next stage writes into that buffer."""
    resolved = resolve(config_for(tiny_model(kind), dp, tp, checked=True), WeightSharding())
    poisoner = Poisoner()
    with Engine(resolved) as clean, Engine(resolved, wrap=poisoner.wrap) as watched:
        for layout in applicable_layouts(resolved.config, resolved.mesh):
            ops = [op for _, op in plan_of(clean, prefill(dp), layout).ops()]
            plain = [op for op in ops if op.stage is not None and op.boundary == "input_norm"]
            assert any(not op.fused for op in plain), "the case that this is about"
            for _ in range(2):
                for want, got in zip(run(clean, prefill(dp), layout), run(watched, prefill(dp), layout), strict=True):
                    assert want.logits is not None and got.logits is not None
                    assert torch.equal(want.logits, got.logits), layout
    assert poisoner.shared == [] and poisoner.num_filled > 0


# -- addends that join -----------------------------------------------------------------------------------------------


class Zeroed:
    """A checkpoint some of whose tensors are 0."""

    def __init__(self, folder: Path, *endings: str) -> None:
        self._source, self._endings = SafetensorsFolder(folder), endings

    def take(self, weight: Weight, span: tuple[int, int] | None, expert: int | None = None) -> Tensor:
        tensor = self._source.take(weight, span, expert)
        return torch.zeros_like(tensor) if weight.name.endswith(self._endings) else tensor


@contextmanager
def recorded(
    engine_config: EngineConfig, sharding: WeightSharding, source: Zeroed
) -> Iterator[tuple[Engine, Recorder]]:
    recorder = Recorder(engine_config.dp * engine_config.tp)
    with Engine(resolve(engine_config, sharding), wrap=recorder.wrap, source=source) as engine:
        yield engine, recorder


def residuals(recorder: Recorder, batch: Batch, engine: Engine, spot: Spot) -> Tensor:
    """A residual, put together from all ranks; every copy of it is the same."""
    rows = RowSplit.from_groups(engine.resolved.mesh, batch.group_rows)
    first, *others = recorder.copies(rows, logit_split(rows, batch.logit_rows()))[spot]
    assert all(torch.equal(first.tensor, other.tensor) for other in others)
    return first.tensor


@pytest.mark.parametrize(("dp", "tp"), [(1, 2), (1, 4), (2, 2), (4, 2)])
@pytest.mark.parametrize("layout", ["all-reduce", "attn-tp-input-scattered"])
def test_a_residual_that_joins_is_counted_once(tiny_model: TinyModel, layout: str, dp: int, tp: int) -> None:
    """With attention and experts that add nothing, every residual is the embedding, to the bit."""
    folder = tiny_model("v3")
    source = Zeroed(folder, "o_proj.weight", "down_proj.weight")
    batch = prefill(dp)
    with recorded(config_for(folder, dp, tp), WeightSharding(), source) as (engine, recorder):
        plan = plan_of(engine, batch, layout)
        joins = [op.boundary for _, op in plan.ops() if op.joins]
        assert layout == "all-reduce" or joins.count("post_attn_norm") == 3, "the case that this is about"
        engine.run_plan(batch, plan)
        tokens = [token for group in batch.groups for chunk in group for token in chunk.tokens]
        name = "model.embed_tokens.weight"
        want = SafetensorsFolder(folder).take(Weight(name=name, shape=(67, 32)), None)[tokens]
        for layer in range(3):
            for stage in ("input_norm", "post_attn_norm"):
                assert torch.equal(residuals(recorder, batch, engine, Spot(layer, stage, "residual")), want)


@pytest.mark.parametrize(("dp", "tp"), [(1, 2), (2, 2), (4, 1)])
def test_a_replicated_shared_expert_is_counted_once(tiny_model: TinyModel, dp: int, tp: int) -> None:
    """Attention and routed experts add nothing: a MoE layer adds only its shared expert, as on one rank."""
    folder = tiny_model("v3")
    source = Zeroed(folder, "o_proj.weight", "experts.{expert}.down_proj.weight")
    batch = prefill(dp)
    merged = Batch(groups=(tuple(replace(c, pages=(1 + c.request,)) for group in batch.groups for c in group),))
    spot = Spot(2, "input_norm", "residual")
    with recorded(config_for(folder, 1, 1), WeightSharding(), source) as (engine, recorder):
        run(engine, merged, "auto")
        want = residuals(recorder, merged, engine, spot)
        before = residuals(recorder, merged, engine, Spot(1, "post_attn_norm", "residual"))
    assert (want - before).abs().max() > 0.1, "the shared expert is meant to add something"
    with recorded(config_for(folder, dp, tp), WeightSharding(shared_expert="replicated"), source) as (engine, recorder):
        plan = plan_of(engine, batch, "auto")
        assert [op.name for _, op in plan.ops()].count("add_shared") == 2
        engine.run_plan(batch, plan)
        torch.testing.assert_close(residuals(recorder, batch, engine, spot), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("dp", "tp"), [(1, 3), (1, 4), (2, 2), (3, 1)])
@pytest.mark.parametrize("layout", ["all-reduce", "sequence-parallel", "auto"])
def test_biases_of_sharded_outputs_are_counted_once(tiny_model: TinyModel, layout: str, dp: int, tp: int) -> None:
    """With weights of 0 a layer adds its output biases and nothing else, to the bit."""
    folder = tiny_model("llama-9")
    source = Zeroed(folder, "o_proj.weight", "down_proj.weight")
    batch = prefill(dp)
    with recorded(config_for(folder, dp, tp), WeightSharding(), source) as (engine, recorder):
        run(engine, batch, layout)
        held = residuals(recorder, batch, engine, Spot(0, "input_norm", "residual"))
        for layer in range(2):
            for name, spot in (
                ("self_attn.o_proj.bias", Spot(layer, "post_attn_norm", "residual")),
                ("mlp.down_proj.bias", Spot(layer + 1, "input_norm", "residual")),
            ):
                bias = SafetensorsFolder(folder).take(Weight(name=f"model.layers.{layer}.{name}", shape=(32,)), None)
                assert bias.abs().max() > 0
                held = bias + held
                torch.testing.assert_close(residuals(recorder, batch, engine, spot), held, atol=1e-6, rtol=0)


# -- a rank that fails -----------------------------------------------------------------------------------------------


def failing(times: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Raises at the ``times``-th call."""

    def around(method: Callable[..., Any]) -> Callable[..., Any]:
        calls = []

        def call(*args: Any, **options: Any) -> Any:
            calls.append(None)
            if len(calls) >= times:
                raise ArithmeticError("a stage broke")
            return method(*args, **options)

        return call

    return around


@pytest.mark.parametrize("stage", ["attention", "router", "input_norm"])
def test_an_error_inside_a_step_ends_all_ranks_with_that_error(tiny_model: TinyModel, stage: str) -> None:
    wrap = patched(2, 1, stage, failing(2))
    with Engine(resolve(config_for(tiny_model("v3"), 2, 2), WeightSharding()), wrap=wrap) as engine:
        assert len(run(engine, prefill(2), "auto")) == 4
        futures = [engine.submit(prefill(2)) for _ in range(3)]
        errors = [future.exception(PATIENCE_S) for future in futures]
        later = engine.submit(prefill(2)).exception(PATIENCE_S)
        assert isinstance(errors[0], ArithmeticError) and str(errors[0]) == "a stage broke"
        assert errors[1] is errors[0] and errors[2] is errors[0] and later is errors[0]
        assert "raised on rank 2" in "".join(errors[0].__notes__)
    assert rank_threads() == []


def test_generation_ends_with_the_error_of_the_rank_that_failed(tiny_model: TinyModel) -> None:
    wrap = patched(1, 0, "mlp", failing(3))
    with Engine(resolve(config_for(tiny_model("llama"), 1, 2)), wrap=wrap) as engine:
        request = engine.add((1, 2, 3), 10)
        with pytest.raises(ArithmeticError, match="a stage broke"):
            for _ in engine.run():
                pass
        assert len(request.output) == 2
        engine.add((1, 2, 3), 10)
        with pytest.raises(ArithmeticError, match="a stage broke"):
            list(engine.run())
    assert rank_threads() == []


def test_a_rank_that_cannot_load_ends_the_others_and_leaves_no_thread(tiny_model: TinyModel) -> None:
    class Incomplete(Zeroed):
        def take(self, weight: Weight, span: tuple[int, int] | None, expert: int | None = None) -> Tensor:
            if threading.current_thread().name == "narrows rank 1" and "layers.2" in weight.name:
                raise CheckpointError(f"tensor {weight.name} is missing")
            return super().take(weight, span, expert)

    folder = tiny_model("v3")
    with pytest.raises(CheckpointError, match=r"tensor model\.layers\.2\..* is missing"):
        Engine(resolve(config_for(folder, 2, 2)), source=Incomplete(folder))
    assert rank_threads() == []


def test_a_batch_of_the_wrong_number_of_groups_is_an_error_and_not_a_hang(tiny_model: TinyModel) -> None:
    with Engine(resolve(config_for(tiny_model("v3"), 2, 2))) as engine:
        plan = plan_of(engine, prefill(2), "auto")
        with pytest.raises(ValueError, match="2 attention groups, but rows are given for 1"):
            engine.run_plan(prefill(1), plan)


# -- plans and programs ----------------------------------------------------------------------------------------------


def test_plans_that_do_the_same_share_one_program_and_serve_any_row_count(tiny_model: TinyModel) -> None:
    workers: list[Worker] = []
    bound: list[tuple[int | None, str]] = []

    def wrap(worker: Worker) -> Wrap:
        workers.append(worker)

        def around(
            layer: int | None, op: Op, reads: Sequence[int], writes: Sequence[int], operation: Operation
        ) -> Operation:
            if worker.rank_context.rank == 0:
                bound.append((layer, op.name))
            return operation

        return around

    config = read_config(tiny_model("llama"))
    with Engine(resolve(config_for(tiny_model("llama"), 1, 2, layout="all-reduce")), wrap=wrap) as engine:
        for rows in (1, 7, 3, 16):
            assert len(run(engine, prefill(1, rows), "all-reduce")[0].ids) == rows
    assert len(workers) == 2 and bound.count((None, "embed")) == 1
    assert bound.count((config.num_hidden_layers - 1, "mlp")) == 1
