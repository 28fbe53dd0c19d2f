"""Attention's fused path on a real GPU, against the reference in float32. Skipped where torch sees no GPU."""

from __future__ import annotations

import pytest
import torch

from narrows.ops.causal_attention import causal_attention, causal_attention_reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")


@pytest.mark.parametrize(("num_rows", "context_len"), [(1, 1), (2, 2046), (64, 64), (100, 333), (700, 1500)])
@pytest.mark.parametrize(
    ("num_kv", "group", "dim", "value_dim"),
    [(16, 1, 192, 128), (1, 16, 576, 512), (4, 7, 128, 128), (2, 3, 64, 64), (3, 1, 24, 8)],
)
def test_rows_attend_to_earlier_rows(
    num_rows: int, context_len: int, num_kv: int, group: int, dim: int, value_dim: int
) -> None:
    torch.manual_seed(0)
    q = torch.randn(num_kv, group, num_rows, dim, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(num_kv, context_len, dim, device="cuda", dtype=torch.bfloat16)
    v = torch.randn(num_kv, context_len, value_dim + 8, device="cuda", dtype=torch.bfloat16)[..., :value_dim]
    got = causal_attention(q, k.float(), v, dim**-0.5)
    want = causal_attention_reference(q.float(), k.float(), v.float(), dim**-0.5)
    torch.testing.assert_close(got.float(), want, rtol=2e-2, atol=2e-2)
