"""The core of multi-head latent attention over a paged cache of latents.

Projections, norms and rotation before it, and the output projection after it, are the model's.

Letters: T rows, B decode rows, N heads held here, D query/key columns without rotation, P rotated columns, R
kv_lora_rank, C = R + P (a slot: latent, then the rotated key all heads share), V value columns, L tokens of a
context, S slots.
"""

import torch
from torch import Tensor
from torch.nn import functional

from narrows.ops.causal_attention import causal_attention, is_fused
from narrows.ops.compiled import brgemm, kernels
from narrows.ops.gqa_attention import causal_heads
from narrows.ops.kv_b import KeyWeight, PackedKeys, ValueWeight, plain_halves
from narrows.ops.linear import rows_alike
from narrows.ops.packed import PackedStack
from narrows.ops.paged import PagedRows, PrefillSpan, row_contexts
from narrows.ops.wide_product import wide_bmm

__all__ = ["mla_attention", "mla_attention_reference"]

EXPANDED_KEYS = 1 << 24
"""Columns of expanded keys and values held at once, over heads and tokens (64 MiB in float32)."""

FUSED_KEYS = 1 << 29
"""The same where one kernel attends (1 GiB in 16 bits): there keys of all heads at once are one product and one kernel,
but for contexts of more than 13,000 tokens of 128 heads."""

WIDE_PRODUCT = 4
"""On CPUs a float32 product (scores) in bf16 products (all else in a bf16 model): 108 and 476 GFLOP/s on one AVX-512
thread."""


