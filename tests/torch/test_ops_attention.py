"""causal, MLA and GQA attention: against torch versions, transformers, and themselves in other steps.

Everything runs as it is chosen on this CPU (compiled in bf16, where that is built), by torch alone, and as on a CPU
with AMX.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

from narrows.ops import causal_attention as causal_module
from narrows.ops import gqa_attention as gqa_module
from narrows.ops import mla_attention as mla_module
from narrows.ops import packed as packed_module
from narrows.ops.causal_attention import causal_attention, causal_attention_reference
from narrows.ops.compiled import kernels, torch_brgemm
from narrows.ops.gqa_attention import gqa_attention, gqa_attention_reference, head_blocks
from narrows.ops.kv_b import PackedKeys, plain_halves, split_kv_b
from narrows.ops.mla_attention import mla_attention, mla_attention_reference
from narrows.ops.paged import DecodeRows, build_paged_rows, stage_paged_rows, windowed_rows, write_cache
from narrows.ops.rope import mla_softmax_scale
from narrows.ops.step_block import StepBlock


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(autouse=True, params=["compiled", "torch", "brgemm"])
def which(request, monkeypatch):
    """brgemm: the compiled kernels as on a CPU with AMX, their products of spans by torch's brgemm."""
    if request.param != "torch" and kernels() is None:
        pytest.skip("attention is not compiled here")
    if request.param == "brgemm":
        if torch_brgemm() is None:
            pytest.skip("this torch exports no brgemm")
        monkeypatch.setattr(gqa_module, "brgemm", torch_brgemm)
        monkeypatch.setattr(mla_module, "brgemm", torch_brgemm)
    if request.param == "torch":
        monkeypatch.setattr(gqa_module, "kernels", lambda: None)
        monkeypatch.setattr(packed_module, "kernels", lambda: None)
    return request.param


DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
TOLERANCE = {
    torch.float64: dict(rtol=1e-12, atol=1e-12),
    torch.float32: dict(rtol=1e-5, atol=2e-6),
    torch.bfloat16: dict(rtol=3e-2, atol=3e-2),
}
PAGE = 4
# Pages in no order; contexts of 23, 9, 12, 1, 5 and 4 tokens.
PAGES = [(7, 3, 11, 1, 9, 14), (2, 20, 8), (5, 13, 4), (6,), (10, 12), (15,)]
STEPS = {
    "nothing": [],
    "prompt": [(0, 23, PAGES[0])],
    "one row": [(22, 1, PAGES[0])],
    "first row": [(0, 1, PAGES[3])],
    "chunk": [(8, 15, PAGES[0])],
    "two prompts": [(0, 9, PAGES[1]), (0, 12, PAGES[2])],
    "decode": [(22, 1, PAGES[0]), (0, 1, PAGES[3]), (8, 1, PAGES[1]), (4, 1, PAGES[4])],
    "mixed": [(22, 1, PAGES[0]), (3, 6, PAGES[1]), (0, 1, PAGES[3]), (0, 12, PAGES[2]), (0, 0, ()), (3, 2, PAGES[4])],
    "dead rows": [(0, 1, (0,)), (22, 1, PAGES[0]), (0, 1, (0,))],
}
STEP = pytest.mark.parametrize("step", STEPS)
KV_INDICES = [(0, 0, 1, 1), (0, 1), (0, 0, 0), (0, 0, 0, 1), (1, 1), (0, 1, 1, 1), (1, 0, 1)]


def num_rows(spans):
    return sum(span[1] for span in spans)


