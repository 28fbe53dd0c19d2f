"""The planner: makes plans from a model, a mesh, a device and the shape of a step, under any named layout.

Weight sharding decides what ranks load, so it is chosen once per deployment, for a stated mix of steps. Layouts are
chosen for every step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from narrows.arch.block_formats import BLOCK_FORMATS, NO_BLOCKS
from narrows.arch.chain import build_chain
from narrows.arch.config import ModelConfig
from narrows.arch.quantization import is_block_fp8
from narrows.arch.weight_sharding import WeightSharding, check_mesh, sharding_choices
from narrows.cost.devices import DTYPES, Device
from narrows.cost.engines import KERNELS_ALONE, EngineStyle
from narrows.cost.imbalance import DEFAULT_SKEW, LARGEST_SKEW
from narrows.cost.memory import MemoryUse, memory_use, stored_bytes
from narrows.cost.network import Network, network
from narrows.cost.pricer import Pricer, StepShape
from narrows.errors import ConfigError
from narrows.layout import Encoding, Mesh, Topology
from narrows.plan.graph import Graph
from narrows.plan.named import NamedLayout, named_layout
from narrows.plan.plan import Plan
from narrows.plan.search import Search
from narrows.plan.workspace import Kernels, Workspace, workspace

__all__ = ["ENCODE_ROWS", "EXPERTS", "KV_DTYPES", "Deployment", "Planner", "choose_sharding", "known_sharding"]

ENCODE_ROWS = {
    "none": (Encoding.PLAIN, False),
    "int8": (Encoding.INT8, False),
    "fp8": (Encoding.FP8, False),
    "int8-always": (Encoding.INT8, True),
    "fp8-always": (Encoding.FP8, True),
}
"""What rows may travel as in gathers: where the planner finds it cheaper, or wherever it is allowed (``always``), which
is the most that any plan can round: for measuring quality."""


KV_DTYPES = ("bf16", "fp8")
"""Of the KV cache; ``bf16`` stands for the dtype of the activations."""
EXPERTS = ("split", "whole")
"""How ranks hold experts: a part of each, or whole ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """A model on a mesh of one kind of device. ``graph``: steps are launched from a CUDA graph. ``dtype``: of linear
    weights; ``stored``: as the checkpoint has them in blocks, of which ``config`` keeps none with another dtype.

    ``want_logits``: every rank needs whole rows of logits, not only the chosen token. ``encode_rows``: one of
    ENCODE_ROWS. ``expert_skew``: how unequally experts are chosen (:mod:`narrows.cost.imbalance`). ``kv_dtype``: of the
    KV cache, ``fp8`` or that of the activations. ``engine``: whose host and overlap are priced, on GPUs. ``experts``:
    ``split`` or ``whole`` in every layout; empty: as published in named ones, the cheapest in `auto`. ``nodes``: how
    ranks lie on nodes; None: all on one. ``between``: the network that connects these; None: the device's usual one.
    """

    config: ModelConfig
    mesh: Mesh
    device: Device
    dtype: str = "bf16"
    graph: bool = True
    want_logits: bool = False
    encode_rows: str = "none"
    expert_skew: float = DEFAULT_SKEW
    kv_dtype: str = "bf16"
    engine: EngineStyle = KERNELS_ALONE
    experts: str = ""
    nodes: Topology | None = None
    between: Network | None = None

    def __post_init__(self) -> None:
        if self.encode_rows not in ENCODE_ROWS:
            raise ConfigError(f"--encode-rows {self.encode_rows!r} is not known; it is one of {', '.join(ENCODE_ROWS)}")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype {self.dtype!r} is not known; dtypes: {', '.join(DTYPES)}")
        self._check_blocks()
        self.device.flops_per_s(self.dtype)  # refuses fp8 on a device without it, naming those that have it
        if not 0 <= self.expert_skew <= LARGEST_SKEW:
            raise ConfigError(f"--expert-skew is {self.expert_skew:g}; it must be between 0 and {LARGEST_SKEW:g}")
        check_mesh(self.config, self.mesh)
        self.topology.check(self.mesh)
        if self.between is not None and self.topology.is_one_node:
            raise ConfigError(
                f"--network {self.between.name} connects nodes, and all {self.mesh.size} ranks are on one; say --nodes "
                "NxR too, or leave it out"
            )
        self._check_experts()
        self._check_gpu_options()

    def _check_blocks(self) -> None:
        """Refuse a checkpoint without blocks; forget blocks that ranks do not hold, so that no split respects them."""
        if self.dtype != "stored":
            object.__setattr__(self, "config", replace(self.config, blocks=NO_BLOCKS))
        elif not self.config.blocks:
            raise ConfigError(
                f"--quantization stored: {self.config.name} has no weights in blocks that kernels multiply "
                f"({', '.join(map(str, BLOCK_FORMATS))} of a GGUF file); leave it out"
            )
        elif not self.device.is_cpu:
            raise ConfigError(f"weights as stored are for CPU ranks, and this is {self.device.name}; use bf16")

    def _check_experts(self) -> None:
        """Refuse a way to hold experts that this model or mesh cannot have."""
        if not self.experts:
            return
        if self.experts not in EXPERTS:
            raise ConfigError(f"--experts {self.experts!r} is not known; it is one of {', '.join(EXPERTS)}")
        if self.config.moe is None:
            raise ConfigError(f"--experts {self.experts}: {self.config.name} has no experts; leave it out")
        if self.experts == "whole" and (count := self.config.moe.n_routed_experts) < self.mesh.size:
            raise ConfigError(
                f"--experts whole: {count} experts cannot be dealt whole to {self.mesh.size} ranks; "
                f"use --experts split, or at most {count} ranks"
            )

    def _check_gpu_options(self) -> None:
        """Refuse what is priced for GPUs alone."""
        if self.kv_dtype not in KV_DTYPES:
            raise ConfigError(f"--kv-dtype {self.kv_dtype!r} is not known; it is one of {', '.join(KV_DTYPES)}")
        if self.kv_dtype == "fp8" and (self.device.is_cpu or self.dtype == "fp32"):
            raise ConfigError(
                f"--kv-dtype fp8 is for GPUs with bf16 activations, and this is {self.device.name} in {self.dtype}; "
                "leave it out"
            )
        if self.engine is not KERNELS_ALONE and self.device.is_cpu:
            raise ConfigError(
                f"--engine {self.engine.name} describes an engine on GPUs, not on {self.device.name}; leave it out"
            )

    @property
    def topology(self) -> Topology:
        """How ranks lie on nodes."""
        return self.nodes or Topology.one_node(self.mesh.size)

    @property
    def network(self) -> Network:
        """What connects the nodes."""
        return self.between or network(self.device.network)

    @property
    def block_scales(self) -> bool:
        """Whether FP8 weights have scales by block: the checkpoint's own, or those that are published for experts."""
        return self.config.moe is not None or is_block_fp8(self.config.quantization)

    @property
    def stored_bytes(self) -> float:
        """Bytes of a value of weights in blocks, on average."""
        return stored_bytes(self.config) if self.dtype == "stored" else 1.0

    @property
    def itemsize(self) -> int:
        """Bytes per value of the activations."""
        return 4 if self.dtype == "fp32" else 2

    def published(self, sharding: WeightSharding) -> WeightSharding:
        """The weight sharding of a named layout, with experts held as this deployment says."""
        return replace(sharding, experts=self.experts) if self.experts and self.config.moe else sharding

    def sharding_choices(self) -> tuple[WeightSharding, ...]:
        """Every weight sharding that it may have, the published one first."""
        return tuple(dict.fromkeys(self.published(each) for each in sharding_choices(self.config, self.mesh)))

    def memory(self, sharding: WeightSharding, workspace: int = 0) -> MemoryUse:
        """Weights and KV cache on the fullest rank, where steps take ``workspace`` bytes beside them."""
        return memory_use(self.config, self.mesh, sharding, self.device, self.dtype, workspace, self.kv_dtype)

    def pricer(self, shape: StepShape, kind: type[Pricer] = Pricer) -> Pricer:
        """What prices its steps of one shape."""
        return kind(
            self.device,
            self.mesh,
            shape,
            self.dtype,
            itemsize=self.itemsize,
            graph=self.graph,
            expert_skew=self.expert_skew,
            block_scales=self.block_scales,
            kv_dtype=self.kv_dtype,
            stored_bytes=self.stored_bytes,
            engine=self.engine,
            topology=self.topology,
            between=self.network,
        )

    @property
    def kernels(self) -> Kernels:
        """What computes on its ranks, as far as memory depends on it."""
        cpu = self.device.is_cpu
        return Kernels(cpu=cpu, compiled=cpu and self.dtype != "fp32", itemsize=self.itemsize, skew=self.expert_skew)


