"""Named layouts: the published ways through a layer, each as a subset of the edges that the search may use.

A named layout is the same search over fewer edges, with the weight sharding of the published code. Where one cannot
apply to a model or a mesh, the error says which condition fails. Beside the published ones there is one per serving
engine: what it does with several attention groups (SGLang 0.5.23, vLLM 0.33.0, TensorRT-LLM of autumn 2026; in one
group all three run ``all-reduce``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from narrows.arch.config import MLA, ModelConfig
from narrows.arch.stages import Role, Stage
from narrows.arch.weight_sharding import WeightSharding
from narrows.errors import ConfigError
from narrows.layout import Mesh, MoveKind
from narrows.plan.plan import Plan

__all__ = [
    "AUTO",
    "ENGINE_LAYOUTS",
    "NAMED_LAYOUTS",
    "NamedLayout",
    "applicable_layouts",
    "inapplicable",
    "named_layout",
    "shared_plans",
]

ALL_REDUCE, REDUCE_SCATTER = MoveKind.ALL_REDUCE, MoveKind.REDUCE_SCATTER


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedLayout:
    """Which edges remain. An absent entry removes nothing.

    ``rows_at``: titles of the layouts a row stage may run at. ``sums_by``: the moves that may complete an owed sum
    before a stage. ``residual``: how the residual may come in before a norm: ``fused`` with it, ``added`` to finished
    rows, or ``joined`` to the owed sum. ``select_before``: the stage before which rows may be selected.
    ``fuses_norms``: an all-reduce and the norm after it may be one op, on devices that have that. ``hierarchical``:
    collectives among ranks on several nodes may be done in the nodes and between them.
    """

    name: str
    summary: str
    sharding: WeightSharding | None = None
    rows_at: Mapping[Role, tuple[str, ...]] = field(default_factory=dict)
    sums_by: Mapping[Role, tuple[MoveKind, ...]] = field(default_factory=dict)
    residual: Mapping[Role, tuple[str, ...]] = field(default_factory=dict)
    select_before: tuple[Role, ...] | None = None
    fuses_norms: bool = False
    hierarchical: bool = False

    def rows_of(self, stage: Stage) -> tuple[str, ...] | None:
        """``rows_at`` of a row stage; None: anywhere."""
        return self.rows_at.get(stage.role) if stage.role else None

    def sums_before(self, stage: Stage) -> tuple[MoveKind, ...] | None:
        """``sums_by`` of a stage; None: by any move."""
        return self.sums_by.get(stage.role) if stage.role else None

    def residual_of(self, stage: Stage) -> tuple[str, ...] | None:
        """``residual`` of a norm; None: in any way."""
        return self.residual.get(stage.role) if stage.role else None


AUTO = NamedLayout(name="auto", summary="the cheapest legal way, no edge removed", fuses_norms=True, hierarchical=True)

_ORDER = ("all-reduce", "attn-tp-input-scattered", "norm-before-gather", "sequence-parallel")
NAMED_LAYOUTS = (*_ORDER, "auto")
ENGINE_LAYOUTS = ("sglang-dp", "vllm-dp", "trtllm-dp")
"""What serving engines do with several attention groups; planned where they are requested by name."""

_PINNED = WeightSharding()
_NORMS = (Role.ATTENTION_NORM, Role.MLP_NORM, Role.FINAL_NORM)
_GROUP_LATENTS = {Role.LATENT_PROJ: ("GROUP",), Role.LATENT_NORM: ("GROUP",)}
_SUMS_ALL_REDUCED = dict.fromkeys(_NORMS, (ALL_REDUCE,))


def named_layout(name: str, config: ModelConfig, mesh: Mesh) -> NamedLayout:
    """The rules of the layout called ``name`` on ``mesh``.

    Raises:
        ConfigError: an unknown name, or a layout that cannot apply here, with the condition that fails.
    """
    if name == "auto":
        return AUTO
    if name not in (*_ORDER, *ENGINE_LAYOUTS):
        raise ConfigError(f"layout {name!r} is not known; layouts: {', '.join((*NAMED_LAYOUTS, *ENGINE_LAYOUTS))}")
    reason = inapplicable(name, config, mesh)
    if reason:
        raise ConfigError(f"layout {name} cannot apply to {config.name} on {mesh}: {reason}")
    several_groups = mesh.num_groups > 1
    if name in ENGINE_LAYOUTS:
        return _engine_layout(name, config, mesh)
    if name == "all-reduce":
        return NamedLayout(
            name=name,
            summary="every owed sum completed at once by all-reduce; norms on all rows they meet",
            sharding=_PINNED,
            rows_at={
                Role.ATTENTION_NORM: ("GROUP",),
                **_GROUP_LATENTS,
                Role.MLP_NORM: ("FULL",),
                Role.ROUTER: ("FULL",),
                Role.FINAL_NORM: ("FULL",),
            },
            sums_by=_SUMS_ALL_REDUCED,
            residual={
                Role.ATTENTION_NORM: ("fused",),
                Role.MLP_NORM: ("added", "joined") if several_groups else ("fused",),
                Role.FINAL_NORM: ("fused",),
            },
            select_before=(Role.LM_HEAD,),
        )
    if name == "attn-tp-input-scattered":
        return NamedLayout(
            name=name,
            summary="reduce-scatter into attention, norm and projection on scattered rows, gather the narrow latent",
            sharding=_PINNED,
            rows_at={
                Role.ATTENTION_NORM: ("SCATTERED",),
                Role.LATENT_PROJ: ("SCATTERED",),
                Role.LATENT_NORM: ("GROUP",),
                Role.MLP_NORM: ("FULL",),
                Role.ROUTER: ("FULL",),
                Role.FINAL_NORM: ("FULL",),
            },
            sums_by={
                Role.ATTENTION_NORM: (REDUCE_SCATTER,),
                Role.MLP_NORM: (ALL_REDUCE,),
                Role.FINAL_NORM: (ALL_REDUCE,),
            },
            residual={Role.ATTENTION_NORM: ("fused",), Role.MLP_NORM: ("joined",), Role.FINAL_NORM: ("fused",)},
            select_before=(Role.LM_HEAD,),
        )
    if name == "norm-before-gather":
        return NamedLayout(
            name=name,
            summary="norm on the attention group's own rows, then gather them for the experts",
            sharding=_PINNED,
            rows_at={
                Role.ATTENTION_NORM: ("GROUP",),
                **_GROUP_LATENTS,
                Role.MLP_NORM: ("GROUP",),
                Role.ROUTER: ("FULL",),
                Role.FINAL_NORM: ("GROUP",),
            },
            sums_by=_SUMS_ALL_REDUCED,
            residual=dict.fromkeys(_NORMS, ("fused",)),
            select_before=(Role.LM_HEAD,),
        )
    return NamedLayout(
        name=name,
        summary="every norm on scattered rows, every gather at full width (Megatron's sequence parallelism)",
        sharding=_PINNED,
        rows_at={
            Role.ATTENTION_NORM: ("SCATTERED",),
            **_GROUP_LATENTS,
            Role.MLP_NORM: ("SCATTERED",),
            Role.ROUTER: ("FULL",),
            Role.FINAL_NORM: ("SCATTERED",),
        },
        sums_by=dict.fromkeys(_NORMS, (REDUCE_SCATTER,)),
        residual=dict.fromkeys(_NORMS, ("fused",)),
        select_before=(Role.LM_HEAD,),
    )


def _engine_layout(name: str, config: ModelConfig, mesh: Mesh) -> NamedLayout:
    """One of :data:`ENGINE_LAYOUTS`: all take the experts' sum by reduce-scatter, back to the groups' own rows. Where
    the router runs on own rows, so does the shared expert, whole on each rank."""
    has_shared = config.moe is not None and config.moe.n_shared_experts > 0
    sharding = WeightSharding(shared_expert="replicated") if has_shared and name != "sglang-dp" else _PINNED
    if name == "vllm-dp" and mesh.group_size > 1 and isinstance(config.attention, MLA):
        return NamedLayout(
            name=name,
            summary="norms and router on scattered rows, gathered at full width for attention and for experts",
            sharding=sharding,
            rows_at={
                Role.ATTENTION_NORM: ("SCATTERED",),
                **_GROUP_LATENTS,
                Role.MLP_NORM: ("SCATTERED",),
                Role.ROUTER: ("SCATTERED",),
                Role.FINAL_NORM: ("SCATTERED",),
            },
            sums_by=dict.fromkeys(_NORMS, (REDUCE_SCATTER,)),
            residual=dict.fromkeys(_NORMS, ("fused",)),
            select_before=(Role.LM_HEAD,),
        )
    norm, router = ("GROUP",), ("FULL",)
    residual: tuple[str, ...] = ("fused",)
    summary = "norm on the attention group's own rows, then gather them for router and experts"
    if name != "sglang-dp":
        router, summary = ("SCATTERED",), "norm and router on own rows, then gather them for experts"
    elif mesh.group_size > 1:
        norm, residual = ("FULL",), ("added", "joined")
        summary = "gather the attention group's rows, then norm, router and experts on all of them"
    return NamedLayout(
        name=name,
        summary=summary,
        sharding=sharding,
        rows_at={
            Role.ATTENTION_NORM: ("GROUP",),
            **_GROUP_LATENTS,
            Role.MLP_NORM: norm,
            Role.ROUTER: router,
            Role.FINAL_NORM: ("GROUP",),
        },
        sums_by={
            Role.ATTENTION_NORM: (REDUCE_SCATTER,),
            Role.MLP_NORM: (ALL_REDUCE,),
            Role.FINAL_NORM: (REDUCE_SCATTER,),
        },
        residual={Role.ATTENTION_NORM: ("fused",), Role.MLP_NORM: residual, Role.FINAL_NORM: ("fused",)},
        select_before=(Role.LM_HEAD,),
    )


def inapplicable(name: str, config: ModelConfig, mesh: Mesh) -> str:
    """Why layout ``name`` cannot apply to this model and mesh; empty if it can."""
    if name == "attn-tp-input-scattered":
        if not isinstance(config.attention, MLA):
            return (
                f"{config.model_type} has no latent attention (MLA), so there is no narrow projection to gather; "
                "use sequence-parallel"
            )
        if config.attention.q_lora_rank is None:
            return (
                "q_lora_rank is null: queries come from hidden itself, so hidden must be gathered at full width; "
                "sequence-parallel is the nearest layout that applies"
            )
        if mesh.group_size == 1:
            return "tp is 1: attention has no ranks to scatter its input over; it needs tp > 1"
    if name in ("norm-before-gather", *ENGINE_LAYOUTS) and mesh.num_groups == 1:
        return "dp is 1: one attention group already holds all rows, so nothing is gathered; it needs dp > 1"
    if name == "trtllm-dp" and mesh.group_size > 1:
        return "tp is more than 1: TensorRT-LLM's attention data parallelism has one rank in each group; it needs tp 1"
    if name == "sequence-parallel" and mesh.size == 1:
        return "the mesh has one rank: there is nothing to scatter rows over"
    return ""


def applicable_layouts(config: ModelConfig, mesh: Mesh) -> tuple[str, ...]:
    """The named layouts that apply to this model and mesh, `auto` last."""
    return tuple(name for name in NAMED_LAYOUTS if not inapplicable(name, config, mesh))


def shared_plans(plans: Mapping[str, Plan]) -> dict[tuple[str, ...], Plan]:
    """Plans by the layouts that they are the plans of: those that run the same ops are one, named after the first."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, plan in plans.items():
        groups.setdefault(plan.signature(), []).append(name)
    return {tuple(names): plans[names[0]] for names in groups.values()}
