"""The core of grouped-query attention over paged caches of keys and values (multi-head and multi-query included).

``kv_index`` says which key and value head each query head reads, so heads may be split unevenly over ranks.

Letters: T rows, B decode rows, N query heads held here, K key/value heads held here, G query heads per key/value
head, D columns of a head, L tokens of a context, S slots.
"""

import ctypes
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from narrows.ops.causal_attention import causal_attention
from narrows.ops.compiled import brgemm, kernels
from narrows.ops.paged import PagedRows, PrefillSpan, row_contexts

__all__ = ["HeadBlock", "causal_heads", "gqa_attention", "gqa_attention_reference", "head_blocks"]


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadBlock:
    """Query heads [q_start, q_stop) that read key/value heads [kv_start, kv_stop), equally many each, in order."""

    q_start: int
    q_stop: int
    kv_start: int
    kv_stop: int


def gqa_attention(
    q_TND: Tensor,
    k_cache_SKD: Tensor,
    v_cache_SKD: Tensor,
    rows: PagedRows,
    kv_index: tuple[int, ...],
    scale: float,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Per query head n ``softmax(scale * q k^T) v`` over the keys and values of head ``kv_index[n]``.

    Shapes: q [T, N, D], caches [S, K, D] (this step's rows already written), ``kv_index`` of length N with values
    below K -> [T, N * D] in q's dtype. Softmax in float32 (float64 for float64).

    Keys and values are never repeated per query head: heads that read the same one are more rows of the same product
    (`head_blocks`; an even split is one block).

    bf16 on CPUs with products for it: compiled kernels, which read decode rows' slots in place, each row by itself (its
    bits do not depend on others), and spans without a window in blocks of tokens (docs/kernels.md). Else decode rows
    go through ``scaled_dot_product_attention`` in `PagedRows.decode_groups` (1.1 to 3 times faster than products here,
    and 16 times faster than its own ``enable_gqa`` in bf16), prefill spans through `causal_attention`.
    Source: Ainslie et al., "GQA" (2023); transformers ``LlamaAttention``, ``Qwen3Attention``.
    """
    num_rows, num_heads, head_dim = q_TND.shape
    if out is None:
        out = q_TND.new_empty((num_rows, num_heads * head_dim))
    out_TND = out.view(num_rows, num_heads, head_dim)
    compiled, blocks = _is_compiled(q_TND, k_cache_SKD, v_cache_SKD, out_TND), head_blocks(kv_index)
    for span in rows.prefills:
        of_span = slice(span.row_start, span.row_stop)
        if compiled and span.window is None:
            causal_heads(q_TND[of_span], k_cache_SKD, v_cache_SKD, span, kv_index, scale, out_TND[of_span])
        else:
            _prefill(q_TND[of_span], k_cache_SKD, v_cache_SKD, span, blocks, scale, out_TND[of_span])
    if compiled and rows.decode_groups:
        _compiled_decode(q_TND, k_cache_SKD, v_cache_SKD, rows, kv_index, scale, out_TND)
    elif rows.decode_groups:
        if rows.prefills:
            o_BND = _decode(q_TND[rows.decode_rows_B], k_cache_SKD, v_cache_SKD, rows, blocks, scale)
            out_TND.index_copy_(0, rows.decode_rows_B, o_BND)
        else:
            _decode(q_TND, k_cache_SKD, v_cache_SKD, rows, blocks, scale, out=out_TND)
    return out


def gqa_attention_reference(
    q_TND: Tensor,
    k_cache_SKD: Tensor,
    v_cache_SKD: Tensor,
    rows: PagedRows,
    kv_index: tuple[int, ...],
    scale: float,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Twin of `gqa_attention`: every row on its own, keys and values repeated, in float32, rounded at the end."""
    wide = torch.promote_types(q_TND.dtype, torch.float32)
    y_TND = torch.zeros_like(q_TND, memory_format=torch.contiguous_format)
    for row, slots_L in row_contexts(rows):
        k_NLD = k_cache_SKD[slots_L].to(wide)[:, list(kv_index)].transpose(0, 1)
        v_NLD = v_cache_SKD[slots_L].to(wide)[:, list(kv_index)].transpose(0, 1)
        score_N1L = q_TND[row].to(wide).unsqueeze(1) @ k_NLD.transpose(1, 2) * scale
        y_TND[row] = (score_N1L.softmax(dim=-1) @ v_NLD).squeeze(1)
    y = y_TND.flatten(1)
    return y if out is None else out.copy_(y)


def causal_heads(
    q_TND: Tensor,
    k_cache_SKD: Tensor,
    v_cache_SKV: Tensor,
    span: PrefillSpan,
    kv_index: tuple[int, ...],
    scale: float,
    out_TNV: Tensor,
) -> None:
    """`gqa_attention` of one span by the compiled kernel; key and value columns may differ in number."""
    compiled = kernels()
    assert compiled is not None
    compiled.gqa_prefill(
        *_strided(out_TNV),
        *_strided(q_TND),
        *_strided(k_cache_SKD),
        *_strided(v_cache_SKV),
        span.slots_L.data_ptr(),
        span.context_len,
        q_TND.shape[0],
        _as_int32(kv_index),
        len(kv_index),
        q_TND.shape[2],
        v_cache_SKV.shape[2],
        scale,
        torch.get_num_threads(),
        brgemm(),
    )


def _compiled_decode(
    q_TND: Tensor,
    k_cache_SKD: Tensor,
    v_cache_SKD: Tensor,
    rows: PagedRows,
    kv_index: tuple[int, ...],
    scale: float,
    out_TND: Tensor,
) -> None:
    compiled = kernels()
    assert compiled is not None
    compiled.gqa_decode(
        *_strided(out_TND),
        *_strided(q_TND),
        *_strided(k_cache_SKD),
        *_strided(v_cache_SKD),
        rows.decode_slots_BL.data_ptr(),
        rows.decode_slots_BL.stride(0),
        rows.decode_lens_B.data_ptr(),
        rows.decode_rows_B.data_ptr() if rows.prefills else None,
        rows.decode_lens_B.shape[0],
        _as_int32(kv_index),
        len(kv_index),
        q_TND.shape[2],
        v_cache_SKD.shape[2],
        scale,
        torch.get_num_threads(),
    )


def _is_compiled(*tensors: Tensor) -> bool:
    return kernels() is not None and all(x.dtype == torch.bfloat16 and x.is_cpu and x.stride(2) == 1 for x in tensors)


def _strided(x_XND: Tensor) -> tuple[int, int, int]:
    """Address, stride of rows or slots, stride of heads."""
    return x_XND.data_ptr(), x_XND.stride(0), x_XND.stride(1)


@cache
def _as_int32(numbers: tuple[int, ...]) -> ctypes.Array[ctypes.c_int32]:
    return (ctypes.c_int32 * len(numbers))(*numbers)


def head_blocks(kv_index: tuple[int, ...]) -> tuple[HeadBlock, ...]:
    """``kv_index`` cut into blocks of neighbouring query heads that read neighbouring heads in equal numbers.

    >>> [(b.q_start, b.q_stop, b.kv_start, b.kv_stop) for b in head_blocks((0, 0, 1, 1, 2))]
    [(0, 4, 0, 2), (4, 5, 2, 3)]
    """
    blocks: list[HeadBlock] = []
    start = 0
    for stop in range(1, len(kv_index) + 1):
        if stop < len(kv_index) and kv_index[stop] == kv_index[start]:
            continue
        kv_head, last = kv_index[start], blocks[-1] if blocks else None
        if (
            last is not None
            and last.kv_stop == kv_head
            and (last.q_stop - last.q_start) == (stop - start) * (last.kv_stop - last.kv_start)
        ):
            blocks[-1] = HeadBlock(q_start=last.q_start, q_stop=stop, kv_start=last.kv_start, kv_stop=kv_head + 1)
        else:
            blocks.append(HeadBlock(q_start=start, q_stop=stop, kv_start=kv_head, kv_stop=kv_head + 1))
        start = stop
    return tuple(blocks)


def _prefill(
    q_TND: Tensor,
    k_cache_SKD: Tensor,
    v_cache_SKD: Tensor,
    span: PrefillSpan,
    blocks: tuple[HeadBlock, ...],
    scale: float,
    out_TND: Tensor,
) -> None:
    k_KLD = k_cache_SKD.index_select(0, span.slots_L).transpose(0, 1)
    v_KLD = v_cache_SKD.index_select(0, span.slots_L).transpose(0, 1)
    for block in blocks:
        heads, kv_heads = slice(block.q_start, block.q_stop), slice(block.kv_start, block.kv_stop)
        shape = (block.kv_stop - block.kv_start, -1)
        q_KGTD = torch.unflatten(q_TND[:, heads], 1, shape).permute(1, 2, 0, 3)
        out_TKGD = torch.unflatten(out_TND[:, heads], 1, shape)
        causal_attention(q_KGTD, k_KLD[kv_heads], v_KLD[kv_heads], scale, window=span.window, out=out_TKGD)


def _decode(
    q_BND: Tensor,
    k_cache_SKD: Tensor,
    v_cache_SKD: Tensor,
    rows: PagedRows,
    blocks: tuple[HeadBlock, ...],
    scale: float,
    *,
    out: Tensor | None = None,
) -> Tensor:
    num_kv, head_dim = k_cache_SKD.shape[1:]
    if out is None:
        out = torch.empty(q_BND.shape, dtype=q_BND.dtype, device=q_BND.device)
    for group in rows.decode_groups:
        of_group = slice(group.start, group.stop)
        slots_BL = rows.decode_slots_BL[of_group, : group.max_len]
        mask_B11L = None
        if rows.decode_bias_BL is not None:
            mask_B11L = rows.decode_bias_BL[of_group, None, None, : group.max_len]
        elif group.stop - group.start > 1:
            tokens_L = torch.arange(group.max_len, device=q_BND.device)
            mask_B11L = (tokens_L < rows.decode_lens_B[of_group].unsqueeze(-1))[:, None, None]
        # functional.embedding, not cache[slots]: an eighth of the time on CPU.
        k_BKLD, v_BKLD = (
            functional.embedding(slots_BL, cache_SKD.flatten(1)).view(*slots_BL.shape, num_kv, head_dim).transpose(1, 2)
            for cache_SKD in (k_cache_SKD, v_cache_SKD)
        )
        for block in blocks:
            heads, kv_heads = slice(block.q_start, block.q_stop), slice(block.kv_start, block.kv_stop)
            shape = (block.kv_stop - block.kv_start, -1)
            q_BKGD = torch.unflatten(q_BND[of_group, heads], 1, shape)
            o_BKGD = functional.scaled_dot_product_attention(
                q_BKGD, k_BKLD[:, kv_heads], v_BKLD[:, kv_heads], attn_mask=mask_B11L, scale=scale
            )
            out[of_group, heads] = o_BKGD.flatten(1, 2)
    return out
