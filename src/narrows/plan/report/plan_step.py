"""Plans one step of a model, from names and numbers: the entry for `narrows plan` and for Python."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from narrows.arch.positions import most_positions
from narrows.arch.presets import load_model_config
from narrows.cost.engines import engine_style
from narrows.cost.environment import this_machine
from narrows.cost.imbalance import DEFAULT_SKEW
from narrows.cost.network import network as known_network
from narrows.cost.pricer import StepShape
from narrows.cost.profile import choose_device
from narrows.errors import ConfigError
from narrows.layout import Mesh, Topology, split_evenly
from narrows.plan.deploy import planned_dtype
from narrows.plan.planner import Deployment
from narrows.plan.report.plan_report import PlanReport, make_report

__all__ = ["plan_step"]


def plan_step(
    model: str,
    *,
    rows: int | Sequence[int],
    dp: int = 1,
    tp: int = 1,
    device: str = "auto",
    phase: str = "prefill",
    context: int = 4096,
    logit_rows: int | None = None,
    layouts: Sequence[str] = (),
    dtype: str = "",
    graph: bool = True,
    encode_rows: str = "none",
    expert_skew: float = DEFAULT_SKEW,
    kv_dtype: str = "bf16",
    engine: str = "none",
    experts: str = "",
    nodes: str = "",
    network: str = "",
    revision: str = "",
    notes: Sequence[str] = (),
) -> PlanReport:
    """Plan one step of ``model`` on a mesh of ``dp x tp`` devices, under several layouts; no torch, no GPU.

    Args:
        model: a preset, a checkpoint folder, a ``config.json``, a ``.gguf`` file, or org/name of the hub.
        rows: tokens of the step, spread evenly over the attention groups; or those of each group.
        device: what one rank is, such as ``h100``, or a profile's file; ``auto`` is this machine's profile.
        phase: ``prefill`` or ``decode``.
        context: length of each sequence in tokens.
        logit_rows: tokens whose logits are computed; None: one per sequence.
        layouts: names of layouts to compare; empty: all that apply. `auto`, the cheapest one, is always planned.
        dtype: of linear weights and their products; empty: the checkpoint's.
        graph: whether kernels are launched from a CUDA graph.
        encode_rows: what rows may travel as before a gather (docs/encoded-rows.md).
        expert_skew: exponent of the power law by which experts are chosen; 0: all alike.
        kv_dtype: of the KV cache, ``fp8``, or ``bf16`` for that of the activations.
        engine: whose host and overlap of kernels are priced: ``none``, ``sglang``, ``vllm`` or ``trtllm``.
        experts: ``split`` or ``whole`` (expert parallelism) in every layout; empty: as published in named layouts, the
            cheapest in `auto`.
        nodes: how ranks lie on nodes, such as ``2x8`` for 2 of 8 ranks; empty: all on one (docs/topology.md).
        network: what connects nodes, such as ``ib-400``; empty: the device's usual one.
        notes: lines for the report, before those that are found here.

    Raises:
        ConfigError: anything that cannot be, with the numbers and what would work.
    """
    mesh = Mesh.of(dp=dp, tp=tp)
    config = load_model_config(model, revision)
    topology = Topology.parse(nodes) if nodes else None
    hosts = topology.num_nodes if topology else 1
    setting = partial(this_machine, ranks=mesh.size, threads=1, world="", hosts=hosts)
    hardware, found = choose_device(device, setting, dtype=dtype, model=model, runs=False)
    found = [*notes, *found]
    if not dtype:
        dtype, because = planned_dtype(config, hardware, model)
        found.append(f"dtype {dtype}: {because}")
    group_rows = split_evenly(rows, mesh.num_groups) if isinstance(rows, int) else tuple(rows)
    if sum(group_rows) < 1:
        raise ConfigError(f"rows {rows}: a step has at least 1 row")
    shape = StepShape.of(mesh, group_rows, phase=phase, context=context, logit_rows=logit_rows)
    if context > (positions := most_positions(config)):
        found.append(f"context {context} is beyond the {positions} positions of {config.name}")
    deployment = Deployment(
        config=config,
        mesh=mesh,
        device=hardware,
        dtype=dtype,
        graph=graph,
        encode_rows=encode_rows,
        expert_skew=expert_skew,
        kv_dtype=kv_dtype,
        engine=engine_style(engine),
        experts=experts,
        nodes=topology,
        between=known_network(network) if network else None,
    )
    return make_report(deployment, shape, layouts, logit_rows=logit_rows, notes=found)
