"""The routed experts' MLPs for the experts held here.

Over all ranks that hold experts the results add up to the layer's.

Letters: T rows, K experts chosen per row, E experts held here, F intermediate columns held here, H columns, X pairs
(row, expert) of experts held here, sorted by expert.
"""

from ctypes import byref
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from narrows.ops.act_mul import act_mul
from narrows.ops.compiled import Pair, brgemm, kernels
from narrows.ops.mlp import mlp, mlp_reference
from narrows.ops.packed import ExpertStack, LinearWeight, PackedLinear, PackedStack

__all__ = ["SharedMlp", "experts_mlp", "experts_mlp_grouped", "experts_mlp_reference"]

SUMMED = 1 << 26
"""Values of rows' experts that `experts_mlp_grouped` weights and sums at once (256 MiB in float32)."""

SharedMlp = tuple[LinearWeight, LinearWeight] | tuple[LinearWeight, LinearWeight, Tensor | None, Tensor | None]
"""Of an MLP that every row goes through: gate and up, down, and where it has biases theirs, in that order."""


def experts_mlp(
    x_TH: Tensor,
    topk_ids_TK: Tensor,
    topk_weights_TK: Tensor,
    gate_up_EF2H: ExpertStack,
    down_EHF: ExpertStack,
    *,
    first_expert: int,
    shared: SharedMlp | None = None,
    hidden_act: str = "silu",
    out: Tensor | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """``y[t] = sum_k weight[t, k] * down_e (act(gate_e x[t]) * up_e x[t])`` over the chosen e that are held here.

    Shapes: x [T, H], ids [T, K] int64 or int32 (distinct in a row; an id outside ``first_expert <= id < first_expert +
    E`` adds nothing, and so does a dead row's -1), weights [T, K] float32, gate_up [E, 2F, H] (gate first), down [E,
    H, F] -> [T, H] in x's dtype (or ``out``'s: a float32 ``out`` receives the unrounded sum).

    ``shared``: the weights of an MLP (`mlp`) that every row goes through; it is added last, with weight 1.
    ``hidden_act``: a name of `act_mul.ACTIVATIONS`, for all of them.

    A row's sum is taken in float32, by rising expert id, and rounded once. The order does not depend on the other
    rows; the products may, unless ``batch_invariant`` asks for `linear`'s remedy (on CPU; elsewhere it does nothing).

    Weights packed for silu: one call (csrc/kernels/experts.cpp) for all experts; no product is rounded before the sum,
    and the bits are `linear`'s affair. Others on CPU: rows sorted by expert, a loop over the experts that were chosen,
    never over rows; the segment lengths are read on the host, which is free there. Elsewhere:
    `experts_mlp_grouped`. Measured on CPU the loop and that take the same time when all experts are held here (torch's
    grouped product is such a loop); with a share of them only the loop skips the rest.
    Source: transformers ``DeepseekV3Experts`` and its fused weights, which rounds after each expert instead.
    """
    if isinstance(gate_up_EF2H, PackedStack) and gate_up_EF2H.gated:
        assert isinstance(down_EHF, PackedStack) and hidden_act == "silu"
        return _packed_experts(
            x_TH,
            topk_ids_TK,
            topk_weights_TK,
            gate_up_EF2H,
            down_EHF,
            first_expert,
            shared,
            out,
            None if batch_invariant else brgemm(),
        )
    if x_TH.device.type != "cpu":
        assert isinstance(gate_up_EF2H, Tensor) and isinstance(down_EHF, Tensor), "these weights are for CPUs"
        return experts_mlp_grouped(
            x_TH,
            topk_ids_TK,
            topk_weights_TK,
            gate_up_EF2H,
            down_EHF,
            first_expert=first_expert,
            shared=shared,
            hidden_act=hidden_act,
            out=out,
        )
    num_experts, top_k = gate_up_EF2H.shape[0], topk_ids_TK.shape[1]
    expert_X = _local_expert(topk_ids_TK, first_expert, num_experts).flatten()
    counts = torch.bincount(expert_X, minlength=num_experts + 1)[:num_experts].tolist()
    pair_X = expert_X.argsort(stable=True)[: sum(counts)]
    row_X = pair_X // top_k
    weight_X1 = topk_weights_TK.flatten().index_select(0, pair_X).unsqueeze(-1)
    x_XH = x_TH.index_select(0, row_X)
    wide = torch.promote_types(x_TH.dtype, torch.float32)
    sum_TH = torch.zeros(x_TH.shape, dtype=wide, device=x_TH.device)
    expert_mlp = partial(mlp, hidden_act=hidden_act, batch_invariant=batch_invariant)
    start = 0
    for expert, count in enumerate(counts):
        if count == 0:
            continue
        segment = slice(start, start + count)
        y_XH = expert_mlp(x_XH[segment], gate_up_EF2H[expert], down_EHF[expert])
        # A row is at most once in an expert's segment: no two of these additions meet.
        sum_TH.index_add_(0, row_X[segment], y_XH.to(wide).mul_(weight_X1[segment]))
        start += count
    if shared is not None:
        sum_TH += expert_mlp(x_TH, *shared)
    return _rounded(sum_TH, x_TH.dtype, out)


def experts_mlp_grouped(
    x_TH: Tensor,
    topk_ids_TK: Tensor,
    topk_weights_TK: Tensor,
    gate_up_EF2H: Tensor,
    down_EHF: Tensor,
    *,
    first_expert: int,
    shared: SharedMlp | None = None,
    hidden_act: str = "silu",
    out: Tensor | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """`experts_mlp` with no shape that depends on data: all T * K pairs are laid out, foreign ones at the end.

    The segments' ends stay on the device (``torch.nn.functional.grouped_mm``). Needs rows of 16-byte multiples: H and
    F multiples of 8 in bf16, of 4 in float32. The pairs of a row are gathered by rising expert id and summed in float32
    at once, in an order that is torch's affair.
    """
    num_rows, top_k = topk_ids_TK.shape
    num_experts = gate_up_EF2H.shape[0]
    # By rising expert id within each row first, so that one order serves the products and the sums.
    expert_TK, order_TK = _local_expert(topk_ids_TK, first_expert, num_experts).sort(dim=-1, stable=True)
    weight_TK = topk_weights_TK.gather(1, order_TK)
    expert_X, pair_X = expert_TK.flatten().sort(stable=True)
    of_expert_E = torch.arange(num_experts, device=x_TH.device)
    ends_E = torch.searchsorted(expert_X, of_expert_E, right=True, out_int32=True)
    x_XH = x_TH.index_select(0, pair_X // top_k)
    inner_XF = act_mul(functional.grouped_mm(x_XH, gate_up_EF2H.transpose(1, 2), offs=ends_E), hidden_act)
    y_XH = functional.grouped_mm(inner_XF, down_EHF.transpose(1, 2), offs=ends_E)
    place_X = torch.empty_like(pair_X).index_copy_(0, pair_X, torch.arange(pair_X.shape[0], device=x_TH.device))
    sum_TH = torch.empty(x_TH.shape, dtype=torch.promote_types(x_TH.dtype, torch.float32), device=x_TH.device)
    is_foreign_TK1 = (expert_TK == num_experts).unsqueeze(-1)
    block = max(1, SUMMED // (top_k * x_TH.shape[1]))
    for start in range(0, num_rows, block):
        rows = slice(start, min(start + block, num_rows))
        y_TKH = y_XH.index_select(0, place_X[start * top_k : rows.stop * top_k]).view(-1, top_k, x_TH.shape[1])
        # What lies behind the last segment was never written: it must not reach the sum even times 0.
        y_TKH.masked_fill_(is_foreign_TK1[rows], 0)
        torch.sum(y_TKH * weight_TK[rows].unsqueeze(-1), dim=1, out=sum_TH[rows])
    if shared is not None:
        sum_TH += mlp(x_TH, *shared, hidden_act=hidden_act)
    return _rounded(sum_TH, x_TH.dtype, out)


def experts_mlp_reference(
    x_TH: Tensor,
    topk_ids_TK: Tensor,
    topk_weights_TK: Tensor,
    gate_up_EF2H: ExpertStack,
    down_EHF: ExpertStack,
    *,
    first_expert: int,
    shared: SharedMlp | None = None,
    hidden_act: str = "silu",
    out: Tensor | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """Twin of `experts_mlp`: every row through every expert held here, weighted by 0 where it was not chosen."""
    wide = torch.promote_types(x_TH.dtype, torch.float32)
    sum_TH = torch.zeros(x_TH.shape, dtype=wide, device=x_TH.device)
    for expert in range(gate_up_EF2H.shape[0]):
        weight_T = torch.where(topk_ids_TK == first_expert + expert, topk_weights_TK, 0).sum(dim=-1)
        y_TH = mlp_reference(x_TH, gate_up_EF2H[expert], down_EHF[expert], hidden_act=hidden_act)
        sum_TH += y_TH.to(wide) * weight_T.unsqueeze(-1)
    if shared is not None:
        sum_TH += mlp_reference(x_TH, *shared, hidden_act=hidden_act)
    return _rounded(sum_TH, x_TH.dtype, out)


def _local_expert(topk_ids_TK: Tensor, first_expert: int, num_experts: int) -> Tensor:
    """Each choice's expert counted from the first held here; ``num_experts`` for one held elsewhere or none."""
    local_TK = topk_ids_TK.to(torch.int64) - first_expert
    return local_TK.masked_fill_((local_TK < 0) | (local_TK >= num_experts), num_experts)


def _rounded(sum_TH: Tensor, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    return sum_TH.to(dtype) if out is None else out.copy_(sum_TH)


def _held_alike(experts: PackedStack, *others: LinearWeight | PackedStack) -> bool:
    """Whether one call multiplies all of them: in blocks of any kind, or of one kind, and gates beside their ups."""
    for other in others:
        if not isinstance(other, PackedLinear | PackedStack) or (experts.blocks is None) != (other.blocks is None):
            return False
        if experts.blocks is None and experts.given[0] != other.given[0]:
            return False
    return not isinstance(others[0], PackedLinear) or others[0].gated


def _packed_experts(
    x_TH: Tensor,
    topk_ids_TK: Tensor,
    topk_weights_TK: Tensor,
    gate_up: PackedStack,
    down: PackedStack,
    first_expert: int,
    shared: SharedMlp | None,
    out: Tensor | None,
    many: Pair | None,
) -> Tensor:
    compiled = kernels()
    num_rows, hidden = x_TH.shape
    assert compiled is not None and x_TH.dtype == torch.bfloat16 and topk_weights_TK.dtype == torch.float32
    assert hidden == gate_up.num_inputs and topk_ids_TK.dtype in (torch.int32, torch.int64)
    assert _held_alike(gate_up, down), "kinds of weights"
    if x_TH.stride(1) != 1:
        x_TH = x_TH.contiguous()
    if out is not None and (out.stride(1) != 1 or out.dtype not in (torch.bfloat16, torch.float32)):
        y_TH = _packed_experts(x_TH, topk_ids_TK, topk_weights_TK, gate_up, down, first_expert, shared, None, many)
        return out.copy_(y_TH)
    if shared is not None and (len(shared) == 4 or not _held_alike(gate_up, *shared[:2])):
        # The compiled call has no biases, and one kind of rows: that MLP is added to its unrounded sum.
        sum_TH = torch.empty((num_rows, hidden), dtype=torch.float32)
        _packed_experts(x_TH, topk_ids_TK, topk_weights_TK, gate_up, down, first_expert, None, sum_TH, many)
        return _rounded(sum_TH.add_(mlp(x_TH, *shared, batch_invariant=many is None)), x_TH.dtype, out)
    y_TH = torch.empty((num_rows, hidden), dtype=torch.bfloat16) if out is None else out
    assert y_TH.shape == (num_rows, hidden)
    ids_TK, weights_TK = topk_ids_TK.contiguous(), topk_weights_TK.contiguous()
    of_shared: tuple[object, object, int] = (None, None, 0)
    if shared is not None:
        shared_gate_up, shared_down = shared[0], shared[1]
        assert isinstance(shared_gate_up, PackedLinear) and isinstance(shared_down, PackedLinear)
        of_shared = (byref(shared_gate_up.address), byref(shared_down.address), shared_down.num_inputs)
    compiled.experts(
        y_TH.data_ptr(),
        y_TH.stride(0),
        y_TH.dtype == torch.float32,
        x_TH.data_ptr(),
        x_TH.stride(0),
        ids_TK.data_ptr(),
        ids_TK.dtype == torch.int64,
        weights_TK.data_ptr(),
        num_rows,
        ids_TK.shape[1],
        gate_up.given[0],
        byref(gate_up.address),
        byref(down.address),
        first_expert,
        gate_up.panels.shape[0],
        hidden,
        down.num_inputs,
        *of_shared,
        torch.get_num_threads(),
        many,
    )
    return y_TH