class Planner:
    """Plans steps of one deployment whose ranks hold weights as ``sharding`` says."""

    def __init__(self, deployment: Deployment, sharding: WeightSharding) -> None:
        self.deployment, self.sharding = deployment, sharding
        self.chain = build_chain(
            deployment.config,
            deployment.mesh,
            sharding,
            itemsize=deployment.itemsize,
            want_logits=deployment.want_logits,
        )
        self._graphs: dict[str, Graph] = {}

    def graph(self, layout: str) -> Graph:
        """The graph that plans under the named layout are searched in.

        Raises:
            ConfigError: as :meth:`plan`.
        """
        graph = self._graphs.get(layout)
        if graph is None:
            d = self.deployment
            graph = self._graphs[layout] = self.graph_by(named_layout(layout, d.config, d.mesh))
        return graph

    def graph_by(self, rules: NamedLayout) -> Graph:
        """A new graph of the ways that ``rules`` leave."""
        d = self.deployment
        encoding, always = ENCODE_ROWS[d.encode_rows]
        return Graph(
            self.chain,
            d.mesh,
            rules,
            encoding,
            always=always,
            fuses_norms=d.device.fused_norm_bytes > 0,
            topology=d.topology,
        )

    def plan(self, shape: StepShape, layout: str = "auto") -> Plan:
        """The cheapest plan for ``shape`` under the named layout.

        Raises:
            ConfigError: an unknown layout, or one that cannot apply to this model and mesh.
        """
        return self._search(self.graph(layout), shape)

    def ps(self, shape: StepShape, layout: str = "auto") -> int:
        """Predicted picoseconds of :meth:`plan`, without the plan."""
        prices = self.deployment.pricer(shape)
        return Search(self.graph(layout), prices).ps() + prices.step().ps

    def plan_by(self, rules: NamedLayout, shape: StepShape) -> Plan:
        """The cheapest plan for ``shape`` that ``rules`` leave."""
        return self._search(self.graph_by(rules), shape)

    def _search(self, graph: Graph, shape: StepShape) -> Plan:
        d, prices = self.deployment, self.deployment.pricer(shape)
        segments = Search(graph, prices).solve()
        return Plan(
            layout_name=graph.rules.name,
            mesh=d.mesh,
            shape=shape,
            segments=segments,
            roles=graph.chain.roles,
            host_overhead=prices.step(),
            nodes=None if d.topology.is_one_node else d.topology,
        )

    def workspace(self, plan: Plan) -> Workspace:
        """What a step of one of its plans takes beside weights and KV cache."""
        return workspace(plan, self.chain.fields, self.deployment.kernels)

    def memory(self, *plans: Plan) -> MemoryUse:
        """Weights, KV cache, and room for the largest step of ``plans``, on the fullest rank."""
        most = max((self.workspace(plan).total for plan in plans), default=0)
        return self.deployment.memory(self.sharding, most)


