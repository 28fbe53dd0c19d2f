"""Checks of this machine for CPU ranks: memory for the plan, and a CPU with or without bf16 products.

Takes numbers and returns texts; the numbers come from the machine in `Machine.here` alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from narrows.arch.weight_sharding import WeightSharding
from narrows.cost.environment import cpu_facts
from narrows.cost.memory import kv_token_bytes, weight_bytes
from narrows.engine.free_memory import free_memory, total_memory
from narrows.errors import ConfigError
from narrows.native import kernels
from narrows.plan.planner import Deployment

__all__ = ["Machine", "Needs", "check_memory", "slow_bf16"]

_BF16_PRODUCTS = frozenset(("avx512_bf16", "amx_bf16", "bf16"))
"""By the names in /proc/cpuinfo; the last is ARM's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """``memory``: bytes of the machine, or of the container that this process is in; ``free``: of these, those in no
    use. ``cpu_features``: those of ``cost.environment.CPU_FEATURES`` that the CPU has; none where they are unknown.
    ``target``: the instruction set of the compiled kernels; empty where there are none."""

    memory: int
    free: int
    cpu_features: tuple[str, ...] = ()
    target: str = ""

    @classmethod
    def here(cls) -> Machine:
        """This one, now."""
        running = kernels()
        target = running.target if running else ""
        return cls(memory=total_memory(), free=free_memory(), cpu_features=cpu_facts()[1], target=target)


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """Bytes that the ranks of one host take together. ``step``: of the largest step, beside weights and cache."""

    ranks: int
    weights: int
    cache: int
    processes: int
    step: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.processes + self.step

    @classmethod
    def of(
        cls,
        deployment: Deployment,
        sharding: WeightSharding,
        *,
        ranks: Sequence[int],
        in_threads: bool,
        dtype: str,
        kv_tokens: int,
        step: int = 0,
    ) -> Needs:
        """As `plan` counts them. ``ranks``: those on this host; ``dtype``: of weights, by the name that prices use;
        ``step``: of one rank."""
        config, mesh = deployment.config, deployment.mesh
        per_token = kv_token_bytes(config, mesh, 4 if dtype == "fp32" else 2)
        process = deployment.memory(sharding).process
        return cls(
            ranks=len(ranks),
            weights=sum(weight_bytes(config, mesh, sharding, dtype, rank) for rank in ranks),
            cache=kv_tokens * per_token * len(ranks),
            processes=round(process * (1 if in_threads else len(ranks))),
            step=step * len(ranks),
        )


def check_memory(needs: Needs, machine: Machine, *, kv_tokens: int, rows: int) -> str:
    """A note about memory that is not free now; empty if it is free. ``kv_tokens``: per attention group.

    Raises:
        ConfigError: the host has less than the ranks need; pages of the cache take theirs as they are written, so
            this would show long after the start.
    """
    takes = (
        f"{needs.total / 1e9:.1f} GB on {needs.ranks} rank(s) here: weights {needs.weights / 1e9:.1f}, a KV cache of "
        f"{kv_tokens} tokens per attention group {needs.cache / 1e9:.1f}, steps of {rows} rows "
        f"{needs.step / 1e9:.1f}, processes {needs.processes / 1e9:.1f}"
    )
    if needs.total <= machine.memory:
        if needs.total <= machine.free:
            return ""
        return f"full use takes {takes}; {machine.free / 1e9:.1f} GB are free now"
    way_out = (
        "the weights alone are too much: take a narrower --dtype or --quantization int8, or more hosts (--nnodes)"
        if needs.weights > machine.memory
        else "lower --kv-tokens (or --max-context, whose double is the default), or --max-rows"
    )
    raise ConfigError(f"this takes {takes}; this host has {machine.memory / 1e9:.1f} GB: {way_out}")


def slow_bf16(bfloat16: Needs, float32: Needs, machine: Machine) -> str:
    """A note where the checkpoint's bfloat16 runs on a CPU without products for it, and without vectors wide
    enough for the compiled kernels to make up for that; empty elsewhere."""
    if not machine.cpu_features or _BF16_PRODUCTS & set(machine.cpu_features) or machine.target not in ("", "baseline"):
        return ""
    faster = "prompts" if machine.target else "prompts and batches"
    line = (
        f"this CPU has no bf16 products (neither AVX-512 BF16 nor AMX), and {_kernels(machine)}, so {faster} are "
        f"faster in float32: --dtype float32, for {_size(float32.weights)} of weights here "
        f"in place of {_size(bfloat16.weights)}"
    )
    if float32.total > machine.free:
        line += f"; it takes {float32.total / 1e9:.1f} GB in all, and {machine.free / 1e9:.1f} are free now"
    return line


def _kernels(machine: Machine) -> str:
    return "the compiled kernels run without AVX2" if machine.target else "there are no compiled kernels for it"


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
