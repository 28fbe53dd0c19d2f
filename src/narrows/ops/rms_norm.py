"""RMSNorm, alone or after the residual addition.

Letters: T rows, H columns.
"""

import torch
from torch import Tensor
from torch.nn import functional

from narrows.ops.compiled import kernels

__all__ = [
    "add_rms_norm",
    "add_rms_norm_reference",
    "latent_norm",
    "latent_norm_reference",
    "rms_norm",
    "rms_norm_reference",
]

COMPILED_DTYPES = (torch.bfloat16, torch.float32)


def rms_norm(x_TH: Tensor, weight_H: Tensor, eps: float, *, out: Tensor | None = None) -> Tensor:
    """``weight * cast(x / sqrt(mean(x^2) + eps))``, the cast being to x's dtype.

    Shapes: x [..., H], weight [H] -> [..., H] in x's dtype. The norm is taken in float32 (float64 for float64 input)
    and rounded to x's dtype BEFORE the weight multiplies it, as transformers does; ``torch.nn.functional.rms_norm``
    multiplies first and so differs by one unit in the last place in a quarter of all bf16 values. ``out`` may be
    ``x_TH`` itself. Against the twin: float32 within 1e-6 relative; bf16 the same bits but for about 1 value in 10^4,
    one unit apart.
    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019); transformers ``DeepseekV3RMSNorm``.
    """
    compiled = kernels()
    if compiled is not None and _compiled(x_TH, weight_H, 3) and (out is None or out.stride(-1) == 1):
        if out is None:
            out = torch.empty_like(x_TH)
        assert out.shape == x_TH.shape and out.dtype == x_TH.dtype
        heads, head_stride, out_head_stride = 1, 0, 0
        if x_TH.dim() == 3:
            heads, head_stride, out_head_stride = x_TH.shape[1], x_TH.stride(1), out.stride(1)
        compiled.rms_norm(
            out.data_ptr(),
            out.stride(0),
            out_head_stride,
            x_TH.data_ptr(),
            x_TH.stride(0),
            head_stride,
            weight_H.data_ptr(),
            x_TH.shape[0],
            heads,
            x_TH.shape[-1],
            eps,
            x_TH.dtype == torch.float32,
            torch.get_num_threads(),
        )
        return out
    if not x_TH.is_cpu:
        return rms_norm_in_two(x_TH, weight_H, eps, out=out)
    # The norm without a squared copy of x: 7 times faster than pow().mean() for 256 x 7168 float32 on one thread.
    wide_TH = x_TH.to(torch.promote_types(x_TH.dtype, torch.float32))
    norm_T1 = torch.linalg.vector_norm(wide_TH, dim=-1, keepdim=True)
    scale_T1 = norm_T1.square_().div_(x_TH.shape[-1]).add_(eps).rsqrt_()
    if out is None:
        out = torch.empty_like(x_TH)
    if wide_TH.dtype == x_TH.dtype:
        torch.mul(wide_TH, scale_T1, out=out)
    else:
        out.copy_(wide_TH.mul_(scale_T1))
    return out.mul_(weight_H)


def rms_norm_in_two(x_TH: Tensor, weight_H: Tensor, eps: float, *, out: Tensor | None = None) -> Tensor:
    """`rms_norm` by two kernels of a GPU: torch's norm without a weight, which rounds as the reference does, then the
    weight's product."""
    return torch.mul(functional.rms_norm(x_TH, (x_TH.shape[-1],), None, eps), weight_H, out=out)


def rms_norm_reference(x_TH: Tensor, weight_H: Tensor, eps: float, *, out: Tensor | None = None) -> Tensor:
    """Twin of `rms_norm`: the steps as transformers writes them."""
    wide_TH = x_TH.to(torch.promote_types(x_TH.dtype, torch.float32))
    wide_TH = wide_TH * torch.rsqrt(wide_TH.square().mean(dim=-1, keepdim=True) + eps)
    y_TH = weight_H * wide_TH.to(x_TH.dtype)
    return y_TH if out is None else out.copy_(y_TH)


