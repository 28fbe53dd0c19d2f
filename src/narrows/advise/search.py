"""Simulates a load on every way that an engine has, and on narrows' own layouts under the same engine's host."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from narrows.advise.command import ServerLimits
from narrows.advise.ways import Way
from narrows.arch.config import ModelConfig
from narrows.arch.weight_sharding import WeightSharding, sharding_words
from narrows.cost.devices import Device
from narrows.cost.engines import EngineStyle
from narrows.cost.network import Network
from narrows.layout import Mesh, Topology
from narrows.plan.deploy import priced_context
from narrows.plan.plan import Plan
from narrows.plan.planner import EXPERTS, Deployment, Planner
from narrows.sched.batch import Batch
from narrows.sim.costs import CostsByPhase, PlannedCosts, StepCost
from narrows.sim.engine import simulate
from narrows.sim.intake import Intake
from narrows.sim.search import Candidate, Target, meshes, ranked
from narrows.sim.serving import DoesNotFit, serving
from narrows.workload.arrivals import Ask

__all__ = ["Advice", "Setting", "Trial", "TrialSpec", "advise"]

_AUTO = {"prefill": "auto", "decode": "auto"}

TrialSpec = Way | tuple[Mesh, str]
"""What is simulated: a way of the engine, or `auto` on a mesh with experts held as given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What all trials share: the model, what it runs on, the load, and the target latencies."""

    config: ModelConfig
    device: Device
    dtype: str
    engine: EngineStyle
    limits: ServerLimits
    asks: Sequence[Ask]
    target: Target
    concurrency: int = 0
    sampled: bool = False
    expert_skew: float = 0.0
    nodes: Topology | None = None
    between: Network | None = None

    def deployment(self, mesh: Mesh, experts: str) -> Deployment:
        """The model on ``mesh``, with experts held as given."""
        return Deployment(
            config=self.config,
            mesh=mesh,
            device=self.device,
            dtype=self.dtype,
            expert_skew=self.expert_skew,
            kv_dtype=self.limits.kv_dtype,
            engine=self.engine,
            experts=experts,
            nodes=self.nodes,
            between=self.between,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One way that was simulated; ``way`` is None where narrows' own layouts were free.

    ``longest``: by phase, the plan of the plan cache that took most of the time, and its seconds.
    """

    candidate: Candidate
    layouts: Mapping[str, str]
    experts: str = ""
    way: Way | None = None
    sharding: WeightSharding | None = None
    longest: Mapping[str, tuple[Plan, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """The engine's ways, the best first, and narrows' own deployments, the best first."""

    trials: tuple[Trial, ...]
    own: tuple[Trial, ...]

    @property
    def best(self) -> Trial | None:
        """The engine's best; None if nothing that it can do fits."""
        first = self.trials[0]
        return first if first.candidate.outcome is not None else None


def advise(
    setting: Setting,
    found: Sequence[Way],
    num_ranks: int,
    each: Callable[[Sequence[TrialSpec]], Iterable[TrialSpec]] = iter,
) -> Advice:
    """Simulate ``found``, and `auto` on every mesh of ``num_ranks``. ``each``: wraps what is gone through, to show
    progress."""
    specs: list[TrialSpec] = [*found, *_free(setting.config, num_ranks)]
    trials: list[Trial] = []
    own: list[Trial] = []
    for what in each(specs):
        if isinstance(what, Way):
            trials.append(_of_way(setting, what))
        else:
            own.append(_trial(setting, what[0], _AUTO, what[1], _titled("auto", what[1])))
    return Advice(trials=_ranked(trials, setting.target), own=_ranked(own, setting.target))


def _ranked(trials: Sequence[Trial], target: Target) -> tuple[Trial, ...]:
    by_candidate = {id(trial.candidate): trial for trial in trials}
    return tuple(by_candidate[id(each)] for each in ranked([trial.candidate for trial in trials], target))


def _free(config: ModelConfig, num_ranks: int) -> Iterator[tuple[Mesh, str]]:
    """Every mesh, with each way to hold experts."""
    for mesh in meshes(config, num_ranks):
        if config.moe is None:
            yield mesh, ""
        else:
            yield from ((mesh, held) for held in EXPERTS if held == "split" or mesh.size <= config.moe.n_routed_experts)


def _titled(title: str, experts: str) -> str:
    return f"{title}, experts {experts}" if experts else title


def _of_way(setting: Setting, way: Way) -> Trial:
    title = _titled(way.title, way.experts)
    if way.refusal:
        refused = Candidate(
            mesh=way.mesh,
            layout=title,
            dtype=setting.dtype,
            refusal=f"not by it: {way.refusal}",
        )
        return Trial(candidate=refused, layouts=way.layouts, experts=way.experts, way=way)
    return replace(_trial(setting, way.mesh, way.layouts, way.experts, title), way=way)


def _trial(setting: Setting, mesh: Mesh, layouts: Mapping[str, str], experts: str, title: str) -> Trial:
    limits = setting.limits
    deployment = setting.deployment(mesh, experts)
    try:
        found = serving(
            deployment,
            layouts["prefill"],
            rows_per_step=limits.rows_per_step(mesh),
            max_context=limits.max_context,
            requests_per_group=limits.requests_per_group,
            prefix_cache=limits.prefix_cache,
        )
    except DoesNotFit as error:
        refused = Candidate(mesh=mesh, layout=title, dtype=setting.dtype, refusal=str(error))
        return Trial(candidate=refused, layouts=layouts, experts=experts)
    planner = Planner(replace(deployment, want_logits=setting.sampled), found.sharding)
    context = priced_context(limits.max_context)
    by_name = {name: PlannedCosts(planner, name, context) for name in dict.fromkeys(layouts.values())}
    taken: dict[tuple[str, int], tuple[Plan, float]] = {}

    def watch(batch: Batch, cost: StepCost) -> None:
        assert cost.plan is not None
        key = batch.phase, id(cost.plan)
        taken[key] = cost.plan, taken.get(key, (cost.plan, 0.0))[1] + cost.seconds

    outcome = simulate(
        found.limits,
        CostsByPhase({phase: by_name[name] for phase, name in layouts.items()}),
        setting.asks,
        concurrency=setting.concurrency,
        intake=Intake(arrival_s=setting.engine.arrival_s),
        watch=watch,
    )
    longest = {
        phase: max((found for (of, _), found in taken.items() if of == phase), key=lambda found: found[1])
        for phase in dict.fromkeys(of for of, _ in taken)
    }
    return Trial(
        candidate=Candidate(
            mesh=mesh,
            layout=title,
            dtype=setting.dtype,
            outcome=outcome,
            sharding=sharding_words(setting.config, found.sharding),
            kv_tokens=found.limits.tokens_per_group,
            memory=found.memory,
        ),
        layouts=layouts,
        experts=experts,
        sharding=found.sharding,
        longest=longest,
    )
