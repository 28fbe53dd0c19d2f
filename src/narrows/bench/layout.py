"""Measures every layout over a grid of row counts, for its price to be held against."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

from narrows.arch.config import ModelConfig
from narrows.arch.positions import most_positions
from narrows.arch.weight_sharding import WeightSharding
from narrows.bench.grid import Cell, Grid, PlanTimes, grid_of
from narrows.bench.interleave import interleave
from narrows.calibrate.machine import available_memory
from narrows.calibrate.rates import Calibrator, rates
from narrows.calibrate.statistics import Spread, quantile
from narrows.calibrate.step_work import IN_FLIGHT, StepWork, attributed_op_times, fill_caches, run_steps, step_title
from narrows.cost.memory import kv_token_bytes
from narrows.engine.config import EngineConfig, Resolved, resolve
from narrows.engine.core import Engine
from narrows.errors import ConfigError
from narrows.instruments.op_seconds import OpSeconds
from narrows.plan.named import shared_plans
from narrows.plan.plan import Plan
from narrows.plan.planner import Deployment

__all__ = ["LayoutWork", "layout"]

_TURN_S, _MOST_STEPS, _LONG_S = 0.03, 8, 0.2
"""A turn is as many steps in a row as take this long, after one that wakes the ranks, unless steps are long. Turns are
short, so that what slows the machine for a while meets all plans."""
_CLOCKED_SHARE = 0.4
"""Of the seconds of a cell, what is for its rounds with clocks around ops, which need no median within 3 %."""
_CLOCKED_ROUNDS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutWork:
    """A step of each of ``rows`` in each of ``phases``: sequences of ``context`` tokens in decode, whole prompts of
    ``prompt_length`` in prefill (0: one per group)."""

    rows: tuple[int, ...]
    phases: tuple[str, ...]
    context: int
    prompt_length: int = 0
    seed: int = 0

    def steps(self) -> tuple[StepWork, ...]:
        lengths = {"decode": self.context, "prefill": self.prompt_length}
        return tuple(
            StepWork(rows=rows, phase=phase, context=lengths[phase], seed=self.seed)
            for phase in self.phases
            for rows in self.rows
        )

    def limits(self, engine_config: EngineConfig, steps: Sequence[StepWork]) -> EngineConfig:
        """``engine_config`` with room for the largest of ``steps``."""
        each = [step.limits(engine_config) for step in steps]
        return replace(
            engine_config,
            max_context=max(2, self._longest()),
            kv_tokens=max(one.kv_tokens or 0 for one in each),
            rows_per_step=max(one.rows_per_step for one in each),
        )

    def check(self, config: ModelConfig) -> None:
        """Refuse what no step can be.

        Raises:
            ConfigError: no rows, a context without room for a token before the row, or more than the model's positions.
        """
        if min(self.rows, default=0) < 1:
            raise ConfigError("--rows: whole numbers above 0 with commas between are needed; for example 1,8,64,512")
        if "decode" in self.phases and self.context < 2:
            raise ConfigError(f"a decode step needs --context of 2 or more, not {self.context}")
        longest, most = self._longest(), most_positions(config)
        if longest > most:
            raise ConfigError(
                f"sequences of {longest} tokens are longer than the {most} positions of {config.name}: lower "
                "--context, or give --prompt-length, so that the rows of a prefill step are several prompts"
            )

    def _longest(self) -> int:
        return max(step.length(step.rows) for step in self.steps())


def layout(
    engine_config: EngineConfig,
    work: LayoutWork,
    layouts: Sequence[str],
    *,
    rounds: int,
    seconds: float,
    warmup: int = 1,
    progress: Callable[[str], None] = lambda line: None,
) -> Grid:
    """Measure ``layouts``, `auto` among them, at every step of ``work``, in one engine with the published sharding.

    ``rounds`` at least, and as many more as fit into ``seconds`` per cell.
    """
    cells = []
    engine_config = replace(engine_config, layout="auto", prefix_cache=False)
    steps, left_out = _that_fit(work.steps(), resolve(engine_config))
    with (
        Calibrator(resolve(engine_config)) as calibrator,
        Engine(resolve(work.limits(engine_config, steps), WeightSharding())) as engine,
    ):
        allowed = [calibrator.measure()]
        if any(step.phase == "decode" for step in steps):
            fill_caches(engine)
        for step in steps:
            cell = _Cell(engine, step, layouts)
            progress(f"{step_title(step)}: {len(cell.plans)} plans of {len(layouts)} layouts")
            cells.append(cell.measure(rounds, seconds, max(warmup, 1)))
            allowed.append(calibrator.measure())
        deployment = engine.resolved.deployment
    calibration = rates(allowed)
    return grid_of(
        cells,
        calibration=calibration,
        notes=(
            *left_out,
            f"whole step: from a batch handed to the ranks to its tokens, {IN_FLIGHT} steps in flight as in service, "
            "no clock around the steps of the plan; the classes come from separate rounds, with clocks",
            f"predicted for the device {deployment.device.name} in {deployment.dtype}",
            *_pace(deployment, calibration),
            "regret: what auto's plan costs more than the fastest measured one; layouts with equal plans are one",
        ),
    )


def _pace(deployment: Deployment, calibration: Mapping[str, Spread]) -> list[str]:
    """How fast the machine was beside how fast it was when it was calibrated, in words; nothing if it was not."""
    device, num_ranks = deployment.device, deployment.mesh.size
    if device.measured is None:
        return []
    peak = device.flops_per_s("fp32" if deployment.dtype == "fp32" else "bf16")
    products = calibration["gemm_flop_per_s"].median / num_ranks / peak
    reads = calibration["read_bytes_per_s"].median / num_ranks / device.hbm_bytes_per_s
    return [
        f"pace: products at {products:.0%} and reads at {reads:.0%} of the profile's rates (medians, before the first "
        "cell and after each); prices are of the pace at which they were measured"
    ]


def _that_fit(steps: Sequence[StepWork], resolved: Resolved) -> tuple[list[StepWork], list[str]]:
    """The steps whose caches fit into half of this host's free memory, and a note on each other one.

    Raises:
        ConfigError: none fits.
    """
    available = available_memory()
    if resolved.engine_config.run_on != "cpu" or available is None:
        return list(steps), []
    mesh = resolved.mesh
    token = mesh.size * kv_token_bytes(resolved.config, mesh, resolved.dtype.itemsize)
    needed = [token * (step.limits(resolved.engine_config).kv_tokens or 0) for step in steps]
    fit = [step for step, nbytes in zip(steps, needed, strict=True) if nbytes <= available / 2]
    notes = [
        f"left out: {step_title(step)}, whose cache of {nbytes / 1e9:.1f} GB on {mesh.size} rank(s) is more than half "
        f"of the {available / 1e9:.1f} GB that are free"
        for step, nbytes in zip(steps, needed, strict=True)
        if nbytes > available / 2
    ]
    if not fit:
        raise ConfigError(f"{notes[0]}; lower --rows or --context")
    return fit, notes


class _Cell:
    """One step of the grid, about to be measured."""

    def __init__(self, engine: Engine, step: StepWork, layouts: Sequence[str]) -> None:
        self.engine, self.step = engine, step
        self.batch = step.batch_for(engine)
        self.plans = shared_plans({name: step.plan(engine, name, self.batch) for name in layouts})

    def measure(self, rounds: int, seconds: float, warmup: int) -> Cell:
        self.engine.instrument(None)
        turn = self._steps_per_turn()
        warmup = warmup if turn[0] else 0  # the first of a long step is warm-up enough: what is new takes milliseconds
        ways = {names: partial(self._turn, plan, *turn) for names, plan in self.plans.items()}
        whole = interleave(ways, rounds=rounds, warmup=warmup, seconds=(1 - _CLOCKED_SHARE) * seconds)
        self.engine.instrument(OpSeconds)
        clocked = interleave(
            {names: partial(self._clocked, plan, *turn) for names, plan in self.plans.items()},
            rounds=min(rounds, _CLOCKED_ROUNDS),
            warmup=warmup,
            seconds=_CLOCKED_SHARE * seconds,
        )
        self.engine.instrument(None)
        return Cell(
            title=step_title(self.step),
            phase=self.step.phase,
            rows=self.step.rows,
            context=self.step.length(max(self.batch.group_rows)),
            plans=tuple(
                PlanTimes(
                    layouts=names,
                    plan=plan,
                    step_s=tuple(whole[names]),
                    clocked_s=tuple(clocked[names]),
                )
                for names, plan in self.plans.items()
            ),
        )

    def _steps_per_turn(self) -> tuple[int, int]:
        """Steps that are not timed, and that are. The first of a plan, which binds it, counts only if it is long."""
        fastest = min(self._turn(plan, 0, 1) for plan in self.plans.values())
        if fastest >= _LONG_S:
            return 0, 1
        fastest = min(self._turn(plan, 0, 1) for plan in self.plans.values())
        return 1, max(1, min(_MOST_STEPS, round(_TURN_S / fastest)))

    def _turn(self, plan: Plan, untimed: int, count: int) -> float:
        """The median of ``count`` steps in a row after the untimed ones."""
        ends = run_steps(self.engine, self.batch, plan, untimed + count)
        seconds = [end - start for start, end in pairwise(ends)]
        return quantile(seconds[-count:], 0.5)

    def _clocked(self, plan: Plan, untimed: int, count: int) -> tuple[float, ...]:
        """Seconds that every op of a run cost, the mean over the runs of a turn."""
        run_steps(self.engine, self.batch, plan, untimed + count)
        executions = attributed_op_times(self.engine, plan)[-count:]
        return tuple(sum(of_op) / len(executions) for of_op in zip(*executions, strict=True))