class Mla:
    """Random tensors for 3 heads of 6 + 4 columns, rank 8, values of 5 columns, 96 slots."""

    def __init__(self, rows, dtype, *, heads=3, seed=0, dims=(6, 4, 8, 5), slots=96, scale=0.3):
        generator = torch.Generator().manual_seed(seed)
        nope, pe, rank, value = dims
        self.scale = scale

        def draw(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        self.w_uk, self.w_uv = split_kv_b(draw(heads, nope + value, rank) / rank**0.5, nope)
        self.cache = draw(slots, rank + pe)
        self.q_nope, self.q_pe = draw(rows, heads, nope + pe).split([nope, pe], dim=-1)  # side by side, as in the model

    def __call__(self, op, rows, **kwargs):
        return op(self.q_nope, self.q_pe, self.cache, rows, self.w_uk, self.w_uv, self.scale, **kwargs)


@STEP
@DTYPES
@torch.inference_mode()
def test_mla_agrees_with_the_torch_version(step, dtype):
    rows = build_paged_rows(STEPS[step], PAGE)
    mla = Mla(num_rows(STEPS[step]), dtype)
    expected = mla(mla_attention_reference, rows)
    got = mla(mla_attention, rows)
    assert got.shape == (num_rows(STEPS[step]), 15) and got.dtype == dtype
    torch.testing.assert_close(got, expected, **TOLERANCE[dtype])
    wide = torch.full((num_rows(STEPS[step]), 20), 7.0, dtype=dtype)
    out = wide[:, :15]
    assert mla(mla_attention, rows, out=out) is out
    assert torch.equal(out, got) and (wide[:, 15:] == 7).all()


@pytest.mark.parametrize("absorb", [False, True])
@pytest.mark.parametrize("step", ["prompt", "chunk", "mixed"])
@torch.inference_mode()
def test_both_forms_of_mla_prefill(step, absorb, monkeypatch):
    monkeypatch.setattr(mla_module, "_absorbing_is_cheaper", lambda *_: absorb)
    rows = build_paged_rows(STEPS[step], PAGE)
    mla = Mla(num_rows(STEPS[step]), torch.float64)
    torch.testing.assert_close(mla(mla_attention, rows), mla(mla_attention_reference, rows), **TOLERANCE[torch.float64])


@torch.inference_mode()
def test_mla_form_follows_the_span(monkeypatch):
    def form(start, rows):
        context = start + rows
        built = build_paged_rows([(start, rows, range(1, 2 + context // 64))], 64)
        w_uk, cache = torch.empty((1, 128, 512), device="meta"), torch.empty((1, 576), device="meta")
        return mla_module._absorbing_is_cheaper(built.prefills[0], w_uk, w_uk, cache)

    assert not any(form(0, rows) for rows in (2, 16, 512, 8192))  # whole prompts
    assert form(8000, 2) and form(8000, 64) and not form(8000, 512)


@torch.inference_mode()
def test_mla_in_blocks_of_heads_and_rows(monkeypatch):
    rows = build_paged_rows(STEPS["mixed"], PAGE)
    mla = Mla(num_rows(STEPS["mixed"]), torch.float64, heads=5)
    expected = mla(mla_attention, rows)
    monkeypatch.setattr(mla_module, "EXPANDED_KEYS", 2 * 12 * 15)
    monkeypatch.setattr(causal_module, "BLOCK_SCORES", 40)
    torch.testing.assert_close(mla(mla_attention, rows), expected, **TOLERANCE[torch.float64])


@DTYPES
@torch.inference_mode()
def test_mla_chunks_and_decode_are_the_prompt(dtype):
    """One prompt at once; in chunks of 9, 2, 1 and 11 rows; one token at a time: the same rows."""
    mla = Mla(23, dtype)
    new = mla.cache[:23].clone()

    def run(chunks):
        mla.cache.zero_()
        parts, start = [], 0
        for size in chunks:
            rows = build_paged_rows([(start, size, PAGES[0])], PAGE)
            of_chunk = slice(start, start + size)
            write_cache(mla.cache, new[of_chunk], rows.slots_T)
            q_nope, q_pe = mla.q_nope[of_chunk], mla.q_pe[of_chunk]
            parts.append(mla_attention(q_nope, q_pe, mla.cache, rows, mla.w_uk, mla.w_uv, 0.3))
            start += size
        return torch.cat(parts)

    prompt = run([23])
    torch.testing.assert_close(run([9, 2, 1, 11]), prompt, **TOLERANCE[dtype])
    torch.testing.assert_close(run([1] * 23), prompt, **TOLERANCE[dtype])


@torch.inference_mode()
def test_mla_is_transformers_attention():
    """The module around it rebuilt: its projections, norms and rotation, our cache and core."""
    config = DeepseekV3Config(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=12,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=6,
        max_position_embeddings=64,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 16,
        },
        attn_implementation="eager",
    )
    module = v3.DeepseekV3Attention(config, layer_idx=0).double()
    x = torch.randn((1, 11, 32), dtype=torch.float64)
    cos, sin = v3.DeepseekV3RotaryEmbedding(config).double()(x, torch.arange(11)[None])
    mask = torch.full((11, 11), float("-inf"), dtype=torch.float64).triu(1)[None, None]
    expected, _ = module(x, (cos, sin), mask)

    q = module.q_b_proj(module.q_a_layernorm(module.q_a_proj(x))).view(11, 4, 12)
    latent, k_pe = module.kv_a_proj_with_mqa(x)[0].split([16, 4], dim=-1)
    q_pe, k_pe = v3.apply_rotary_pos_emb_interleave(q[None, ..., 8:].transpose(1, 2), k_pe[None, None], cos, sin)
    rows = build_paged_rows([(0, 11, (3, 1, 2))], PAGE)
    cache = torch.zeros((16, 20), dtype=torch.float64)
    write_cache(cache, torch.cat((module.kv_a_layernorm(latent), k_pe[0, 0]), dim=-1), rows.slots_T)
    kv_b = module.kv_b_proj.weight.view(4, 14, 16)
    scale = mla_softmax_scale(12, config.rope_parameters)
    for op in (mla_attention, mla_attention_reference):
        core = op(q[..., :8], q_pe[0].transpose(0, 1), cache, rows, kv_b[:, :8], kv_b[:, 8:], scale)
        torch.testing.assert_close(module.o_proj(core)[None], expected, rtol=1e-6, atol=1e-7)


@torch.inference_mode()
def test_heads_of_mla_are_independent():
    """Ranks that hold some heads each leave the columns of the whole."""
    rows = build_paged_rows(STEPS["mixed"], PAGE)
    mla = Mla(num_rows(STEPS["mixed"]), torch.float64, heads=5)
    parts = []
    for heads in (slice(0, 2), slice(2, 2), slice(2, 5)):
        args = mla.q_nope[:, heads], mla.q_pe[:, heads], mla.cache, rows, mla.w_uk[heads], mla.w_uv[heads], 0.3
        parts.append(mla_attention(*args))
    torch.testing.assert_close(torch.cat(parts, dim=1), mla(mla_attention, rows), **TOLERANCE[torch.float64])


class Gqa:
    """Random tensors for heads of 6 columns, 2 key/value heads, 96 slots."""

    def __init__(self, rows, dtype, kv_index):
        generator = torch.Generator().manual_seed(0)

        def draw(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        self.k, self.v = draw(96, 2, 6), draw(96, 2, 6)
        self.q = draw(rows, len(kv_index), 6)
        self.kv_index = kv_index

    def __call__(self, op, rows, **kwargs):
        return op(self.q, self.k, self.v, rows, self.kv_index, 0.4, **kwargs)


def rows_for_a_device(spans, dtype, **options):
    """The rows that a GPU gets, here on CPU: no length is a number of the host."""
    block = StepBlock(torch.device("cpu"))
    rows = stage_paged_rows(spans, PAGE, block, dtype, **options)
    block.send()
    return rows()


@pytest.mark.parametrize("group_slots", [1 << 18, 40, 1])
@STEP
@DTYPES
@torch.inference_mode()
def test_decode_rows_without_lengths_of_the_host(step, dtype, group_slots):
    """As on a GPU: padded pages, and a bias instead of lengths. What lies in the null page never shows."""
    spans = STEPS[step]
    rows = rows_for_a_device(spans, dtype, decode_group_slots=group_slots)
    mla, gqa = Mla(num_rows(spans), dtype), Gqa(num_rows(spans), dtype, (0, 0, 0, 1))
    if step != "dead rows":
        mla.cache[:PAGE], gqa.k[:PAGE], gqa.v[:PAGE] = 50.0, 50.0, 50.0
    torch.testing.assert_close(mla(mla_attention, rows), mla(mla_attention_reference, rows), **TOLERANCE[dtype])
    torch.testing.assert_close(gqa(gqa_attention, rows), gqa(gqa_attention_reference, rows), **TOLERANCE[dtype])


@STEP
@DTYPES
@pytest.mark.parametrize("kv_index", KV_INDICES, ids=str)
@torch.inference_mode()
def test_gqa_agrees_with_the_torch_version(step, dtype, kv_index):
    rows = build_paged_rows(STEPS[step], PAGE)
    gqa = Gqa(num_rows(STEPS[step]), dtype, kv_index)
    expected = gqa(gqa_attention_reference, rows)
    got = gqa(gqa_attention, rows)
    assert got.shape == (num_rows(STEPS[step]), 6 * len(kv_index)) and got.dtype == dtype
    torch.testing.assert_close(got, expected, **TOLERANCE[dtype])
    out = torch.empty_like(got)
    assert gqa(gqa_attention, rows, out=out) is out and torch.equal(out, got)


@DTYPES
@torch.inference_mode()
def test_gqa_chunks_and_decode_are_the_prompt(dtype):
    gqa = Gqa(23, dtype, (0, 0, 1))
    new_k, new_v = gqa.k[:23].clone(), gqa.v[:23].clone()

    def run(chunks):
        gqa.k.zero_(), gqa.v.zero_()
        parts, start = [], 0
        for size in chunks:
            rows = build_paged_rows([(start, size, PAGES[0])], PAGE)
            of_chunk = slice(start, start + size)
            write_cache(gqa.k, new_k[of_chunk], rows.slots_T)
            write_cache(gqa.v, new_v[of_chunk], rows.slots_T)
            parts.append(gqa_attention(gqa.q[of_chunk], gqa.k, gqa.v, rows, gqa.kv_index, 0.4))
            start += size
        return torch.cat(parts)

    prompt = run([23])
    torch.testing.assert_close(run([9, 2, 1, 11]), prompt, **TOLERANCE[dtype])
    torch.testing.assert_close(run([1] * 23), prompt, **TOLERANCE[dtype])
    spans = build_paged_rows([(0, 23, PAGES[0])], PAGE).prefills[0].slots_L
    k, v = (cache[spans][:, [0, 0, 1]].transpose(0, 1)[None] for cache in (gqa.k, gqa.v))
    expected = functional.scaled_dot_product_attention(gqa.q.transpose(0, 1)[None], k, v, is_causal=True, scale=0.4)
    torch.testing.assert_close(prompt, expected[0].transpose(0, 1).flatten(1), **TOLERANCE[dtype])


def test_an_even_split_is_one_block():
    assert len(head_blocks(tuple(h // 4 for h in range(32)))) == 1
    assert len(head_blocks(tuple(range(8)))) == 1
    assert len(head_blocks((0,) * 7)) == 1
    for kv_index in KV_INDICES:
        read = []
        for block in head_blocks(kv_index):
            group, rest = divmod(block.q_stop - block.q_start, block.kv_stop - block.kv_start)
            assert rest == 0 and block.q_start == len(read)
            read += [head for head in range(block.kv_start, block.kv_stop) for _ in range(group)]
        assert tuple(read) == kv_index
    assert head_blocks(()) == ()


@DTYPES
@pytest.mark.parametrize(("rows", "context"), [(1, 1), (1, 9), (5, 5), (4, 9), (150, 150), (70, 200)])
@torch.inference_mode()
def test_causal_attention_agrees_with_the_torch_version(rows, context, dtype):
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((2, 3, rows, 8), (2, context, 8), (2, context, 5))
    )
    got = causal_attention(q, k, v, 0.35)
    assert got.shape == (rows, 2, 3, 5)
    torch.testing.assert_close(got, causal_attention_reference(q, k, v, 0.35), **TOLERANCE[dtype])
    mask = torch.ones((rows, context), dtype=torch.bool).tril(context - rows)
    k, v = (kv.unsqueeze(1).expand(-1, 3, -1, -1) for kv in (k, v))
    expected = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.35).permute(2, 0, 1, 3)
    torch.testing.assert_close(got, expected, **TOLERANCE[dtype])


@STEP
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_a_rank_without_heads(step, dtype):
    """More ranks than heads: nothing to do, and nothing breaks."""
    rows = build_paged_rows(STEPS[step], PAGE)
    mla, gqa = Mla(num_rows(STEPS[step]), dtype, heads=0), Gqa(num_rows(STEPS[step]), dtype, ())
    assert mla(mla_attention, rows).shape == gqa(gqa_attention, rows).shape == (num_rows(STEPS[step]), 0)


@pytest.fixture
def fused(monkeypatch):
    """As on a GPU in 16 bits: torch's attention for all heads and rows of a span, and keys of its dtype."""
    monkeypatch.setattr(gqa_module, "kernels", lambda: None)
    monkeypatch.setattr(packed_module, "kernels", lambda: None)
    for module in (causal_module, mla_module):
        monkeypatch.setattr(module, "is_fused", lambda q: True)


@DTYPES
@pytest.mark.parametrize("window", [None, 1, 7, 1000])
@pytest.mark.parametrize(("rows", "context"), [(1, 1), (1, 9), (5, 5), (4, 9), (150, 150), (70, 200)])
@torch.inference_mode()
def test_fused_attention_agrees_with_the_torch_version(rows, context, window, dtype, fused):
    q, k, v = (torch.randn(shape).to(dtype) for shape in ((2, 3, rows, 8), (2, context, 8), (2, context, 5)))
    got = causal_attention(q, k, v, 0.35, window=window)
    assert got.shape == (rows, 2, 3, 5) and got.dtype == dtype
    torch.testing.assert_close(got, causal_attention_reference(q, k, v, 0.35, window=window), **TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize("keys", [1 << 29, 23 * 15, 1])
@pytest.mark.parametrize("absorb", [False, True])
@pytest.mark.parametrize("step", ["prompt", "chunk", "two prompts", "mixed"])
@torch.inference_mode()
def test_fused_mla_prefill(step, absorb, keys, dtype, fused, monkeypatch):
    """Keys of all heads at once, of some, and of one."""
    monkeypatch.setattr(mla_module, "FUSED_KEYS", keys)
    monkeypatch.setattr(mla_module, "_absorbing_is_cheaper", lambda *_: absorb)
    mla, rows = Mla(num_rows(STEPS[step]), dtype), rows_for_a_device(STEPS[step], dtype)
    assert isinstance(mla.w_uk, torch.Tensor)
    torch.testing.assert_close(mla(mla_attention, rows), mla(mla_attention_reference, rows), **TOLERANCE[dtype])


PAGE_OF_MODELS = 16


def spans_of(shapes, page=PAGE_OF_MODELS):
    """(start, rows) of each context to spans whose pages lie in no order; and how many slots there are."""
    counts = [-(-(start + rows) // page) for start, rows in shapes]
    order = (torch.randperm(sum(counts), generator=torch.Generator().manual_seed(5)) + 1).tolist()
    spans = [
        (start, rows, tuple(order[sum(counts[:i]) : sum(counts[: i + 1])])) for i, (start, rows) in enumerate(shapes)
    ]
    return spans, page * (1 + sum(counts))


MODELS = {"dsv3": (128, 64, 512, 128), "odd": (33, 6, 70, 47), "tiny": (1, 2, 3, 1)}
# Around the kernels' blocks: 12 rows, 48 rows, 128 and 256 tokens; behind a context, and alone.
SHAPES = [
    [(0, 13)],
    [(0, 300)],
    [(250, 60), (0, 2)],
    [(0, 1), (126, 1), (127, 1), (128, 1), (300, 1), (16, 1), (31, 1), (47, 1)],
    [(299, 1), (200, 49), (0, 1), (511, 5)],
]


def exact_mla(mla, rows):
    """`mla_attention` in float64: keys and values of all slots expanded once, then grouped-query attention."""
    w_uk, w_uv = (w.double() for w in plain_halves(mla.w_uk, mla.w_uv))
    heads, _, rank = w_uk.shape
    c, k_pe = mla.cache.double().tensor_split((rank,), dim=1)
    keys = torch.cat((torch.einsum("sr,ndr->snd", c, w_uk), k_pe[:, None].expand(-1, heads, -1)), dim=-1)
    values = torch.einsum("sr,nvr->snv", c, w_uv)
    width = max(keys.shape[2], values.shape[2])
    q = torch.cat((mla.q_nope, mla.q_pe), dim=-1).double()
    q, keys, values = (functional.pad(x, (0, width - x.shape[2])) for x in (q, keys, values))
    y = gqa_attention_reference(q, keys, values, rows, tuple(range(heads)), mla.scale)
    return y.unflatten(1, (heads, width))[..., : w_uv.shape[1]].flatten(1)


def check_near(got, expected):
    torch.testing.assert_close(got.double(), expected, rtol=2e-2, atol=2e-2)
    assert (got.double() - expected).norm() <= 6e-3 * expected.norm()


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("heads", [1, 9])
@pytest.mark.parametrize("model", MODELS)
@torch.inference_mode()
def test_mla_of_models(model, heads, shapes, which):
    """bf16 against float64: as near as torch's products are."""
    spans, slots = spans_of(shapes)
    rows = build_paged_rows(spans, PAGE_OF_MODELS)
    mla = Mla(num_rows(spans), torch.bfloat16, heads=heads, dims=MODELS[model], slots=slots, scale=0.1)
    assert isinstance(mla.w_uk, PackedKeys) == (which != "torch")
    torch.set_num_threads(1)
    check_near(mla(mla_attention, rows), exact_mla(mla, rows))


GQA_MODELS = [((0,) * 9, 1, 64), ((0, 0, 0, 0, 1, 1, 1, 1), 2, 128), ((0, 1, 2), 3, 33), ((1, 0, 2, 2, 0), 3, 7)]


class GqaOfModel:
    """bf16 queries side by side with keys and values, as in the model, and caches of as many slots as given."""

    def __init__(self, rows, slots, kv_index, num_kv, dim):
        self.keys, self.values = torch.randn(2, slots, num_kv, dim).to(torch.bfloat16)
        self.q = torch.randn(rows, len(kv_index) + 2 * num_kv, dim).to(torch.bfloat16)[:, : len(kv_index)]
        self.kv_index, self.scale = kv_index, dim**-0.5

    def __call__(self, op, rows, dtype=torch.bfloat16):
        tensors = (x.to(dtype) for x in (self.q, self.keys, self.values))
        return op(*tensors, rows, self.kv_index, self.scale)


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("model", GQA_MODELS, ids=str)
@torch.inference_mode()
def test_gqa_of_models(model, shapes):
    spans, slots = spans_of(shapes)
    rows = build_paged_rows(spans, PAGE_OF_MODELS)
    gqa = GqaOfModel(num_rows(spans), slots, *model)
    torch.set_num_threads(1)
    check_near(gqa(gqa_attention, rows), gqa(gqa_attention_reference, rows, torch.float64))


@torch.inference_mode()
def test_threads_change_no_bit(which):
    if which == "torch":
        pytest.skip("libraries split work by the number of threads")
    spans, slots = spans_of([(0, 70), (299, 1), (40, 1), (300, 4)])
    rows = build_paged_rows(spans, PAGE_OF_MODELS)
    mla = Mla(num_rows(spans), torch.bfloat16, heads=9, dims=MODELS["odd"], slots=slots, scale=0.1)
    gqa = GqaOfModel(num_rows(spans), slots, *GQA_MODELS[0])
    torch.set_num_threads(1)
    one = mla(mla_attention, rows), gqa(gqa_attention, rows)
    torch.set_num_threads(2)
    two = mla(mla_attention, rows), gqa(gqa_attention, rows)
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


@pytest.mark.parametrize("absorb", [False, True])
@torch.inference_mode()
def test_both_forms_of_mla_prefill_in_bf16(absorb, monkeypatch):
    monkeypatch.setattr(mla_module, "_absorbing_is_cheaper", lambda *_: absorb)
    for shapes in ([(0, 70)], [(300, 14), (5, 1)]):
        spans, slots = spans_of(shapes)
        rows = build_paged_rows(spans, PAGE_OF_MODELS)
        mla = Mla(num_rows(spans), torch.bfloat16, heads=3, dims=MODELS["odd"], slots=slots, scale=0.1)
        torch.testing.assert_close(mla(mla_attention, rows).double(), exact_mla(mla, rows), rtol=2e-2, atol=2e-2)


@torch.inference_mode()
def test_large_scores_and_padding_never_show(which):
    """Scores far apart (the largest of a row comes late, in another block) and a null page of infinities."""
    spans, slots = spans_of([(0, 290), (270, 1)])
    rows = build_paged_rows(spans, PAGE_OF_MODELS)
    keys, values = torch.randn(2, slots, 1, 32).to(torch.bfloat16)
    keys[rows.prefills[0].slots_L[280]] *= 40
    q = (torch.randn(291, 2, 32) * 20).to(torch.bfloat16)
    expected = gqa_attention_reference(q, keys, values, rows, (0, 0), 1.0)
    if which != "torch":  # torch's padded reads ask the null page to be finite
        keys[:PAGE_OF_MODELS] = values[:PAGE_OF_MODELS] = float("inf")
    torch.testing.assert_close(gqa_attention(q, keys, values, rows, (0, 0), 1.0), expected, rtol=2e-2, atol=2e-2)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(st.tuples(st.integers(0, 270), st.integers(0, 60)), max_size=5),
    decodes=st.lists(st.integers(0, 270), max_size=5),
    heads=st.integers(1, 10),
    dims=st.tuples(*(st.integers(1, most) for most in (40, 8, 70, 40))),
    page=st.sampled_from([1, 4, 16]),
)
@torch.inference_mode()
def test_mla_of_any_step(shapes, decodes, heads, dims, page):
    mixed = [*shapes[:2], *((start, 1) for start in decodes), *shapes[2:]]
    spans, slots = spans_of(mixed, page)
    rows = build_paged_rows(spans, page)
    nope, pe, rank, value = dims
    mla = Mla(num_rows(spans), torch.bfloat16, heads=heads, dims=(nope, 2 * pe, rank, value), slots=slots, scale=0.1)
    torch.testing.assert_close(mla(mla_attention, rows).double(), exact_mla(mla, rows), rtol=2e-2, atol=3e-2)


# -- windows -----------------------------------------------------------------------------------------------------------

WINDOWS = pytest.mark.parametrize("window", [1, 3, 8, 22, 23, 99])


@WINDOWS
@DTYPES
@pytest.mark.parametrize("num_rows", [1, 5, 23])
@torch.inference_mode()
def test_a_window_hides_what_lies_before_it(num_rows, dtype, window, monkeypatch):
    monkeypatch.setattr(causal_module, "BLOCK_ROWS", 4)
    q, k, v = (torch.randn(shape).to(dtype) for shape in ((2, 3, num_rows, 6), (2, 23, 6), (2, 23, 5)))
    got = causal_attention(q, k, v, 0.4, window=window)
    torch.testing.assert_close(got, causal_attention_reference(q, k, v, 0.4, window=window), **TOLERANCE[dtype])
    hidden = 23 - num_rows + 1 - window  # tokens that no row sees
    if hidden > 0:
        k[:, :hidden], v[:, :hidden] = float("nan"), float("nan")
        assert torch.equal(causal_attention(q, k, v, 0.4, window=window), got)
    if window < 23:  # one token more in the window is seen
        assert not torch.equal(causal_attention(q, k, v, 0.4, window=window + 1), got)


@STEP
@DTYPES
@WINDOWS
@torch.inference_mode()
def test_gqa_within_a_window(step, dtype, window):
    """Against every row alone, its slots cut off before the window by hand."""
    whole = build_paged_rows(STEPS[step], PAGE)
    rows = windowed_rows(whole, window)
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((num_rows(STEPS[step]), 4, 8), *((96, 2, 8),) * 2)
    )
    got = gqa_attention(q, k, v, rows, (0, 0, 1, 1), 0.3)
    want = torch.cat(
        [
            gqa_attention_reference(q[row : row + 1], k, v, alone, (0, 0, 1, 1), 0.3)
            for row, alone in enumerate(alone_in_a_window(STEPS[step], window))
        ]
        or [got]
    )
    torch.testing.assert_close(got, want, **TOLERANCE[dtype])
    torch.testing.assert_close(gqa_attention_reference(q, k, v, rows, (0, 0, 1, 1), 0.3), want, **TOLERANCE[dtype])


def alone_in_a_window(spans, window):
    """For each row of a step, a step of it alone that has only the slots of its window."""
    for start, count, pages in spans:
        for position in range(start, start + count):
            seen = range(max(0, position + 1 - window), position + 1)
            slots = tuple(pages[at // PAGE] * PAGE + at % PAGE for at in seen)
            yield build_paged_rows([(len(slots) - 1, 1, slots)], 1)


@torch.inference_mode()
def test_windowed_rows_stay_in_the_memory_they_are_given():
    """As a capture needs it: a step has the addresses of the previous one."""
    held = DecodeRows(2, 40, PAGE)
    first = windowed_rows(held.set([(5, 1, PAGES[0]), (0, 1, PAGES[3])]), 4)
    addresses = first.decode_slots_BL.data_ptr(), first.decode_lens_B.data_ptr()
    then = windowed_rows(held.set([(6, 1, PAGES[0]), (1, 1, PAGES[3])]), 4, into=first)
    assert (then.decode_slots_BL.data_ptr(), then.decode_lens_B.data_ptr()) == addresses
    assert then.decode_lens_B.tolist() == [4, 2] and then.decode_groups[0].max_len == 4
    assert then.decode_slots_BL.tolist() == [[31, 12, 13, 14], [24, 25, 0, 0]]
