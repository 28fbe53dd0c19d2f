"""What an engine's layout costs against the cheapest plan of the same step, and which freedom it lacks.

One freedom after the other is taken from the cheapest plan: the rows at which the norm before attention, the norm
before the experts or the router run, with the collectives before them; the rows of the last layer; collectives done
in hosts and between them; how weights are held. What the plan then costs more is what that freedom is worth there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from narrows.advise.search import Setting, Trial
from narrows.arch.stages import Role
from narrows.arch.weight_sharding import sharding_words
from narrows.cost.pricer import StepShape
from narrows.plan.named import AUTO, NamedLayout, named_layout
from narrows.plan.plan import Plan
from narrows.plan.planner import Planner
from narrows.plan.report.explain import into_words, layout_words, main_segment, why

__all__ = ["Missing", "StepCosting", "missing"]

_LEAST = 0.002
"""Of a step: what is worth less is not listed."""
_FEATURES: Mapping[str, tuple[Role, ...]] = {
    "input of attention": (Role.ATTENTION_NORM, Role.LATENT_PROJ, Role.LATENT_NORM),
    "input of the MLP": (Role.MLP_NORM,),
    "router": (Role.ROUTER,),
    "end of the model": (Role.FINAL_NORM,),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """A freedom that the engine lacks: in words, and what it is worth as a share of the cheapest plan's step."""

    feature: str
    words: str
    worth: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCosting:
    """One step by the engine's layout and by the cheapest plan on the same mesh. ``why``: where the time goes."""

    shape: StepShape
    share: float
    """Of the ranks' time, what steps of this bucket took."""
    engine_s: float
    best_s: float
    why: str
    missing: tuple[Missing, ...]

    @property
    def more(self) -> float:
        """What the engine's layout costs more, as a share."""
        return self.engine_s / self.best_s - 1


def missing(setting: Setting, trial: Trial, own: Sequence[Trial]) -> tuple[StepCosting, ...]:
    """For the step of each phase that took most of the time: what it costs more than by narrows' deployment on the same
    mesh with experts held alike (among ``own``), and why. Experts the engine could hold otherwise, by another way."""
    assert trial.sharding is not None and trial.way is not None
    mesh, experts = trial.candidate.mesh, trial.experts
    alike = (each for each in own if (each.candidate.mesh, each.experts) == (mesh, experts) and each.sharding)
    free = next(alike, trial)
    outcome = trial.candidate.outcome
    total = outcome.busy_s if outcome is not None and outcome.busy_s else 1.0
    return tuple(
        _costing(setting, trial, free, phase, plan.shape, seconds / total)
        for phase, (plan, seconds) in sorted(trial.longest.items(), key=lambda it: -it[1][1])
    )


def _costing(setting: Setting, trial: Trial, free: Trial, phase: str, shape: StepShape, share: float) -> StepCosting:
    assert trial.sharding is not None and trial.way is not None and free.sharding is not None
    mesh, config = trial.candidate.mesh, setting.config
    held = Planner(setting.deployment(mesh, trial.experts), trial.sharding)
    engine = replace(held.plan(shape, trial.layouts[phase]), layout_name=trial.way.title)
    sharding = free.sharding
    planner = Planner(setting.deployment(mesh, free.experts), sharding)
    best = planner.plan(shape)
    rules = named_layout(trial.layouts[phase], config, mesh)
    found = [
        Missing(feature=feature, words=words, worth=worth)
        for feature, roles in _FEATURES.items()
        if (limited := _limited(rules, roles)) is not None
        and (worth := planner.plan_by(limited, shape).ps / best.ps - 1) >= _LEAST
        and (words := _words(best, engine, roles))
    ]
    flat = replace(AUTO, name="flat", hierarchical=False)
    if planner.deployment.nodes is not None and (worth := planner.plan_by(flat, shape).ps / best.ps - 1) >= _LEAST:
        found.append(Missing(feature="hosts", words="collectives done in the hosts and between them", worth=worth))
    if sharding != trial.sharding and (worth := held.plan(shape).ps / best.ps - 1) >= _LEAST:
        own, other = (sharding_words(config, each).split(", ") for each in (sharding, trial.sharding))
        words = "; ".join(f"{mine}, not {its.split()[-1]}" for mine, its in zip(own, other, strict=True) if mine != its)
        found.append(Missing(feature="weights", words=words, worth=worth))
    return StepCosting(
        shape=shape,
        share=share,
        engine_s=engine.seconds,
        best_s=best.seconds,
        why=why(best, engine),
        missing=tuple(sorted(found, key=lambda each: -each.worth)),
    )


def _limited(rules: NamedLayout, roles: tuple[Role, ...]) -> NamedLayout | None:
    """Every way, but what ``rules`` say of ``roles``; None if they say nothing."""
    rows = {role: rules.rows_at[role] for role in roles if role in rules.rows_at}
    sums = {role: rules.sums_by[role] for role in roles if role in rules.sums_by}
    residual = {role: rules.residual[role] for role in roles if role in rules.residual}
    select = rules.select_before if Role.FINAL_NORM in roles else None
    if not (rows or sums or residual or select):
        return None
    return replace(
        AUTO, name="limited", rows_at=rows, sums_by=sums, residual=residual, select_before=select or AUTO.select_before
    )


def _words(best: Plan, engine: Plan, roles: tuple[Role, ...]) -> str:
    """How the two differ at ``roles`` in most layers."""
    parts = []
    for target in _targets(best, roles):
        mine, its = into_words(best, target), into_words(engine, target)
        if mine != its:
            parts.append(f"{mine or 'no move'} into {target}, not {its or 'no move'}")
    mine_at, its_at = _rows_at(best, roles), _rows_at(engine, roles)
    for name, at in mine_at.items():
        if its_at.get(name, at) != at:
            parts.append(f"{name} on {at} rows, not {its_at[name]}")
    if Role.FINAL_NORM in roles and not parts:
        parts.append("the last layer's MLP only on the rows whose logits are needed")
    return "; ".join(parts)


def _targets(plan: Plan, roles: tuple[Role, ...]) -> tuple[str, ...]:
    if Role.ATTENTION_NORM in roles:
        return ("attention",)
    if Role.MLP_NORM in roles:
        names = [op.name for op in main_segment(plan).ops]
        return tuple(name for name in ("experts", "mlp") if name in names)
    return ()


def _rows_at(plan: Plan, roles: tuple[Role, ...]) -> dict[str, str]:
    found = {}
    for op in main_segment(plan).ops:
        if op.stage is not None and op.stage.role in roles:
            found[op.name] = layout_words(plan.mesh, op.layout if op.move is None else op.leaves)
    return found