def add_rms_norm(
    x_TH: Tensor,
    residual_TH: Tensor,
    weight_H: Tensor,
    eps: float,
    *,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``residual' = x + residual``, then `rms_norm` of it: returns ``(normed, residual')``.

    Shapes: x and residual [T, H] of one dtype, weight [H]; both results like x. The addition is in x's dtype and the
    norm reads its rounded result, as in transformers' decoder layers. ``residual_out`` may be ``residual_TH`` (in
    place) or ``x_TH``; ``out`` may be ``x_TH`` if ``residual_out`` is not.
    """
    compiled = kernels()
    if (
        compiled is not None
        and _compiled(x_TH, weight_H, 2)
        and x_TH.dtype == residual_TH.dtype
        and x_TH.is_contiguous()
        and residual_TH.is_contiguous()
        and (out is None or out.is_contiguous())
        and (residual_out is None or residual_out.is_contiguous())
    ):
        normed_TH = torch.empty_like(x_TH) if out is None else out
        new_residual_TH = torch.empty_like(x_TH) if residual_out is None else residual_out
        num_rows, width = x_TH.shape
        for result in (normed_TH, new_residual_TH):
            assert result.shape == x_TH.shape and result.dtype == x_TH.dtype
        compiled.add_rms_norm(
            normed_TH.data_ptr(),
            new_residual_TH.data_ptr(),
            x_TH.data_ptr(),
            residual_TH.data_ptr(),
            weight_H.data_ptr(),
            num_rows,
            width,
            eps,
            x_TH.dtype == torch.float32,
            torch.get_num_threads(),
        )
        return normed_TH, new_residual_TH
    new_residual_TH = torch.add(x_TH, residual_TH, out=residual_out)
    return rms_norm(new_residual_TH, weight_H, eps, out=out), new_residual_TH


def add_rms_norm_reference(
    x_TH: Tensor,
    residual_TH: Tensor,
    weight_H: Tensor,
    eps: float,
    *,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Twin of `add_rms_norm`."""
    new_residual_TH = x_TH + residual_TH
    if residual_out is not None:
        new_residual_TH = residual_out.copy_(new_residual_TH)
    return rms_norm_reference(new_residual_TH, weight_H, eps, out=out), new_residual_TH


def latent_norm(
    latent_TC: Tensor, q_weight_Q: Tensor | None, kv_weight_R: Tensor, eps: float, *, out: Tensor | None = None
) -> Tensor:
    """`rms_norm` of the first Q columns and of the R after them, each alone; the rest is copied.

    Shapes: latent [T, C], q_weight [Q] or None (Q is 0), kv_weight [R] with Q + R <= C -> [T, C] in latent's dtype.
    Source: transformers ``DeepseekV3Attention`` (``q_a_layernorm``, ``kv_a_layernorm``, the rotary key unnormed).
    """
    compiled = kernels()
    if compiled is None or out is not None or not _compiled(latent_TC, kv_weight_R, 2):
        return latent_norm_reference(latent_TC, q_weight_Q, kv_weight_R, eps, out=out)
    num_rows, width = latent_TC.shape
    normed_TC = torch.empty((num_rows, width), dtype=latent_TC.dtype)
    compiled.latent_norm(
        normed_TC.data_ptr(),
        latent_TC.data_ptr(),
        latent_TC.stride(0),
        None if q_weight_Q is None else q_weight_Q.data_ptr(),
        0 if q_weight_Q is None else q_weight_Q.shape[0],
        kv_weight_R.data_ptr(),
        kv_weight_R.shape[0],
        width,
        num_rows,
        eps,
        latent_TC.dtype == torch.float32,
        torch.get_num_threads(),
    )
    return normed_TC


def latent_norm_reference(
    latent_TC: Tensor, q_weight_Q: Tensor | None, kv_weight_R: Tensor, eps: float, *, out: Tensor | None = None
) -> Tensor:
    """Twin of `latent_norm`, and its path where nothing is compiled: one norm after the other."""
    normed_TC = torch.empty_like(latent_TC) if out is None else out
    q = 0 if q_weight_Q is None else q_weight_Q.shape[0]
    kv = q + kv_weight_R.shape[0]
    if q_weight_Q is not None:
        rms_norm(latent_TC[:, :q], q_weight_Q, eps, out=normed_TC[:, :q])
    rms_norm(latent_TC[:, q:kv], kv_weight_R, eps, out=normed_TC[:, q:kv])
    normed_TC[:, kv:] = latent_TC[:, kv:]
    return normed_TC


def _compiled(x_TH: Tensor, weight_H: Tensor, most_dims: int) -> bool:
    """Whether the compiled norms take these: on CPU, one dtype, columns side by side."""
    return (
        x_TH.is_cpu
        and x_TH.dtype in COMPILED_DTYPES
        and weight_H.dtype == x_TH.dtype
        and 2 <= x_TH.dim() <= most_dims
        and x_TH.stride(-1) == 1
        and weight_H.stride(0) == 1
    )
