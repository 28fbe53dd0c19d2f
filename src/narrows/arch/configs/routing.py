"""Whether a routing rule can be followed at all."""

from __future__ import annotations

from narrows.arch.configs.shown import shown
from narrows.arch.model import MoE
from narrows.errors import CheckpointError, ConfigError

__all__ = ["METHODS", "SCORES", "check_routing"]

SCORES = ("softmax", "sigmoid")
METHODS = ("greedy", "group_limited_greedy", "noaux_tc")


def check_routing(moe: MoE) -> MoE:
    """``moe``, if every row finds its experts.

    Raises:
        ConfigError: scores or a choice that narrows does not know.
        CheckpointError: groups that do not divide, or fewer experts than are asked for.
    """
    if moe.scoring_func not in SCORES or moe.topk_method not in METHODS:
        raise ConfigError(
            f"scoring_func {shown(moe.scoring_func)} with topk_method {shown(moe.topk_method)} is not known; "
            f"narrows scores by {' or '.join(SCORES)} and chooses by {', '.join(METHODS[:-1])} or {METHODS[-1]}"
        )
    experts, top_k = moe.n_routed_experts, moe.num_experts_per_tok
    if moe.topk_method == "greedy":
        if top_k > experts:
            raise CheckpointError(f"num_experts_per_tok is {top_k}, more than the {experts} experts")
        return moe
    if experts % moe.n_group:
        raise CheckpointError(f"{experts} experts do not divide into n_group {moe.n_group} groups")
    if moe.topk_group > moe.n_group:
        raise CheckpointError(f"topk_group is {moe.topk_group}, more than n_group {moe.n_group}")
    held = moe.topk_group * (experts // moe.n_group)
    if top_k > held:
        raise CheckpointError(
            f"num_experts_per_tok is {top_k}, more than the {held} experts of {moe.topk_group} groups "
            f"(n_group {moe.n_group}, topk_group {moe.topk_group}, {experts} experts)"
        )
    return moe
