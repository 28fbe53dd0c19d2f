"""Rotary embedding of a step's queries and keys together with the write of its slots: one pass over each row.

Letters: T rows, N query heads, K key/value heads, D columns of a head, P rotated columns, R kv_lora_rank, C = R + P,
S slots.
"""

import torch
from torch import Tensor

from narrows.ops.compiled import kernels
from narrows.ops.paged import write_cache
from narrows.ops.rms_norm import rms_norm
from narrows.ops.rope import apply_rope, compiled_types

__all__ = ["rope_write_heads", "rope_write_heads_reference", "rope_write_latents", "rope_write_latents_reference"]


def rope_write_latents(
    q_pe_TNP: Tensor,
    latents_TC: Tensor,
    cos_TD2: Tensor,
    sin_TD2: Tensor,
    cache_SC: Tensor,
    slots_T: Tensor,
    *,
    interleaved: bool = True,
) -> None:
    """Rotates q_pe in place; writes each row's latent and its rotated key to its slot: ``cache[slots[t]]``.

    Shapes: q_pe [T, N, P] (any strides), latents [T, C] (latent, then the key that all heads share), cos and sin
    [T, P/2], cache [S, C], slots [T] int64. Pairs of neighbours are rotated (``interleaved`` false: halves), and left
    in halves; the bits are those of `apply_rope`. Halves take a pass more: no published checkpoint has them.
    """
    compiled = kernels()
    types = compiled_types(q_pe_TNP, cos_TD2, sin_TD2)
    if (
        compiled is None
        or types is None
        or not interleaved
        or latents_TC.stride(1) != 1
        or not (q_pe_TNP.dtype == latents_TC.dtype == cache_SC.dtype)
    ):
        return rope_write_latents_reference(
            q_pe_TNP, latents_TC, cos_TD2, sin_TD2, cache_SC, slots_T, interleaved=interleaved
        )
    num_rows, num_heads, rope_dim = q_pe_TNP.shape
    compiled.rope_latents(
        q_pe_TNP.data_ptr(),
        q_pe_TNP.stride(0),
        q_pe_TNP.stride(1),
        latents_TC.data_ptr(),
        latents_TC.stride(0),
        cos_TD2.data_ptr(),
        sin_TD2.data_ptr(),
        cache_SC.data_ptr(),
        cache_SC.stride(0),
        slots_T.data_ptr(),
        num_rows,
        num_heads,
        latents_TC.shape[1] - rope_dim,
        rope_dim // 2,
        *types,
        torch.get_num_threads(),
    )


def rope_write_latents_reference(
    q_pe_TNP: Tensor,
    latents_TC: Tensor,
    cos_TD2: Tensor,
    sin_TD2: Tensor,
    cache_SC: Tensor,
    slots_T: Tensor,
    *,
    interleaved: bool = True,
) -> None:
    """Twin of `rope_write_latents`, of the ops it is made of."""
    rank = latents_TC.shape[1] - q_pe_TNP.shape[2]
    apply_rope(q_pe_TNP, cos_TD2, sin_TD2, interleaved=interleaved, out=q_pe_TNP)
    k_pe_T1P = apply_rope(latents_TC[:, None, rank:], cos_TD2, sin_TD2, interleaved=interleaved)
    write_cache(cache_SC, torch.cat((latents_TC[:, :rank], k_pe_T1P.squeeze(1)), dim=-1), slots_T)


def rope_write_heads(
    qkv_TND: Tensor,
    cos_TD2: Tensor,
    sin_TD2: Tensor,
    k_cache_SKD: Tensor,
    v_cache_SKD: Tensor,
    slots_T: Tensor,
    *,
    q_norm_D: Tensor | None = None,
    k_norm_D: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """The rotated queries, [T, N, D], a view of ``qkv``; keys rotated and values as they are go to their slots.

    Shapes: qkv [T, N + 2K, D] (query, key, value heads; changed in place), cos and sin [T, D/2], caches [S, K, D],
    slots [T] int64. With weights [D] each query and key head is normed before (see `rms_norm`). Halves are rotated, of
    the columns that cos and sin are for: a narrower table rotates the first ones and leaves the rest.
    """
    compiled = kernels()
    types = compiled_types(qkv_TND, cos_TD2, sin_TD2)
    num_kv, dim = k_cache_SKD.shape[1:]
    num_q = qkv_TND.shape[1] - 2 * num_kv
    if (
        compiled is None
        or types is None
        or not (k_cache_SKD.is_contiguous() and v_cache_SKD.is_contiguous())
        or qkv_TND.stride(1) != dim
        or 2 * cos_TD2.shape[1] != dim
        or qkv_TND.dtype != k_cache_SKD.dtype
    ):
        return rope_write_heads_reference(
            qkv_TND, cos_TD2, sin_TD2, k_cache_SKD, v_cache_SKD, slots_T, q_norm_D=q_norm_D, k_norm_D=k_norm_D, eps=eps
        )
    compiled.rope_heads(
        qkv_TND.data_ptr(),
        qkv_TND.stride(0),
        None if q_norm_D is None else q_norm_D.data_ptr(),
        None if k_norm_D is None else k_norm_D.data_ptr(),
        eps,
        cos_TD2.data_ptr(),
        sin_TD2.data_ptr(),
        k_cache_SKD.data_ptr(),
        v_cache_SKD.data_ptr(),
        slots_T.data_ptr(),
        qkv_TND.shape[0],
        num_q,
        num_kv,
        dim,
        *types,
        torch.get_num_threads(),
    )
    return qkv_TND[:, :num_q]


def rope_write_heads_reference(
    qkv_TND: Tensor,
    cos_TD2: Tensor,
    sin_TD2: Tensor,
    k_cache_SKD: Tensor,
    v_cache_SKD: Tensor,
    slots_T: Tensor,
    *,
    q_norm_D: Tensor | None = None,
    k_norm_D: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Twin of `rope_write_heads`, of the ops it is made of."""
    num_kv = k_cache_SKD.shape[1]
    q_TND, k_TKD, v_TKD = qkv_TND.tensor_split((qkv_TND.shape[1] - 2 * num_kv, qkv_TND.shape[1] - num_kv), dim=1)
    if q_norm_D is not None and k_norm_D is not None:
        q_TND.copy_(rms_norm(q_TND, q_norm_D, eps))
        k_TKD.copy_(rms_norm(k_TKD, k_norm_D, eps))
    rotated_TND = qkv_TND[:, : qkv_TND.shape[1] - num_kv, : 2 * cos_TD2.shape[1]]
    apply_rope(rotated_TND, cos_TD2, sin_TD2, interleaved=False, out=rotated_TND)
    write_cache(k_cache_SKD, k_TKD, slots_T)
    write_cache(v_cache_SKD, v_TKD, slots_T)
    return q_TND
