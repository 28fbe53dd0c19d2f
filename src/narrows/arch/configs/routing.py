"""Routed experts, made of the fields that DeepSeek and GLM share, and whether a routing rule can be followed at all."""

from __future__ import annotations

from typing import Protocol

from narrows.arch.configs.shown import shown
from narrows.arch.model import MoE
from narrows.errors import CheckpointError, ConfigError

__all__ = ["METHODS", "SCORES", "check_routing", "routed_experts"]

SCORES = ("softmax", "sigmoid")
METHODS = ("greedy", "group_limited_greedy", "noaux_tc")


class _Fields(Protocol):
    """The expert fields of a schema under DeepSeek's names."""

    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    n_shared_experts: int
    first_k_dense_replace: int
    routed_scaling_factor: float

    @property
    def n_group(self) -> int | None: ...

    @property
    def topk_group(self) -> int | None: ...


def routed_experts(
    fields: _Fields, *, scoring_func: str, topk_method: str, norm_topk_prob: bool, moe_layer_freq: int = 1
) -> MoE:
    """The experts of ``fields``, chosen by this rule; groups that are null are one.

    Raises:
        CheckpointError, ConfigError: as :func:`check_routing`.
    """
    return check_routing(
        MoE(
            n_routed_experts=fields.n_routed_experts,
            num_experts_per_tok=fields.num_experts_per_tok,
            moe_intermediate_size=fields.moe_intermediate_size,
            n_shared_experts=fields.n_shared_experts,
            first_k_dense_replace=fields.first_k_dense_replace,
            scoring_func=scoring_func,
            topk_method=topk_method,
            n_group=fields.n_group or 1,
            topk_group=fields.topk_group or 1,
            norm_topk_prob=norm_topk_prob,
            routed_scaling_factor=fields.routed_scaling_factor,
            moe_layer_freq=moe_layer_freq,
        )
    )


def check_routing(moe: MoE, experts_field: str = "n_routed_experts") -> MoE:
    """``moe``, if every row can choose its experts. ``experts_field``: the file's name for their number, for errors.

    Raises:
        ConfigError: an unsupported scoring or choice of experts.
        CheckpointError: groups that do not divide, or fewer experts than a row chooses.
    """
    if moe.scoring_func not in SCORES or moe.topk_method not in METHODS:
        raise ConfigError(
            f"scoring_func {shown(moe.scoring_func)} with topk_method {shown(moe.topk_method)} is not known; "
            f"narrows scores by {' or '.join(SCORES)} and chooses by {', '.join(METHODS[:-1])} or {METHODS[-1]}"
        )
    experts, top_k = moe.n_routed_experts, moe.num_experts_per_tok
    if moe.topk_method == "greedy":
        if top_k > experts:
            raise CheckpointError(f"num_experts_per_tok is {top_k}, more than {experts_field}, which is {experts}")
        return moe
    if experts % moe.n_group:
        raise CheckpointError(f"{experts_field} {experts} does not divide into n_group {moe.n_group} groups")
    if moe.topk_group > moe.n_group:
        raise CheckpointError(f"topk_group is {moe.topk_group}, more than n_group {moe.n_group}")
    held = moe.topk_group * (experts // moe.n_group)
    if top_k > held:
        raise CheckpointError(
            f"num_experts_per_tok is {top_k}, more than the {held} experts of {moe.topk_group} groups "
            f"(n_group {moe.n_group}, topk_group {moe.topk_group}, {experts_field} {experts})"
        )
    return moe
