"""A gated MLP: two products with the activation between them.

Letters: T rows, H columns, F inner columns held here.
"""

import torch
from torch import Tensor

from narrows.ops.act_mul import act_mul
from narrows.ops.compiled import Pair, brgemm, kernels
from narrows.ops.linear import linear
from narrows.ops.packed import LinearWeight, PackedLinear, plain

__all__ = ["mlp", "mlp_reference"]


def mlp(
    x_TH: Tensor,
    gate_up_F2H: LinearWeight,
    down_HF: LinearWeight,
    gate_up_bias_F2: Tensor | None = None,
    down_bias_H: Tensor | None = None,
    *,
    hidden_act: str = "silu",
    out: Tensor | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """``down(act(gate x + bias) * (up x + bias)) + bias``.

    Shapes: x [T, H], gate_up [2F, H] (gate first), down [H, F], biases [2F] and [H] -> [T, H] in x's dtype.
    ``hidden_act``: a name of `act_mul.ACTIVATIONS`.

    With a gate-and-up weight packed for it, silu is taken of the unrounded products and rounded once, and nothing 2F
    wide is ever written. Else gate and up, the activation, and their product are rounded each, as transformers' modules
    do.
    """
    if isinstance(gate_up_F2H, PackedLinear) and gate_up_F2H.gated:
        assert hidden_act == "silu", "a weight whose gates and ups are packed together is for silu"
        inner_TF = _packed_gate_up(x_TH, gate_up_F2H, gate_up_bias_F2, None if batch_invariant else brgemm())
    else:
        gate_up_TF2 = linear(x_TH, gate_up_F2H, gate_up_bias_F2, batch_invariant=batch_invariant)
        inner_TF = act_mul(gate_up_TF2, hidden_act)
    return linear(inner_TF, down_HF, down_bias_H, out=out, batch_invariant=batch_invariant)


def mlp_reference(
    x_TH: Tensor,
    gate_up_F2H: LinearWeight,
    down_HF: LinearWeight,
    gate_up_bias_F2: Tensor | None = None,
    down_bias_H: Tensor | None = None,
    *,
    hidden_act: str = "silu",
    out: Tensor | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """Twin of `mlp`, each step rounded."""
    gate_up_TF2 = torch.nn.functional.linear(x_TH, plain(gate_up_F2H).to(x_TH.dtype), gate_up_bias_F2)
    inner_TF = act_mul(gate_up_TF2, hidden_act)
    y_TH = torch.nn.functional.linear(inner_TF, plain(down_HF).to(x_TH.dtype), down_bias_H)
    return y_TH if out is None else out.copy_(y_TH)


def _packed_gate_up(x_TH: Tensor, weight: PackedLinear, bias_F2: Tensor | None, many: Pair | None) -> Tensor:
    compiled = kernels()
    assert compiled is not None and weight.gated and x_TH.dtype == torch.bfloat16
    num_rows, num_inputs = x_TH.shape
    assert num_inputs == weight.num_inputs, f"{num_inputs} columns, but a weight of {weight.num_inputs} inputs"
    if x_TH.stride(1) != 1:
        x_TH = x_TH.contiguous()
    num_inner = weight.num_outputs // 2
    inner_TF = torch.empty((num_rows, num_inner), dtype=torch.bfloat16)
    compiled.gate_up(
        inner_TF.data_ptr(),
        num_inner,
        x_TH.data_ptr(),
        x_TH.stride(0),
        *weight.given,
        None if bias_F2 is None else bias_F2.data_ptr(),
        num_rows,
        num_inner,
        num_inputs,
        torch.get_num_threads(),
        many,
    )
    return inner_TF
