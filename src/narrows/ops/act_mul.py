"""The gated activation between the two matrices of an MLP, by the names that ``hidden_act`` in config.json uses.

Letters: T rows, F intermediate columns held here (``gate_up`` is 2F wide).
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["ACTIVATIONS", "act_mul"]


def _gelu_fast(x: Tensor) -> Tensor:
    """The tanh approximation with its constant cut to ten digits."""
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


def _gelu_clipped(x: Tensor) -> Tensor:
    return functional.gelu(x).clamp(-10, 10)


def _laplace(x: Tensor) -> Tensor:
    """The normal distribution function of mean 0.707107 and deviation 0.282095."""
    return 0.5 * (1.0 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2.0))))


_gelu_tanh = partial(functional.gelu, approximate="tanh")

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "gelu": functional.gelu,
        "gelu_10": _gelu_clipped,
        "gelu_accurate": _gelu_tanh,
        "gelu_fast": _gelu_fast,
        "gelu_new": _gelu_tanh,
        "gelu_python": functional.gelu,
        "gelu_python_tanh": _gelu_tanh,
        "gelu_pytorch_tanh": _gelu_tanh,
        "hardswish": functional.hardswish,
        "laplace": _laplace,
        "leaky_relu": functional.leaky_relu,
        "linear": lambda x: x,
        "mish": functional.mish,
        "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
        "relu": functional.relu,
        "relu2": lambda x: functional.relu(x).square(),
        "relu6": functional.relu6,
        "sigmoid": torch.sigmoid,
        "silu": functional.silu,
        "sqrtsoftplus": lambda x: functional.softplus(x).sqrt(),
        "tanh": torch.tanh,
    }
)
"""Those of ``narrows.arch.model.HIDDEN_ACTS``."""


def act_mul(gate_up_TF2: Tensor, hidden_act: str = "silu", *, out: Tensor | None = None) -> Tensor:
    """``act(gate) * up`` where ``gate, up = gate_up[:, :F], gate_up[:, F:]``.

    Shapes: gate_up [T, 2F] -> [T, F], same dtype. The activation is rounded to that dtype before the product, as in
    transformers' ``act_fn(gate_proj(x)) * up_proj(x)``. There is no faster path yet, hence no twin.
    Source: Shazeer, "GLU Variants Improve Transformer" (2020); transformers ``ACT2FN``.
    """
    gate_TF, up_TF = gate_up_TF2.chunk(2, dim=-1)
    return torch.mul(ACTIVATIONS[hidden_act](gate_TF), up_TF, out=out)
