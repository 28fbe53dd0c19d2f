"""Measures a machine's prices: steps of plans as ranks run them, and collectives alone; gives the tables of a profile.

Prints and writes nothing. Stages and collectives are timed where they run, in a plan: with cold caches, and with the
waits that there are between ranks. Everything is gone through in rounds, so that a slow while of the machine falls on
all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product, zip_longest
from time import perf_counter
from typing import Any

from narrows.arch.config import ModelConfig
from narrows.arch.presets import load_model_config
from narrows.arch.weight_sharding import WeightSharding, check_mesh, sharding_choices
from narrows.calibrate.price_tables import OPS, Among, Calibration, Tables
from narrows.calibrate.probe import Probe
from narrows.calibrate.rates import Calibrator
from narrows.calibrate.statistics import quantile
from narrows.calibrate.step_work import StepWork, attributed_op_times, fill_caches, run_steps, step_title
from narrows.engine.config import EngineConfig, Resolved, resolve
from narrows.engine.core import Engine
from narrows.errors import ConfigError
from narrows.instruments.op_seconds import OpSeconds
from narrows.layout import Algorithm, Mesh
from narrows.plan.named import applicable_layouts, shared_plans
from narrows.plan.plan import Plan
from narrows.sched.batch import Batch
from narrows.sched.pages import num_pages_for
from narrows.weights.pooled import PooledWeights

__all__ = ["Grid", "calibrate", "figures_of", "meshes_of"]

_LAYERS = 3
"""Of the kind that a model has most of, beside one of each other kind: more than caches hold."""
_MOST_STEPS, _LONG_S = 12, 0.2
"""Of one plan in a row; a step that is so long is run once."""
_PACE = 4.0
"""How many times its price before anything is measured a step is taken to take, until a longer one was run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """What is measured: rows of prefill steps, rows and contexts of decode steps, bytes of collectives alone."""

    rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
    prompt: int = 256
    """Of prompts of this length steps of ``prompt_rows`` rows are measured, beside those of one prompt."""
    prompt_rows: tuple[int, ...] = (512, 4096)
    decode_rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    decode_context: int = 64
    long_context: int = 512
    long_rows: tuple[int, ...] = (1, 8, 64, 128)
    """Decode steps of sequences of ``long_context`` tokens."""
    nbytes: tuple[int, ...] = tuple(1 << power for power in range(9, 26, 2))
    seconds_per_cell: float = 0.04
    """In every round, for the steps of one plan over one number of rows. There are rounds until the time is over."""
    most_rounds: int = 40


Progress = Callable[[str, float], None]
"""What is being measured, and the share of the work that is done."""


