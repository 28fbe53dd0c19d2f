"""Softmax attention of the last rows of one context over all of it: the core of every prefill.

Letters: K key/value heads, G query heads per key/value head, T rows (the context's last), L tokens of the context, D
query and key columns, V value columns, M rows of one block.
"""

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

__all__ = ["causal_attention", "causal_attention_reference", "is_fused"]

BLOCK_ROWS = 64
"""Rows per block: a block's scores then stay near the cache, and causality skips nearly half of the products."""

BLOCK_SCORES = 1 << 22
"""Scores held at once (16 MiB in float32), over heads and rows."""


def causal_attention(
    q_KGTD: Tensor,
    k_KLD: Tensor,
    v_KLV: Tensor,
    scale: float,
    *,
    window: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``softmax(scale * q k^T + mask) v`` where row t sees tokens 0 .. L - T + t, or the last ``window`` of them.

    Shapes: q [K, G, T, D], k [K, L, D], v [K, L, V] with 1 <= T <= L, any strides, -> [T, K, G, V] in q's dtype.
    Scores and softmax in float32 (float64 for float64), probabilities rounded to q's dtype before they meet v.

    Why not ``scaled_dot_product_attention``: on CPU (torch 2.13, one AVX-512 thread) this is faster at every size
    tried, e.g. 16 heads of 192/128, 512 rows: 17 ms against 34 (float32), 13 against 34 (bf16, whose CPU kernel does
    not use the bf16 instructions); and with V != D it builds the whole score matrix or needs v padded to D.
    On GPUs, in 16 bits, it is that function, whose kernels hold no scores; in float32 the blocks below run there too,
    for their accuracy.
    Source: Vaswani et al. (2017); the block order of Rabe and Staats, "Self-attention does not need O(n^2) memory"
    (2021).
    """
    num_kv, group, num_rows, _ = q_KGTD.shape
    context_len, value_dim = v_KLV.shape[1:]
    if out is None:
        out = q_KGTD.new_empty((num_rows, num_kv, group, value_dim))
    if is_fused(q_KGTD):
        return _fused(q_KGTD, k_KLD, v_KLV, scale, window, out)
    wide = torch.promote_types(q_KGTD.dtype, torch.float32)
    block_rows = max(1, min(BLOCK_ROWS, num_rows, BLOCK_SCORES // max(1, group * context_len)))
    block_heads = max(1, min(num_kv, BLOCK_SCORES // max(1, group * block_rows * context_len)))
    buffer = torch.empty(block_heads * group * block_rows * context_len, dtype=wide, device=q_KGTD.device)
    above_diagonal_MM = torch.ones((block_rows, block_rows), dtype=torch.bool, device=q_KGTD.device).triu_(1)
    for head in range(0, num_kv, block_heads):
        heads = slice(head, min(head + block_heads, num_kv))
        num_heads = heads.stop - heads.start
        kt_KDL = k_KLD[heads].to(wide).transpose(1, 2)
        for start in range(0, num_rows, block_rows):
            stop = min(start + block_rows, num_rows)
            seen, rows = context_len - num_rows + stop, stop - start
            first = 0 if window is None else max(0, seen - rows + 1 - window)  # the oldest token that any row sees
            q_KMD = (q_KGTD[heads, :, start:stop].to(wide) * scale).flatten(1, 2)
            width = seen - first
            score_KML = buffer[: num_heads * group * rows * width].view(num_heads, group * rows, width)
            torch.bmm(q_KMD, kt_KDL[:, :, first:seen], out=score_KML)
            # Only the block's own tokens can lie in some row's future.
            score_KGML = torch.unflatten(score_KML, 1, (group, rows))
            score_KGML[..., width - rows :].masked_fill_(above_diagonal_MM[:rows, :rows], float("-inf"))
            if window is not None:
                score_KGML.masked_fill_(_left_behind(rows, width, window, score_KML.device), float("-inf"))
            p_KML = torch.softmax(score_KML, dim=-1, out=score_KML).to(q_KGTD.dtype)
            o_KMV = torch.bmm(p_KML, v_KLV[heads, first:seen])
            out[start:stop, heads] = torch.unflatten(o_KMV, 1, (group, rows)).permute(2, 0, 1, 3)
    return out


def is_fused(q: Tensor) -> bool:
    """Whether these queries are attended to by one kernel, which holds no scores."""
    return q.device.type != "cpu" and q.dtype.itemsize == 2


def _left_behind(num_rows: int, num_tokens: int, window: int, device: torch.device) -> Tensor:
    """Which tokens lie before the windows of the last ``num_rows`` of ``num_tokens`` tokens: [rows, tokens]."""
    return torch.ones((num_rows, num_tokens), dtype=torch.bool, device=device).tril_(num_tokens - num_rows - window)


def _fused(q_KGTD: Tensor, k_KLD: Tensor, v_KLV: Tensor, scale: float, window: int | None, out: Tensor) -> Tensor:
    """One kernel for all heads and rows, all of one dtype. A mask of rows x context is made for a window alone."""
    shape = (q_KGTD.shape[0], q_KGTD.shape[1])
    k_KGLD, v_KGLV = (x.unsqueeze(1).expand(*shape, *x.shape[1:]) for x in (k_KLD, v_KLV))
    num_rows, context_len = q_KGTD.shape[2], k_KLD.shape[1]
    if window is not None:
        sees_TL = torch.ones((num_rows, context_len), dtype=torch.bool, device=q_KGTD.device)
        sees_TL = sees_TL.tril_(context_len - num_rows)
        sees_TL &= ~_left_behind(num_rows, context_len, window, q_KGTD.device)
        o_KGTV = functional.scaled_dot_product_attention(q_KGTD, k_KGLD, v_KGLV, attn_mask=sees_TL, scale=scale)
    elif num_rows < context_len:
        o_KGTV = _behind_a_prefix(q_KGTD, k_KGLD, v_KGLV, scale)
    else:
        o_KGTV = functional.scaled_dot_product_attention(q_KGTD, k_KGLD, v_KGLV, is_causal=True, scale=scale)
    return out.copy_(o_KGTV.permute(2, 0, 1, 3))


def _behind_a_prefix(q_KGTD: Tensor, k_KGLD: Tensor, v_KGLV: Tensor, scale: float) -> Tensor:
    """Row t sees tokens 0 .. L - T + t: torch's own description of that, with which its kernels need no mask."""
    sees = causal_lower_right(q_KGTD.shape[2], k_KGLD.shape[2])
    return functional.scaled_dot_product_attention(q_KGTD, k_KGLD, v_KGLV, attn_mask=sees, scale=scale)


def causal_attention_reference(
    q_KGTD: Tensor,
    k_KLD: Tensor,
    v_KLV: Tensor,
    scale: float,
    *,
    window: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Twin of `causal_attention`: all scores at once, in float32 throughout, rounded at the end."""
    wide = torch.promote_types(q_KGTD.dtype, torch.float32)
    num_rows, context_len = q_KGTD.shape[2], k_KLD.shape[1]
    score_KGTL = q_KGTD.to(wide) @ k_KLD.to(wide).transpose(1, 2).unsqueeze(1) * scale
    future_TL = torch.ones((num_rows, context_len), dtype=torch.bool, device=q_KGTD.device).triu_(
        context_len - num_rows + 1
    )
    if window is not None:
        at_T1 = torch.arange(context_len - num_rows, context_len, device=q_KGTD.device)[:, None]
        future_TL |= torch.arange(context_len, device=q_KGTD.device) <= at_T1 - window
    p_KGTL = score_KGTL.masked_fill(future_TL, float("-inf")).softmax(dim=-1)
    o_TKGV = (p_KGTL @ v_KLV.to(wide).unsqueeze(1)).permute(2, 0, 1, 3).to(q_KGTD.dtype)
    return o_TKGV if out is None else out.copy_(o_TKGV)