def mla_attention(
    q_nope_TND: Tensor,
    q_pe_TNP: Tensor,
    cache_SC: Tensor,
    rows: PagedRows,
    w_uk_NDR: KeyWeight,
    w_uv_NVR: ValueWeight,
    scale: float,
    *,
    out: Tensor | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """Per head ``softmax(scale * (q_nope k^T + q_pe k_pe^T)) v`` with ``k = c w_uk^T``, ``v = c w_uv^T`` of latents c.

    Shapes: q_nope [T, N, D], q_pe [T, N, P] (rotated), cache [S, R + P] (this step's rows already written), w_uk [N,
    D, R], w_uv [N, V, R] (from `split_kv_b`) -> [T, N * V] in q's dtype. ``scale``: see ``rope.mla_softmax_scale``.
    Softmax in float32 (float64 for float64).

    Two forms of one product. Expanded: build k and v of the context, R (D + V) products per token and head, then
    D + P + V per row and token. Absorbed: ``q_nope w_uk`` is a query for latents and the sum of latents goes through
    w_uv: 2R + P per row and token, nothing built. Decode rows are absorbed. A span takes the cheaper form: expanded for
    a whole prompt, absorbed for few rows behind a long context. The choice depends on the span and the dtype, never on
    how many heads are here, so ranks that split the heads choose alike.

    Packed weights (bf16 on CPUs with products for it): compiled kernels, which read decode rows' slots in place, each
    row by itself, and expand a span's keys and values a block of tokens at a time (docs/kernels.md). Plain
    ones: torch's products, decode rows in `PagedRows.decode_groups`.

    ``batch_invariant``: the bits of a decode row do not depend on the other decode rows, if each is a
    `PagedRows.decode_groups` of its own (see `linear`); with packed weights they never do. Those of a span depend on
    its own context and rows anyway.
    Source: DeepSeek-V2 (2024), section 2.1 and appendix; transformers ``DeepseekV3Attention`` (expanded).
    """
    num_rows, num_heads, _ = q_nope_TND.shape
    value_dim = w_uv_NVR.shape[1]
    if out is None:
        out = q_nope_TND.new_empty((num_rows, num_heads * value_dim))
    if isinstance(w_uk_NDR, PackedKeys) and isinstance(w_uv_NVR, PackedStack):
        if out.stride(-1) != 1:
            compiled = out.new_empty(out.shape)
            return out.copy_(_compiled(q_nope_TND, q_pe_TNP, cache_SC, rows, w_uk_NDR, w_uv_NVR, scale, compiled))
        return _compiled(q_nope_TND, q_pe_TNP, cache_SC, rows, w_uk_NDR, w_uv_NVR, scale, out)
    assert isinstance(w_uk_NDR, Tensor) and isinstance(w_uv_NVR, Tensor)
    out_TNV = out.view(num_rows, num_heads, value_dim)
    for span in rows.prefills:
        of_span = slice(span.row_start, span.row_stop)
        latents_LC = cache_SC.index_select(0, span.slots_L)
        prefill = _absorbed_span if _absorbing_is_cheaper(span, w_uk_NDR, w_uv_NVR, cache_SC) else _expanded_span
        prefill(q_nope_TND[of_span], q_pe_TNP[of_span], latents_LC, w_uk_NDR, w_uv_NVR, scale, out_TNV[of_span])
    if rows.decode_groups:
        if rows.prefills:
            at_B = rows.decode_rows_B
            o_BNV = _decode(
                q_nope_TND[at_B], q_pe_TNP[at_B], cache_SC, rows, w_uk_NDR, w_uv_NVR, scale, batch_invariant
            )
            out_TNV.index_copy_(0, at_B, o_BNV)
        else:
            out_TNV.copy_(_decode(q_nope_TND, q_pe_TNP, cache_SC, rows, w_uk_NDR, w_uv_NVR, scale, batch_invariant))
    return out


def mla_attention_reference(
    q_nope_TND: Tensor,
    q_pe_TNP: Tensor,
    cache_SC: Tensor,
    rows: PagedRows,
    w_uk_NDR: KeyWeight,
    w_uv_NVR: ValueWeight,
    scale: float,
    *,
    out: Tensor | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """Twin of `mla_attention`: every row on its own, expanded, in float32, rounded at the end."""
    w_uk_NDR, w_uv_NVR = plain_halves(w_uk_NDR, w_uv_NVR)
    wide = torch.promote_types(q_nope_TND.dtype, torch.float32)
    rank = w_uk_NDR.shape[2]
    y_TNV = q_nope_TND.new_zeros((*q_nope_TND.shape[:2], w_uv_NVR.shape[1]))
    for row, slots_L in row_contexts(rows):
        c_LR, k_pe_LP = cache_SC[slots_L].to(wide).tensor_split((rank,), dim=-1)
        k_NLD, v_NLV = c_LR @ w_uk_NDR.to(wide).transpose(1, 2), c_LR @ w_uv_NVR.to(wide).transpose(1, 2)
        score_NL = (k_NLD @ q_nope_TND[row].to(wide).unsqueeze(-1)).squeeze(-1) + q_pe_TNP[row].to(wide) @ k_pe_LP.t()
        y_TNV[row] = ((score_NL * scale).softmax(dim=-1).unsqueeze(1) @ v_NLV).squeeze(1)
    y = y_TNV.flatten(1)
    return y if out is None else out.copy_(y)


def _compiled(
    q_nope_TND: Tensor,
    q_pe_TNP: Tensor,
    cache_SC: Tensor,
    rows: PagedRows,
    w_uk: PackedKeys,
    w_uv: PackedStack,
    scale: float,
    out: Tensor,
) -> Tensor:
    compiled = kernels()
    assert compiled is not None and cache_SC.stride(1) == 1 and q_nope_TND.stride(2) == q_pe_TNP.stride(2) == 1
    num_heads, key_dim, rank = w_uk.shape
    value_dim, rope_dim = w_uv.num_outputs, q_pe_TNP.shape[2]
    sizes = num_heads, key_dim, rope_dim, rank, value_dim
    for span in rows.prefills:
        of_span = slice(span.row_start, span.row_stop)
        q_nope, q_pe, o_TX = q_nope_TND[of_span], q_pe_TNP[of_span], out[of_span]
        if _absorbing_is_cheaper(span, w_uk, w_uv, cache_SC):
            c_TNR = q_nope.new_empty((*q_nope.shape[:2], rank))
            q_TNC = torch.cat((per_head(q_nope, w_uk.absorb), q_pe), dim=-1)
            causal_heads(
                q_TNC, cache_SC.unsqueeze(1), cache_SC[:, :rank].unsqueeze(1), span, (0,) * num_heads, scale, c_TNR
            )
            per_head(c_TNR, w_uv, out=o_TX.view(o_TX.shape[0], num_heads, value_dim))
            continue
        compiled.mla_prefill(
            o_TX.data_ptr(),
            o_TX.stride(0),
            q_nope.data_ptr(),
            q_nope.stride(0),
            q_nope.stride(1),
            q_pe.data_ptr(),
            q_pe.stride(0),
            q_pe.stride(1),
            cache_SC.data_ptr(),
            cache_SC.stride(0),
            span.slots_L.data_ptr(),
            span.context_len,
            span.row_stop - span.row_start,
            w_uk.expand.panels.data_ptr(),
            w_uv.panels.data_ptr(),
            *sizes,
            scale,
            torch.get_num_threads(),
            brgemm(),
        )
    if rows.decode_groups:
        compiled.mla_decode(
            out.data_ptr(),
            out.stride(0),
            q_nope_TND.data_ptr(),
            q_nope_TND.stride(0),
            q_nope_TND.stride(1),
            q_pe_TNP.data_ptr(),
            q_pe_TNP.stride(0),
            q_pe_TNP.stride(1),
            cache_SC.data_ptr(),
            cache_SC.stride(0),
            rows.decode_slots_BL.data_ptr(),
            rows.decode_slots_BL.stride(0),
            rows.decode_lens_B.data_ptr(),
            rows.decode_rows_B.data_ptr() if rows.prefills else None,
            rows.decode_lens_B.shape[0],
            w_uk.absorb.panels.data_ptr(),
            w_uv.panels.data_ptr(),
            *sizes,
            scale,
            torch.get_num_threads(),
        )
    return out


def per_head(x_TNI: Tensor, weight: PackedStack, *, out: Tensor | None = None) -> Tensor:
    """``x[t, n] @ weight[n]^T``, [T, N, O], of a packed weight [N, O, I]."""
    compiled = kernels()
    assert compiled is not None and x_TNI.stride(2) == 1
    num_heads, num_outputs, num_inputs = weight.shape
    if out is None:
        out = x_TNI.new_empty((x_TNI.shape[0], num_heads, num_outputs))
    compiled.per_head(
        out.data_ptr(),
        out.stride(0),
        out.stride(1),
        x_TNI.data_ptr(),
        x_TNI.stride(0),
        x_TNI.stride(1),
        weight.panels.data_ptr(),
        x_TNI.shape[0],
        num_heads,
        num_inputs,
        num_outputs,
        torch.get_num_threads(),
    )
    return out


def _absorbing_is_cheaper(span: PrefillSpan, w_uk: KeyWeight, w_uv: ValueWeight, cache_SC: Tensor) -> bool:
    """Compares the products per head of both forms; a row sees on average the context less half the span."""
    key_dim, rank = w_uk.shape[1:]
    value_dim, slot = w_uv.shape[1], cache_SC.shape[1]
    num_rows = span.row_stop - span.row_start
    num_pairs = num_rows * (span.context_len - num_rows // 2)
    is_even = isinstance(w_uk, PackedKeys) or w_uk.dtype.itemsize >= 4 or not w_uk.is_cpu
    of_score = 1 if is_even else WIDE_PRODUCT
    through_weights = rank * (key_dim + value_dim)
    expanded = span.context_len * through_weights + num_pairs * ((key_dim + slot - rank) * of_score + value_dim)
    absorbed = num_rows * through_weights + num_pairs * (slot * of_score + rank)
    return absorbed < expanded


def _expanded_span(
    q_nope_TND: Tensor,
    q_pe_TNP: Tensor,
    latents_LC: Tensor,
    w_uk_NDR: Tensor,
    w_uv_NVR: Tensor,
    scale: float,
    out_TNV: Tensor,
) -> None:
    if is_fused(q_nope_TND):
        _expanded_fused(q_nope_TND, q_pe_TNP, latents_LC, w_uk_NDR, w_uv_NVR, scale, out_TNV)
        return
    num_heads, key_dim = q_nope_TND.shape[1:]
    value_dim, rank = w_uv_NVR.shape[1:]
    context_len, rope_dim = latents_LC.shape[0], q_pe_TNP.shape[2]
    wide = torch.promote_types(q_nope_TND.dtype, torch.float32)
    c_LR, k_pe_LP = latents_LC.tensor_split((rank,), dim=-1)
    block = max(1, min(num_heads, EXPANDED_KEYS // (context_len * (key_dim + rope_dim + value_dim))))
    k_buffer_NLD = torch.empty((block, context_len, key_dim + rope_dim), dtype=wide, device=latents_LC.device)
    k_buffer_NLD[..., key_dim:] = k_pe_LP
    for head in range(0, num_heads, block):
        heads = slice(head, min(head + block, num_heads))
        num = heads.stop - heads.start
        # Keys are rounded to the model's dtype by the product, as in the reference, and widened for the scores.
        k_LND, v_LNV = _expand(c_LR, w_uk_NDR[heads]), _expand(c_LR, w_uv_NVR[heads])
        k_NLD = k_buffer_NLD[:num]
        k_NLD[..., :key_dim] = k_LND.transpose(0, 1)
        q_N1TD = torch.cat((q_nope_TND[:, heads], q_pe_TNP[:, heads]), dim=-1).transpose(0, 1).unsqueeze(1)
        causal_attention(q_N1TD, k_NLD, v_LNV.transpose(0, 1), scale, out=out_TNV[:, heads].unsqueeze(2))


def _expand(c_LR: Tensor, weight_NOR: Tensor) -> Tensor:
    """What latents are for some heads: [L, R], [N, O, R] -> [L, N, O]."""
    return torch.unflatten(c_LR @ weight_NOR.flatten(0, 1).t(), -1, weight_NOR.shape[:2])


def _expanded_fused(
    q_nope_TND: Tensor,
    q_pe_TNP: Tensor,
    latents_LC: Tensor,
    w_uk_NDR: Tensor,
    w_uv_NVR: Tensor,
    scale: float,
    out_TNV: Tensor,
) -> None:
    """As `_expanded_span`, all in the queries' dtype: two products and one kernel for as many heads as fit."""
    num_heads, _, rank = w_uk_NDR.shape
    value_dim, context_len = w_uv_NVR.shape[1], latents_LC.shape[0]
    c_LR, k_pe_LP = latents_LC.tensor_split((rank,), dim=-1)
    q_TNC = torch.cat((q_nope_TND, q_pe_TNP), dim=-1)
    block = max(1, FUSED_KEYS // (context_len * (q_TNC.shape[2] + value_dim)))
    for head in range(0, num_heads, block):
        heads = slice(head, min(head + block, num_heads))
        num = heads.stop - heads.start
        k_LND, v_LNV = _expand(c_LR, w_uk_NDR[heads]), _expand(c_LR, w_uv_NVR[heads])
        k_LNC = torch.cat((k_LND, k_pe_LP.unsqueeze(1).expand(-1, num, -1)), dim=-1)
        causal_attention(
            q_TNC[:, heads].transpose(0, 1).unsqueeze(1),
            k_LNC.transpose(0, 1),
            v_LNV.transpose(0, 1),
            scale,
            out=out_TNV[:, heads].unsqueeze(2),
        )


def _absorbed_span(
    q_nope_TND: Tensor,
    q_pe_TNP: Tensor,
    latents_LC: Tensor,
    w_uk_NDR: Tensor,
    w_uv_NVR: Tensor,
    scale: float,
    out_TNV: Tensor,
) -> None:
    # Every head attends to the same keys, the slots, and the same values, the latents: one KV head for all.
    q_1NTC = _absorbed_queries(q_nope_TND, q_pe_TNP, w_uk_NDR).transpose(0, 1).unsqueeze(0)
    k_1LC = latents_LC.unsqueeze(0)
    c_TNR = causal_attention(q_1NTC, k_1LC, k_1LC[..., : w_uk_NDR.shape[2]], scale).squeeze(1)
    out_TNV.copy_(_expanded_values(c_TNR, w_uv_NVR))


def _decode(
    q_nope_BND: Tensor,
    q_pe_BNP: Tensor,
    cache_SC: Tensor,
    rows: PagedRows,
    w_uk_NDR: Tensor,
    w_uv_NVR: Tensor,
    scale: float,
    batch_invariant: bool,
) -> Tensor:
    rank = w_uk_NDR.shape[2]
    dtype = q_nope_BND.dtype
    wide = torch.promote_types(dtype, torch.float32)
    q_BNC = _absorbed_queries(q_nope_BND, q_pe_BNP, w_uk_NDR, batch_invariant)
    c_BNR = q_nope_BND.new_empty((*q_nope_BND.shape[:2], rank))
    if rows.decode_bias_BL is not None:
        _decode_biased(q_BNC, cache_SC, rows, rows.decode_bias_BL, scale, c_BNR)
        return _expanded_values(c_BNR, w_uv_NVR, batch_invariant)
    q_BNC = q_BNC.to(wide).mul_(scale)
    for group in rows.decode_groups:
        of_group = slice(group.start, group.stop)
        # functional.embedding, not cache[slots]: an eighth of the time on CPU.
        latents_BLC = functional.embedding(rows.decode_slots_BL[of_group, : group.max_len], cache_SC)
        score_BNL = torch.bmm(q_BNC[of_group], latents_BLC.to(wide).transpose(1, 2))
        if group.stop - group.start > 1:
            tokens_L = torch.arange(group.max_len, device=cache_SC.device)
            past_end_BL = tokens_L >= rows.decode_lens_B[of_group].unsqueeze(-1)
            score_BNL.masked_fill_(past_end_BL.unsqueeze(1), float("-inf"))
        p_BNL = score_BNL.softmax(dim=-1).to(dtype)
        torch.bmm(p_BNL, latents_BLC[..., :rank], out=c_BNR[of_group])
    return _expanded_values(c_BNR, w_uv_NVR, batch_invariant)


def _decode_biased(
    q_BNC: Tensor, cache_SC: Tensor, rows: PagedRows, bias_BL: Tensor, scale: float, c_BNR: Tensor
) -> None:
    """Sums of latents, into ``c``; which tokens a row sees is on the device alone."""
    for group in rows.decode_groups:
        of_group, seen = slice(group.start, group.stop), slice(group.max_len)
        latents_BLC = functional.embedding(rows.decode_slots_BL[of_group, seen], cache_SC)
        score_BNL = wide_bmm(q_BNC[of_group], latents_BLC.transpose(1, 2))
        torch.add(bias_BL[of_group, seen].unsqueeze(1), score_BNL, alpha=scale, out=score_BNL)
        p_BNL = score_BNL.softmax(dim=-1).to(q_BNC.dtype)
        torch.bmm(p_BNL, latents_BLC[..., : c_BNR.shape[2]], out=c_BNR[of_group])


def _absorbed_queries(q_nope_TND: Tensor, q_pe_TNP: Tensor, w_uk_NDR: Tensor, batch_invariant: bool = False) -> Tensor:
    """Queries for slots, [T, N, C]: the part for latents, then the rotated part."""
    return torch.cat((_per_head(q_nope_TND, w_uk_NDR, batch_invariant), q_pe_TNP), dim=-1)


def _expanded_values(c_TNR: Tensor, w_uv_NVR: Tensor, batch_invariant: bool = False) -> Tensor:
    """Sums of latents to sums of values: [T, N, R] -> [T, N, V]."""
    return _per_head(c_TNR, w_uv_NVR.transpose(1, 2), batch_invariant)


def _per_head(x_TNI: Tensor, weight_NIO: Tensor, batch_invariant: bool) -> Tensor:
    """``x[t, n] @ weight[n]``, [T, N, O]."""

    def product(x: Tensor) -> Tensor:
        return torch.bmm(x.transpose(0, 1), weight_NIO).transpose(0, 1)

    return rows_alike(product, x_TNI, *weight_NIO.shape[1:]) if batch_invariant else product(x_TNI)