def meshes_of(num_ranks: int) -> tuple[Mesh, ...]:
    """Every mesh of dp x tp ranks, that of one attention group first."""
    return tuple(Mesh.of(dp=n, tp=num_ranks // n) for n in range(1, num_ranks + 1) if num_ranks % n == 0)


def calibrate(
    models: Sequence[str],
    engine_config: EngineConfig,
    *,
    num_ranks: int,
    grid: Grid,
    seconds: float,
    progress: Progress = lambda what, share: None,
) -> Calibration:
    """Measure ``num_ranks`` ranks of this machine on plans of ``models`` with random weights.

    ``engine_config``: what ranks are, their threads, dtype and quantization. ``seconds``: what it should take at most;
    when they are nearly over the largest steps are left out, and named.

    Raises:
        ConfigError: models that do not exist, or that cannot be split over so many ranks.
    """
    begin = perf_counter()
    configs = {model: load_model_config(model) for model in models}
    jobs = [(mesh, model) for mesh in meshes_of(num_ranks) for model in models if _can_be(configs[model], mesh)]
    if not jobs:
        raise ConfigError(
            f"{' and '.join(models)} cannot be split over {num_ranks} ranks; name another model, or fewer --num-ranks"
        )
    tables = Tables(1 if engine_config.launch is None else engine_config.launch.num_nodes)
    until, seen = begin, set[Mesh]()
    meshes = [mesh for mesh, _ in jobs]
    shares = [4 if not i else 1 if mesh in meshes[:i] else 2 for i, mesh in enumerate(meshes)]
    for (mesh, model), share in zip(jobs, shares, strict=True):
        until += seconds * share / sum(shares)
        is_first, is_new = not seen, mesh not in seen
        seen.add(mesh)

        def say(what: str) -> None:
            progress(what, min((perf_counter() - begin) / seconds, 1.0))

        _measure(tables, engine_config, mesh, model, grid, until=until, is_new=is_new, is_first=is_first, say=say)
    return tables.calibration(perf_counter() - begin)


def _can_be(config: ModelConfig, mesh: Mesh) -> bool:
    try:
        check_mesh(config, mesh)
    except ConfigError:
        return False
    return True


def _measure(
    tables: Tables,
    engine_config: EngineConfig,
    mesh: Mesh,
    model: str,
    grid: Grid,
    *,
    until: float,
    is_new: bool,
    is_first: bool,
    say: Callable[[str], None],
) -> None:
    """One model on one mesh: its plans with the published weight sharding. On the first model of
    that mesh collectives alone are measured too; of the others two layouts give the costs of their stages. The very
    first is also run with the sharding that differs in every part. Attention has one sharding only; other stages cost
    the same on all meshes of one size."""
    engine_config = replace(engine_config, model=model, dp=mesh.sizes[0], tp=mesh.sizes[-1], load_format="dummy")
    if is_new:
        with Calibrator(resolve(engine_config, WeightSharding())) as alone:
            say(f"{mesh}: collectives alone")
            _measure_alone(tables, alone, mesh, grid)
    config = load_model_config(model)
    named = [name for name in applicable_layouts(config, mesh) if name != "auto"]
    published, other = sharding_choices(config, mesh)[0], sharding_choices(config, mesh)[-1]
    todo = [(published, [*named, "auto"] if is_new else [named[0], named[-1]])]
    if is_first and other != published:
        todo.append((other, ["auto"]))
    for turn, (sharding, layouts) in enumerate(todo):
        left = until - perf_counter()
        deadline = until if turn == len(todo) - 1 else until - 0.25 * left
        resolved = _small(resolve(engine_config, sharding), grid)
        tables.dtype = resolved.deployment.dtype
        with Engine(resolved, source=PooledWeights(resolved.dtype)) as engine:
            _measure_plans(tables, engine, list(dict.fromkeys(layouts)), grid, deadline=deadline, say=say)


def _measure_alone(tables: Tables, alone: Calibrator, mesh: Mesh, grid: Grid) -> None:
    dtype = alone.resolved.dtype
    for _ in range(3):
        for axes in _axes(mesh):
            topology, ways = tables.topology(mesh), [Algorithm.FLAT]
            ways += [Algorithm.HIERARCHICAL] * topology.has_two_levels(mesh.groups(*axes))
            for op, way in product(OPS.values(), ways):
                among = Among.of(op, mesh, axes, topology, way)
                for nbytes in grid.nbytes:
                    repeats = min(max((1 << 20) // nbytes, 1), 25)
                    levels = way is Algorithm.HIERARCHICAL
                    seconds = alone.ask(Probe.exchange, op, axes, nbytes, dtype, repeats, levels)
                    tables.alone.setdefault(among, {}).setdefault(nbytes, []).append(seconds)
        for nbytes in grid.nbytes:
            seconds = alone.ask(Probe.add, nbytes, min(max((1 << 20) // nbytes, 2), 25))
            tables.copies.setdefault(nbytes, []).append(seconds)
        rates = alone.measure()
        tables.rates.append((rates["read_bytes_per_s"] / mesh.size, rates["gemm_flop_per_s"] / mesh.size))


def _measure_plans(
    tables: Tables,
    engine: Engine,
    layouts: Sequence[str],
    grid: Grid,
    *,
    deadline: float,
    say: Callable[[str], None],
) -> None:
    fill_caches(engine)
    engine.instrument(OpSeconds)
    where = f"{engine.resolved.config.name} on {engine.resolved.mesh}"
    todo = [_Cell(engine, work, layouts) for work in _cells(grid)]
    pace = _PACE
    for turn in range(grid.most_rounds):
        for cell in todo:
            for plan in cell.plans(turn, pace):
                if perf_counter() + cell.takes(pace) > deadline and (turn or cell.work.rows > 64):
                    if not cell.step_s:
                        tables.left_out[f"{where}: {step_title(cell.work)}"] = None
                    continue
                say(f"{where}, {plan.layout_name}: {step_title(cell.work)}")
                cell.step_s = _time(tables, engine, cell.batch, plan, seconds=grid.seconds_per_cell if turn else 0.0)
            if cell.step_s > _LONG_S / 4:
                pace = cell.step_s / cell.price_s
        if perf_counter() >= deadline:
            return


class _Cell:
    """A step of the grid, its plans, and how long one takes, as soon as that is known."""

    def __init__(self, engine: Engine, work: StepWork, layouts: Sequence[str]) -> None:
        self.work, self.batch, self.step_s = work, work.batch_for(engine), 0.0
        plans = shared_plans({layout: work.plan(engine, layout, self.batch) for layout in layouts})
        self._plans = list(plans.values())

    @property
    def price_s(self) -> float:
        """By the prices that there were before anything was measured."""
        return self._plans[0].seconds

    def plans(self, turn: int, pace: float) -> list[Plan]:
        """Those to measure in a round: all, but of a long step one, another each round."""
        if self._step(pace) > _LONG_S:
            return [self._plans[turn % len(self._plans)]]
        return self._plans

    def takes(self, pace: float) -> float:
        """Seconds to measure one plan once; ``pace``: seconds of a step over its price, where this one was not run."""
        step = self._step(pace)
        return step if step > _LONG_S else 4 * step

    def _step(self, pace: float) -> float:
        return self.step_s or pace * self.price_s


def _cells(grid: Grid) -> list[StepWork]:
    """All steps of the grid, in an order in which one may stop: what lies between others comes after them."""
    columns = (
        ("prefill", 0, grid.rows),
        ("decode", grid.decode_context, grid.decode_rows),
        ("decode", grid.long_context, grid.long_rows),
        ("prefill", grid.prompt, grid.prompt_rows),
    )
    ordered = [
        [StepWork(phase=phase, rows=n, context=context) for n in _ends_first(rows)] for phase, context, rows in columns
    ]
    return [cell for one_each in zip_longest(*ordered) for cell in one_each if cell is not None]


def _ends_first(rows: Sequence[int]) -> list[int]:
    """The first and the last, then what is in the middle of those, and so on.

    >>> _ends_first((1, 2, 3, 4, 5)), _ends_first((7,)), _ends_first(())
    ([1, 5, 3, 2, 4], [7], [])
    """
    out = list(dict.fromkeys((rows[0], rows[-1]))) if rows else []
    spans = [(0, len(rows) - 1)]
    while spans:
        first, last = spans.pop(0)
        if last - first > 1:
            middle = (first + last) // 2
            out.append(rows[middle])
            spans += [(first, middle), (middle, last)]
    return out


def _time(tables: Tables, engine: Engine, batch: Batch, plan: Plan, *, seconds: float) -> float:
    """Run the step for ``seconds``, one handed out ahead as an engine does, and add up what each of its steps took; how
    long one was.

    Of a long step one run is enough; of a short one the first three do not count: they meet cold code, and one is
    recorded.
    """
    engine.readings()
    times, drop = run_steps(engine, batch, plan, 1), 0
    if times[1] - times[0] < _LONG_S:
        times, drop = run_steps(engine, batch, plan, 2), 2
    if some := min(int(seconds / (times[-1] - times[-2])), _MOST_STEPS):
        times, drop = run_steps(engine, batch, plan, some + 1), 4
    executions = attributed_op_times(engine, plan)[drop:]
    for execution in executions:
        tables.add_execution(plan, execution)
    whole = quantile([end - start for start, end in pairwise(times)][min(drop, 1) :], 0.5)
    executed = quantile([sum(execution) for execution in executions], 0.5)
    table = tables.steps.setdefault(plan.shape.phase, {})
    table.setdefault(plan.shape.rows.total, []).append(max(whole - executed, 1e-6))
    return whole


def _axes(mesh: Mesh) -> tuple[tuple[int, int], ...]:
    """(first, last) of every run of axes along which more than one rank lies, each group of ranks once."""
    found: dict[tuple[int, ...], tuple[int, int]] = {}
    for first in range(mesh.num_axes):
        for last in range(first + 1, mesh.num_axes + 1):
            ranks = mesh.group(0, first, last)
            if len(ranks) > 1:
                found.setdefault(ranks, (first, last))
    return tuple(found.values())


def _small(resolved: Resolved, grid: Grid) -> Resolved:
    """``resolved`` with few layers, and room for every step of the grid."""
    config = resolved.config
    kinds = {config.is_moe_layer(layer) for layer in range(config.num_hidden_layers)}
    moe, dense = config.moe if True in kinds else None, len(kinds) - 1
    if moe is not None:
        moe = replace(
            moe, first_k_dense_replace=dense, moe_layer_freq=1, decoder_sparse_step=1, mlp_only_layers=frozenset()
        )
    longest = max(*grid.rows, grid.long_context) + 1
    config = replace(
        config,
        num_hidden_layers=min(_LAYERS + dense, config.num_hidden_layers),
        max_position_embeddings=max(longest, config.max_position_embeddings),
        moe=moe,
    )
    page = resolved.limits.page_size
    limits = replace(
        resolved.limits,
        max_context=longest,
        rows_per_step=max(*grid.rows, *grid.decode_rows),
        pages_per_group=max(num_pages_for(longest, page) + len(grid.prompt_rows) + 1, _pages(grid, page)),
    )
    deployment = replace(resolved.deployment, config=config)
    return replace(resolved, config=config, limits=limits, deployment=deployment)


def _pages(grid: Grid, page: int) -> int:
    """Pages of the largest decode step, and the null page."""
    short = max(grid.decode_rows) * num_pages_for(grid.decode_context, page)
    return 1 + max(short, max(grid.long_rows) * num_pages_for(grid.long_context, page))


def figures_of(found: Calibration, *, num_ranks: int, memory_bytes: float, dtype: str) -> dict[str, Any]:
    """Fields of a device from the rates: they price works that no table has. ``dtype``: ``bf16`` or ``fp32``, of the
    products by which the rate was measured."""
    smallest = min(row[1] for stage in found.measured.stages for row in stage.points) / 1e6
    return {
        f"tflops_{dtype}": round(found.flop_per_s / 1e12, 4),
        "hbm_bytes_per_s": round(found.read_bytes_per_s),
        "memory_bytes": round(memory_bytes / num_ranks),
        "launch_s": round(smallest, 8),
        "gemm_launch_s": round(smallest, 8),
    }
