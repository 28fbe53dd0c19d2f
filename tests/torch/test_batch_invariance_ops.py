"""Row i of every op has the same bits with any other rows: one by one, few, many, and at any offset.

With one torch thread, as ranks run. It holds for the CPU and the libraries it was run on (docs/batch-invariance.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from narrows.ops.act_mul import act_mul
from narrows.ops.argmax import pick, shard_argmax
from narrows.ops.embedding import embedding
from narrows.ops.experts import experts_mlp
from narrows.ops.gqa_attention import gqa_attention
from narrows.ops.kv_b import plain_halves, split_kv_b
from narrows.ops.linear import linear
from narrows.ops.mla_attention import mla_attention
from narrows.ops.paged import PagedRows, build_paged_rows
from narrows.ops.rms_norm import add_rms_norm, rms_norm
from narrows.ops.rope import apply_rope
from narrows.ops.route import route
from narrows.ops.sample import sample

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
NUM_ROWS = 67
WINDOWS = [1, 2, 3, 4, 5, 7, 8, 16, 17, 31, 33, 64]
PAGE = 4


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.inference_mode():
        yield
    torch.set_num_threads(num_threads)


def check(op: Callable[..., Tensor | tuple[Tensor, ...]], *tensors: Tensor, copy: bool = True) -> None:
    """``op`` of all rows against ``op`` of every window of few rows and of some of many."""
    together = op(*tensors)
    together = together if isinstance(together, tuple) else (together,)
    for size in WINDOWS:
        for start in range(0, NUM_ROWS - size + 1, max(1, size // 2)):
            rows = slice(start, start + size)
            alone = op(*[x[rows].clone() if copy else x[rows] for x in tensors])
            alone = alone if isinstance(alone, tuple) else (alone,)
            for a, b in zip(alone, together, strict=True):
                assert torch.equal(a, b[rows]), f"rows {start} to {start + size - 1}, {(a != b[rows]).sum()} numbers"


def randn(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(dtype)


# from tiny ones, whose products torch computes itself, to those of a 135M and a 16B model
PRODUCTS = [(8, 16), (24, 8), (40, 12), (32, 33), (100, 36), (64, 256), (576, 960), (1536, 576), (2048, 704)]


@DTYPES
@pytest.mark.parametrize(("num_inputs", "num_outputs"), PRODUCTS)
def test_linear(dtype: torch.dtype, num_inputs: int, num_outputs: int) -> None:
    x, weight = randn(NUM_ROWS, num_inputs, dtype=dtype), randn(num_outputs, num_inputs, dtype=dtype, scale=0.1)
    bias = randn(num_outputs, dtype=dtype)
    check(lambda x: linear(x, weight, batch_invariant=True), x)
    check(lambda x: linear(x, weight, bias, batch_invariant=True), x)
    check(lambda x: linear(x, weight, batch_invariant=True), x, copy=False)  # at addresses of any alignment


@DTYPES
def test_linear_into_a_buffer_of_a_collective(dtype: torch.dtype) -> None:
    x, weight, bias = randn(NUM_ROWS, 48, dtype=dtype), randn(40, 48, dtype=dtype), randn(40, dtype=dtype)
    for b in (None, bias):
        expected = linear(x, weight, b, batch_invariant=True)

        def into_buffer(x: Tensor, b: Tensor | None = b) -> Tensor:
            out = torch.full((x.shape[0], 40), 7.0, dtype=dtype)
            assert linear(x, weight, b, out=out, batch_invariant=True) is out
            return out

        check(into_buffer, x)
        assert torch.equal(into_buffer(x), expected)
        assert into_buffer(x[:0]).shape == linear(x[:0], weight, b, batch_invariant=True).shape == (0, 40)


def test_few_rows_of_linear_are_still_the_product() -> None:
    for num_inputs, num_outputs in PRODUCTS:
        x, weight, bias = randn(3, num_inputs), randn(num_outputs, num_inputs), randn(num_outputs)
        got = linear(x, weight, bias, batch_invariant=True)
        torch.testing.assert_close(got, linear(x, weight, bias), rtol=1e-4, atol=1e-4)
    assert linear(randn(2, 8), torch.empty((0, 8)), batch_invariant=True).shape == (2, 0)


@DTYPES
@pytest.mark.parametrize(("hidden", "inner"), [(32, 16), (40, 24), (576, 192)])
@pytest.mark.parametrize("num_held", [6, 2])
def test_experts(dtype: torch.dtype, hidden: int, inner: int, num_held: int) -> None:
    """The number of an expert's rows depends on the other rows' choices."""
    ids = torch.rand((NUM_ROWS, 6)).argsort(dim=1)[:, :3]
    weights = torch.rand((NUM_ROWS, 3))
    gate_up = randn(num_held, 2 * inner, hidden, dtype=dtype, scale=0.1)
    down = randn(num_held, hidden, inner, dtype=dtype, scale=0.1)

    def op(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return experts_mlp(x, ids, weights, gate_up, down, first_expert=1, batch_invariant=True)

    check(op, randn(NUM_ROWS, hidden, dtype=dtype), ids, weights)


@DTYPES
@pytest.mark.parametrize("width", [5, 16, 33, 96, 576, 2048])
def test_norms_and_silu(dtype: torch.dtype, width: int) -> None:
    x, residual, weight = (
        randn(NUM_ROWS, width, dtype=dtype),
        randn(NUM_ROWS, width, dtype=dtype),
        randn(width).to(dtype),
    )
    check(lambda x: rms_norm(x, weight, 1e-6), x)
    check(lambda x, residual: add_rms_norm(x, residual, weight, 1e-6), x, residual)
    check(act_mul, torch.cat((x, residual), dim=1))
    wide = randn(NUM_ROWS, width + 7, dtype=dtype)  # a part of each row, as the norms of the latents take it
    check(lambda x: rms_norm(x[:, 3 : 3 + width], weight, 1e-6), wide)
    heads = randn(NUM_ROWS, 3, width, dtype=dtype)
    check(lambda x: rms_norm(x[:, :2], weight, 1e-6), heads)


@DTYPES
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("num_heads", "dim"), [(1, 6), (3, 8), (9, 64)])
def test_rope(dtype: torch.dtype, interleaved: bool, num_heads: int, dim: int) -> None:
    angles = randn(NUM_ROWS, dim // 2)
    x = randn(NUM_ROWS, num_heads, dim, dtype=dtype)
    check(
        lambda x, cos, sin: apply_rope(x, cos, sin, interleaved=interleaved),
        x,
        angles.cos().to(dtype),
        angles.sin().to(dtype),
    )


@pytest.mark.parametrize(
    ("num_experts", "num_groups", "topk_group"), [(8, 4, 2), (12, None, None), (160, 8, 3), (256, 8, 4)]
)
@pytest.mark.parametrize(
    ("scoring", "method"), [("softmax", "greedy"), ("softmax", "group_limited_greedy"), ("sigmoid", "noaux_tc")]
)
def test_router(num_experts: int, num_groups: int | None, topk_group: int | None, scoring: str, method: str) -> None:
    bias = randn(num_experts, scale=0.1) if method == "noaux_tc" else None
    gate = randn(num_experts, 64, scale=0.2)

    def op(x: Tensor) -> tuple[Tensor, Tensor]:
        routing = route(
            linear(x, gate, batch_invariant=True),
            top_k=2,
            scoring=scoring,  # type: ignore[arg-type]
            method=method,  # type: ignore[arg-type]
            num_groups=num_groups,
            topk_group=topk_group,
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
            correction_bias_E=bias,
        )
        return routing.topk_ids_TK, routing.topk_weights_TK

    check(op, randn(NUM_ROWS, 64))


@DTYPES
@pytest.mark.parametrize("vocab", [1, 67, 3000])
def test_embedding_and_choice(dtype: torch.dtype, vocab: int) -> None:
    table = randn(vocab, 24, dtype=dtype)
    check(lambda ids: embedding(ids, table, 3), torch.randint(0, vocab + 6, (NUM_ROWS,)))
    logits = randn(NUM_ROWS, vocab, dtype=dtype, scale=3.0)
    check(lambda x: pick(shard_argmax(x, 0)), logits)
    numbers = [torch.rand(NUM_ROWS, dtype=torch.float64) for _ in range(3)]

    def draw(x: Tensor, uniform_T: Tensor, top_p_T: Tensor, min_p_T: Tensor, top_k_T: Tensor) -> Tensor:
        temperature_T = torch.full_like(uniform_T, 1.3)
        return sample(
            x, uniform_T, temperature_T=temperature_T, top_k_T=top_k_T, top_p_T=top_p_T + 0.5, min_p_T=min_p_T / 1000
        )

    check(draw, logits, *numbers, torch.randint(0, 50, (NUM_ROWS,)))


# -- attention: a row or a span beside others -------------------------------------------------------------------------

SPANS = [(0, 5), (12, 1), (3, 1), (7, 6), (0, 1), (30, 1), (2, 2), (64, 1), (0, 70), (61, 3), (17, 1)]
"""(tokens before, rows) of the contexts in the steps below, each with pages of its own."""


def steps() -> Iterator[list[int]]:
    """Which spans are together: each alone, all, decode rows only, and some in another order."""
    decode = [i for i, (_, rows) in enumerate(SPANS) if rows == 1]
    yield from ([i] for i in range(len(SPANS)))
    yield list(range(len(SPANS)))
    yield decode
    yield decode[:2]
    yield decode[2:5]
    yield list(reversed(range(len(SPANS))))
    yield [4, 0, 2, 8]
    yield [6, 9, 1]


def check_attention(attend: Callable[[PagedRows, Tensor], Tensor]) -> None:
    """``attend(rows, which)``: the output for the rows ``which`` of all spans' rows."""
    first_row = [sum(rows for _, rows in SPANS[:i]) for i in range(len(SPANS))]
    num_pages = [-(-(start + rows) // PAGE) for start, rows in SPANS]
    first_page = [1 + sum(num_pages[:i]) for i in range(len(SPANS))]
    expected: dict[int, Tensor] = {}
    for step in steps():
        spans = [(*SPANS[i], tuple(range(first_page[i], first_page[i] + num_pages[i]))) for i in step]
        rows = build_paged_rows(spans, PAGE, decode_group_slots=1)
        which = torch.cat([torch.arange(first_row[i], first_row[i] + SPANS[i][1]) for i in step])
        got = attend(rows, which).split([SPANS[i][1] for i in step])
        for i, out in zip(step, got, strict=True):
            assert torch.equal(expected.setdefault(i, out.clone()), out), f"{SPANS[i]} among {[SPANS[j] for j in step]}"


NUM_SLOTS = PAGE * (2 + sum(-(-(start + rows) // PAGE) for start, rows in SPANS))
ALL_ROWS = sum(rows for _, rows in SPANS)


@DTYPES
@pytest.mark.parametrize(
    ("num_kv", "kv_index", "dim"),
    [(2, (0, 0, 0, 1, 1, 1), 16), (3, (0, 1, 1, 2), 8), (3, (0, 0, 0, 1, 1, 1, 2, 2, 2), 64)],
)
def test_gqa_attention(dtype: torch.dtype, num_kv: int, kv_index: tuple[int, ...], dim: int) -> None:
    keys, values = randn(NUM_SLOTS, num_kv, dim, dtype=dtype), randn(NUM_SLOTS, num_kv, dim, dtype=dtype)
    queries = randn(
        ALL_ROWS, len(kv_index) + num_kv, dim, dtype=dtype
    )  # queries and keys side by side, as in the model

    def attend(rows: PagedRows, which: Tensor) -> Tensor:
        q_TND = queries[which][:, : len(kv_index)]
        return gqa_attention(q_TND, keys, values, rows, kv_index, dim**-0.5)

    check_attention(attend)


@DTYPES
@pytest.mark.parametrize("ready", [True, False], ids=["as the model holds it", "plain"])
@pytest.mark.parametrize(
    ("heads", "nope", "pe", "rank", "value"), [(2, 8, 4, 12, 6), (4, 16, 8, 32, 16), (4, 128, 64, 512, 128)]
)
def test_mla_attention(dtype: torch.dtype, heads: int, nope: int, pe: int, rank: int, value: int, ready: bool) -> None:
    cache = randn(NUM_SLOTS, rank + pe, dtype=dtype)
    queries = randn(ALL_ROWS, heads, nope + pe, dtype=dtype)
    kv_b = randn(heads, nope + value, rank, dtype=dtype, scale=0.1)
    w_uk, w_uv = split_kv_b(kv_b, nope)  # packed, where products are compiled
    if not ready:
        w_uk, w_uv = plain_halves(w_uk, w_uv)

    def attend(rows: PagedRows, which: Tensor) -> Tensor:
        q_nope_TND, q_pe_TNP = queries[which].split([nope, pe], dim=-1)
        return mla_attention(q_nope_TND, q_pe_TNP.contiguous(), cache, rows, w_uk, w_uv, 0.1, batch_invariant=True)

    check_attention(attend)
