"""A deployment as it would serve on any device: weight sharding, limits and memory decided as the engine decides them.

By default the engine takes two contexts of KV cache; this takes what the memory of the device leaves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from narrows.arch.weight_sharding import WeightSharding
from narrows.cost.memory import MemoryUse
from narrows.cost.pricer import StepShape
from narrows.errors import ConfigError
from narrows.layout import split_evenly
from narrows.plan.deploy import DEFAULT_REQUESTS, PAGE_SIZE, limits_of, priced_context, step_mix
from narrows.plan.named import named_layout
from narrows.plan.planner import Deployment, Planner, known_sharding
from narrows.sched.limits import Limits
from narrows.sim.costs import PlannedCosts

__all__ = ["DoesNotFit", "Serving", "serving"]


class DoesNotFit(ConfigError):  # noqa: N818 - a state of the deployment
    """The device's memory does not hold the weights, or not the KV cache beside them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """A deployment under one named layout, with everything decided."""

    deployment: Deployment
    layout: str
    sharding: WeightSharding
    limits: Limits
    memory: MemoryUse

    def costs(self, *, sampled: bool = False, overhead_s: float = 0.0) -> PlannedCosts:
        """What its steps cost. ``sampled``: texts are drawn, so ranks need whole rows of logits."""
        planner = Planner(replace(self.deployment, want_logits=sampled), self.sharding)
        return PlannedCosts(planner, self.layout, priced_context(self.limits.max_context), overhead_s=overhead_s)


def serving(
    deployment: Deployment,
    layout: str,
    *,
    rows_per_step: int,
    max_context: int,
    kv_tokens: int | None = None,
    requests_per_group: int = DEFAULT_REQUESTS,
    prompt_rows: int = 0,
    prefix_cache: bool = True,
) -> Serving:
    """Decide what is left open. ``kv_tokens``: tokens of KV cache per attention group; None: as many as fit.

    Raises:
        DoesNotFit: with the numbers.
        ConfigError: a layout that is not known or cannot apply, or sizes that cannot be.
    """
    config, mesh = deployment.config, deployment.mesh
    if rows_per_step < 1:
        raise ConfigError(f"--max-rows is {rows_per_step}; it must be at least 1")
    rules = named_layout(layout, config, mesh)
    mix = tuple(step_mix(mesh, rows_per_step, max_context))
    sharding = deployment.published(rules.sharding) if rules.sharding else known_sharding(deployment, mix)
    memory = _memory(deployment, sharding, layout, rows_per_step, max_context)
    limits = limits_of(
        config,
        mesh,
        rows_per_step=rows_per_step,
        max_context=max_context,
        kv_tokens=_tokens_that_fit(deployment, memory) if kv_tokens is None else kv_tokens,
        requests_per_group=requests_per_group,
        prompt_rows=prompt_rows,
        prefix_cache=prefix_cache,
    )
    if not memory.holds(limits.tokens_per_group if kv_tokens is None else kv_tokens):
        wanted = limits.tokens_per_group * memory.kv_per_token
        raise DoesNotFit(
            f"does not fit: {limits.tokens_per_group} tokens of KV cache take {wanted / 1e9:.1f} GB beside "
            f"{_weights(deployment, memory)}: lower --kv-tokens to {memory.context_tokens}"
        )
    return Serving(deployment=deployment, layout=layout, sharding=sharding, limits=limits, memory=memory)


def _memory(deployment: Deployment, sharding: WeightSharding, layout: str, rows: int, max_context: int) -> MemoryUse:
    """With room for a full step of prompts at the longest context."""
    planner, mesh = Planner(deployment, sharding), deployment.mesh
    shape = StepShape.of(mesh, split_evenly(rows, mesh.num_groups), phase="prefill", context=max_context)
    return planner.memory(planner.plan(shape, layout))


def _tokens_that_fit(deployment: Deployment, memory: MemoryUse) -> int:
    """Whole pages in what the weights leave."""
    tokens = memory.context_tokens // PAGE_SIZE * PAGE_SIZE
    if not memory.fits or not tokens:
        raise DoesNotFit(f"does not fit: {_weights(deployment, memory)}")
    return tokens


def _weights(deployment: Deployment, memory: MemoryUse) -> str:
    return (
        f"{memory.weights / 1e9:.1f} GB of {deployment.dtype} weights per rank on {deployment.mesh}, of "
        f"{memory.usable / 1e9:.1f} GB usable on {deployment.device.name}"
    )
