"""Router scores to chosen experts and their weights.

Ids of dead rows are set to -1 by the caller.

Letters: T rows, E experts, K chosen per row, G groups of E / G experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypedDict, Unpack

import torch
from torch import Tensor
from torch.nn import functional

from narrows.ops.compiled import kernels
from narrows.ops.linear import linear
from narrows.ops.wide_product import wide_mm

__all__ = [
    "Method",
    "Routing",
    "Scoring",
    "gate_dtype",
    "route",
    "route_reference",
    "router",
    "router_logits",
    "router_reference",
]

Scoring = Literal["softmax", "sigmoid"]
Method = Literal["greedy", "group_limited_greedy", "noaux_tc"]

SORTED_SCORES = 4096
"""Up to this many scores a stable sort is faster than packing (38 us against 74 for one row of 256 in 8 groups)."""

ROW_OF_VECTORS = 32
"""Floats that torch takes at once, at the widest (two vectors of AVX-512)."""


class Rule(TypedDict):
    """The numbers of a routing rule; `route` says what they do."""

    top_k: int
    scoring: Scoring
    method: Method
    num_groups: int | None
    topk_group: int | None
    norm_topk_prob: bool
    routed_scaling_factor: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """What `route` chose: ids [T, K] int64 by falling choice score, weights [T, K] float32, margins [T] or None."""

    topk_ids_TK: Tensor
    topk_weights_TK: Tensor
    margin_T: Tensor | None


def route(
    logits_TE: Tensor,
    *,
    top_k: int,
    scoring: Scoring,
    method: Method,
    num_groups: int | None,
    topk_group: int | None,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
    correction_bias_E: Tensor | None = None,
    forced_ids_TK: Tensor | None = None,
    with_margin: bool = False,
) -> Routing:
    """``ids = top_k(choice)``, ``weights = score[ids] (/ their sum) * routed_scaling_factor``.

    ``score`` is softmax or sigmoid of the logits. ``choice`` is the score (``greedy``), plus the correction bias
    (``noaux_tc``), within the ``topk_group`` best of ``num_groups`` groups of neighbouring experts (both but
    ``greedy``); a group is worth its best choice score (``group_limited_greedy``) or the sum of its two best
    (``noaux_tc``). Weights come from the scores, without the bias. ``num_groups`` None or 1 means no groups.

    Shapes: logits [T, E] float32, correction_bias [E] float32, forced_ids [T, K] int64 -> see `Routing`.

    Equal choice scores go to the lower id, for experts and groups alike. ``torch.topk`` promises no order among equals,
    so for many rows the id is packed under the score's bits and the pairs, now all distinct, are compared (E <= 65536);
    for few rows, and in the twin, a stable sort decides: the same ids, at 512 rows of 256 in twice the time.

    ``forced_ids_TK`` replays the choice of another run: the weights are THIS run's scores at those ids.
    ``margin_T`` (with ``with_margin``): how far this run's own choice, forced or not, is from another one: choice score
    of the last chosen expert less that of the best one not chosen (among the chosen groups), and the same of groups,
    whichever is smaller; +inf where nothing is left out.

    Source, whose numerics these are: transformers ``DeepseekV2TopkRouter`` (softmax; it scales always and never
    normalises, so V2 passes ``norm_topk_prob=False`` whatever its config says), ``DeepseekV3TopkRouter`` (sigmoid,
    noaux_tc, the sum + 1e-20), ``Qwen3MoeTopKRouter`` (softmax, greedy, normalised, scale 1; it then casts the
    weights to the logits' dtype, here they stay float32). Groups left out count as -inf here (0 in V2: the same
    unless scores underflow).
    """
    return _route(
        logits_TE,
        top_k,
        scoring,
        method,
        num_groups,
        topk_group,
        norm_topk_prob,
        routed_scaling_factor,
        correction_bias_E,
        forced_ids_TK,
        with_margin,
        top_ids=_top_ids,
    )


def route_reference(
    logits_TE: Tensor,
    *,
    top_k: int,
    scoring: Scoring,
    method: Method,
    num_groups: int | None,
    topk_group: int | None,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
    correction_bias_E: Tensor | None = None,
    forced_ids_TK: Tensor | None = None,
    with_margin: bool = False,
) -> Routing:
    """Twin of `route`: the same rule, choosing by a stable sort."""
    return _route(
        logits_TE,
        top_k,
        scoring,
        method,
        num_groups,
        topk_group,
        norm_topk_prob,
        routed_scaling_factor,
        correction_bias_E,
        forced_ids_TK,
        with_margin,
        top_ids=_top_ids_by_sort,
    )


def router(
    x_TH: Tensor,
    gate_EH: Tensor,
    *,
    correction_bias_E: Tensor | None = None,
    batch_invariant: bool = False,
    **rule: Unpack[Rule],
) -> tuple[Tensor, Tensor]:
    """`route` of ``x @ gate^T`` in float32: ``(topk_ids int32, topk_weights float32)``, both [T, K].

    Shapes: x [T, H] of any float dtype, gate [E, H] of `gate_dtype`, correction_bias [E] float32.

    Compiled on CPU: logits and choice of four rows at a time, in one call; then no row's bits depend on the others.
    Its logits differ from torch's by the order of their sums, and its sigmoid by a unit in the last place, so scores
    that close may be ranked otherwise; equal logits still go to the lower id.
    """
    compiled = kernels()
    if (
        compiled is None
        or not x_TH.is_cpu
        or x_TH.dtype not in (torch.bfloat16, torch.float32)
        or x_TH.stride(1) != 1
        or gate_EH.dtype != torch.float32
    ):
        return router_reference(
            x_TH, gate_EH, correction_bias_E=correction_bias_E, batch_invariant=batch_invariant, **rule
        )
    top_k, method, num_groups, topk_group = rule["top_k"], rule["method"], rule["num_groups"], rule["topk_group"]
    assert gate_EH.is_contiguous()
    assert correction_bias_E is None or method == "noaux_tc", f"{method} has no correction bias"
    num_rows, hidden = x_TH.shape
    num_experts = gate_EH.shape[0]
    groups = num_groups if method != "greedy" and num_groups is not None else 1
    assert 0 < top_k <= num_experts
    if groups > 1:
        assert topk_group is not None and topk_group <= groups and top_k <= topk_group * (num_experts // groups)
    ids_TK = torch.empty((num_rows, top_k), dtype=torch.int32)
    weights_TK = torch.empty((num_rows, top_k), dtype=torch.float32)
    compiled.router(
        ids_TK.data_ptr(),
        weights_TK.data_ptr(),
        x_TH.data_ptr(),
        x_TH.stride(0),
        gate_EH.data_ptr(),
        None if correction_bias_E is None else correction_bias_E.data_ptr(),
        num_rows,
        num_experts,
        hidden,
        top_k,
        groups,
        topk_group or 0,
        rule["scoring"] == "softmax",
        method == "noaux_tc",
        rule["norm_topk_prob"],
        rule["routed_scaling_factor"],
        x_TH.dtype == torch.float32,
        torch.get_num_threads(),
    )
    return ids_TK, weights_TK


def router_reference(
    x_TH: Tensor,
    gate_EH: Tensor,
    *,
    correction_bias_E: Tensor | None = None,
    batch_invariant: bool = False,
    **rule: Unpack[Rule],
) -> tuple[Tensor, Tensor]:
    """Twin of `router`, and its path where nothing is compiled."""
    logits_TE = router_logits(x_TH, gate_EH, batch_invariant=batch_invariant)
    routing = route(logits_TE, correction_bias_E=correction_bias_E, **rule)
    return routing.topk_ids_TK.to(torch.int32), routing.topk_weights_TK


def gate_dtype(checkpoint: torch.dtype, activations: torch.dtype, device: torch.device) -> torch.dtype:
    """In what to hold a router's weight: float32, as the reference multiplies; or, on devices that multiply 16-bit
    numbers with float32 sums, the checkpoint's own type where activations have it too: the products are the same."""
    narrow = device.type != "cpu" and checkpoint == activations and checkpoint.itemsize == 2
    return checkpoint if narrow else torch.float32