def choose_sharding(
    deployment: Deployment,
    mix: Sequence[tuple[StepShape, float]],
    planner_of: Callable[[WeightSharding], Planner] | None = None,
) -> WeightSharding:
    """The weight sharding that fits memory and costs least over ``mix``: (shape of a step, how often it runs).

    To fit is to leave room for each of those steps and its KV cache. Ties go to the set nearest the published one. If
    nothing fits it is the published set: what such a plan says is then at least about layouts. ``planner_of``: planners
    of this deployment that exist already, for callers that ask often.
    """
    choices = deployment.sharding_choices()
    tokens = max((shape.kv_tokens for shape, _ in mix), default=0)
    best, least = choices[0], math.inf
    dearest_first = sorted(mix, key=lambda each: -each[1])
    for sharding in choices:
        memory = deployment.memory(sharding)
        if not memory.holds(tokens):
            continue  # not even without room for a step
        planner = planner_of(sharding) if planner_of else Planner(deployment, sharding)
        plans, cost = [], 0.0
        for shape, weight in dearest_first:
            plans.append(plan := planner.plan(shape))
            cost += plan.ps * weight
            if cost >= least:
                break  # the rest only adds to it
        else:
            most = max((planner.workspace(plan).total for plan in plans), default=0)
            if replace(memory, workspace=most).holds(tokens):
                best, least = sharding, cost
    return best


@lru_cache(maxsize=32)
def known_sharding(deployment: Deployment, mix: tuple[tuple[StepShape, float], ...]) -> WeightSharding:
    """:func:`choose_sharding`, searched once per process: it takes most of the time in which a deployment is resolved,
    and every engine, run and replay of one resolves it again."""
    return choose_sharding(deployment, mix)
