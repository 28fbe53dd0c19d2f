"""The gated activation between the two matrices of an MLP.

Knows one tensor that holds gate and up side by side. Does not know which columns of the model they are.

Letters: T rows, F intermediate columns held here (``gate_up`` is 2F wide).
"""

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["silu_mul"]


def silu_mul(gate_up_TF2: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``silu(gate) * up`` where ``gate, up = gate_up[:, :F], gate_up[:, F:]``.

    Shapes: gate_up [T, 2F] -> [T, F], same dtype. silu is rounded to that dtype before the product, as in transformers'
    ``act_fn(gate_proj(x)) * up_proj(x)``. There is no faster path yet, hence no twin.
    Source: Shazeer, "GLU Variants Improve Transformer" (2020), SwiGLU.
    """
    gate_TF, up_TF = gate_up_TF2.chunk(2, dim=-1)
    return torch.mul(functional.silu(gate_TF), up_TF, out=out)