def router_logits(x_TH: Tensor, gate_EH: Tensor, *, batch_invariant: bool = False) -> Tensor:
    """``x @ gate^T`` in float32: products of the values as they are, sums in float32. [T, E]."""
    if gate_EH.dtype == x_TH.dtype != torch.float32:
        return wide_mm(x_TH, gate_EH.t())
    return linear(x_TH.float(), gate_EH, batch_invariant=batch_invariant)


def _route(
    logits_TE: Tensor,
    top_k: int,
    scoring: Scoring,
    method: Method,
    num_groups: int | None,
    topk_group: int | None,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
    correction_bias_E: Tensor | None,
    forced_ids_TK: Tensor | None,
    with_margin: bool,
    *,
    top_ids: Callable[[Tensor, int], Tensor],
) -> Routing:
    assert logits_TE.dtype == torch.float32, f"router logits are float32, got {logits_TE.dtype}"
    assert correction_bias_E is None or method == "noaux_tc", f"{method} has no correction bias"
    score_TE = logits_TE.softmax(dim=-1) if scoring == "softmax" else _sigmoid(logits_TE)
    choice_TE = score_TE if correction_bias_E is None else score_TE + correction_bias_E
    margins: list[Tensor] = []
    if method != "greedy" and num_groups is not None and num_groups > 1:
        assert topk_group is not None and top_k <= topk_group * (logits_TE.shape[1] // num_groups)
        choice_TGE = torch.unflatten(choice_TE, -1, (num_groups, -1))
        group_choice_TG = _group_choice(choice_TGE, method)
        groups_TG = top_ids(group_choice_TG, topk_group)
        left_out_TG = torch.ones_like(group_choice_TG, dtype=torch.bool).scatter_(1, groups_TG, False)
        choice_TE = choice_TGE.masked_fill(left_out_TG.unsqueeze(-1), float("-inf")).flatten(1)
        if with_margin:
            margins.append(_margin(group_choice_TG, groups_TG))
    ids_TK = top_ids(choice_TE, top_k) if forced_ids_TK is None or with_margin else forced_ids_TK
    if with_margin:
        margins.append(_margin(choice_TE, ids_TK))
    ids_TK = ids_TK if forced_ids_TK is None else forced_ids_TK
    weights_TK = score_TE.gather(1, ids_TK)
    if norm_topk_prob:
        weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
    return Routing(
        topk_ids_TK=ids_TK,
        topk_weights_TK=weights_TK * routed_scaling_factor,
        margin_T=torch.stack(margins).amin(dim=0) if margins else None,
    )


def _sigmoid(logits_TE: Tensor) -> Tensor:
    """``sigmoid(logits)``, a row's bits the same wherever the row lies.

    On CPU the last elements of a tensor, too few for a vector, go through another exp; rows that are whole vectors
    (those of all known models) cannot be split by that, others get a stride that keeps them apart.
    """
    num_experts = logits_TE.shape[1]
    if num_experts % ROW_OF_VECTORS == 0:
        return logits_TE.sigmoid()
    padded_TE = functional.pad(logits_TE, (0, -num_experts % ROW_OF_VECTORS))
    return padded_TE.sigmoid_()[:, :num_experts].contiguous()


def _group_choice(choice_TGE: Tensor, method: Method) -> Tensor:
    if method == "group_limited_greedy":
        return choice_TGE.amax(dim=-1)
    return choice_TGE.topk(min(2, choice_TGE.shape[-1]), dim=-1).values.sum(dim=-1)


def _top_ids(choice_TE: Tensor, k: int) -> Tensor:
    num = choice_TE.shape[-1]
    if choice_TE.numel() <= SORTED_SCORES:
        return _top_ids_by_sort(choice_TE, k)
    assert num <= 1 << 16
    # As integers the bits of floats are in the floats' order once the low bits of negative ones are flipped; + 0.0
    # makes -0.0 the 0.0 that it is equal to.
    bits_TE = (choice_TE + 0.0).view(torch.int32)
    ordered_TE = bits_TE ^ ((bits_TE >> 31) & 0x7FFFFFFF)
    rank_E = torch.arange(num - 1, -1, -1, device=choice_TE.device)
    packed_TE = (ordered_TE.to(torch.int64) << 16) | rank_E
    return num - 1 - (packed_TE.topk(k, dim=-1).values & 0xFFFF)


def _top_ids_by_sort(choice_TE: Tensor, k: int) -> Tensor:
    return choice_TE.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def _margin(choice_TE: Tensor, ids_TK: Tensor) -> Tensor:
    last_T = choice_TE.gather(1, ids_TK[:, -1:]).squeeze(1)
    best_left_T = choice_TE.scatter(1, ids_TK, float("-inf")).amax(dim=-1)
    return last_T - best_left_T
