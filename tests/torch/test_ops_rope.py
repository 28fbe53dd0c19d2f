"""rope: frequencies against ROPE_INIT_FUNCTIONS with checkpoints' own numbers, rotation against the modeling files.

Rotation runs twice: as chosen on this CPU (compiled, where that is built), and by torch alone.
"""

import math

import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV3Config, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3
from transformers.models.llama import modeling_llama as llama

from narrows.errors import ConfigError
from narrows.ops import rope as rope_module
from narrows.ops import rope_cache as rope_cache_module
from narrows.ops.compiled import kernels
from narrows.ops.rope import (
    apply_rope,
    apply_rope_reference,
    mla_softmax_scale,
    rope_inverse_frequencies,
    rope_table,
)
from narrows.ops.rope_angles import RopeAngles
from narrows.ops.rope_cache import (
    rope_write_heads,
    rope_write_heads_reference,
    rope_write_latents,
    rope_write_latents_reference,
)
from narrows.ops.step_block import StepBlock


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=["compiled", "torch"])
def which(request, monkeypatch):
    if request.param == "compiled" and kernels() is None:
        pytest.skip("the rotation is not compiled here")
    if request.param == "torch":
        monkeypatch.setattr(rope_module, "kernels", lambda: None)
        monkeypatch.setattr(rope_cache_module, "kernels", lambda: None)


USES_KERNELS = pytest.mark.usefixtures("which")


LLAMA_31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
DEEPSEEK_V3 = {
    "type": "yarn",
    "factor": 40,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
}
DEEPSEEK_V2_LITE = {**DEEPSEEK_V3, "mscale": 0.707, "mscale_all_dim": 0.707}
QWEN_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}

CASES = {
    "linear": (128, 10000.0, {"rope_type": "linear", "factor": 4.0}, 8192),
    "llama-3.1": (128, 500000.0, LLAMA_31, 131072),
    "deepseek-v3": (64, 10000.0, DEEPSEEK_V3, 163840),
    "deepseek-v2-lite": (64, 10000.0, DEEPSEEK_V2_LITE, 163840),
    "mscales-differ": (64, 10000.0, {**DEEPSEEK_V3, "mscale": 1.0, "mscale_all_dim": 0.5}, 163840),
    "qwen-yarn": (128, 1000000.0, QWEN_YARN, 131072),
    "yarn-untruncated": (64, 150000.0, {**QWEN_YARN, "truncate": False, "beta_fast": 16.0, "beta_slow": 2.0}, 131072),
    "yarn-factor-of-lengths": (64, 10000.0, {**DEEPSEEK_V3, "factor": None}, 163840),
    "yarn-attention-factor": (64, 10000.0, {**DEEPSEEK_V3, "attention_factor": 1.25}, 163840),
    "yarn-narrow-ramp": (8, 10000.0, {**QWEN_YARN, "original_max_position_embeddings": 16}, 64),
}


@pytest.mark.parametrize("name", CASES)
def test_frequencies_are_transformers(name):
    dim, theta, scaling, max_position = CASES[name]
    rope_type = scaling.get("rope_type", scaling.get("type"))
    config = LlamaConfig(hidden_size=4 * dim, num_attention_heads=4, max_position_embeddings=max_position)
    config.rope_parameters = {**scaling, "rope_type": rope_type, "rope_theta": theta}
    expected, expected_factor = ROPE_INIT_FUNCTIONS[rope_type](config)
    inv_freq, factor = rope_inverse_frequencies(dim, theta, scaling=scaling, max_position=max_position)
    assert inv_freq.dtype == torch.float32 and inv_freq.shape == (dim // 2,)
    assert torch.equal(inv_freq, expected)
    assert factor == expected_factor


LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 2.0],
    "long_factor": [1.0, 2.0, 4.0, 9.0],
    "original_max_position_embeddings": 32,
}
BY_LENGTH = {
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "longrope": LONGROPE,
    "longrope-factor": {**LONGROPE, "factor": 5.0},
    "longrope-attention-factor": {**LONGROPE, "attention_factor": 1.25},
}


@pytest.mark.parametrize("length", [0, 1, 31, 32, 33, 128, 300])
@pytest.mark.parametrize("name", BY_LENGTH)
def test_frequencies_by_length_are_transformers(name, length):
    scaling = BY_LENGTH[name]
    most = 32 if name == "dynamic" else 128
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, max_position_embeddings=most)
    config.rope_parameters = {**scaling, "rope_theta": 1e4}
    expected, expected_factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, seq_len=torch.tensor(length))
    inv_freq, factor = rope_inverse_frequencies(8, 1e4, scaling=scaling, max_position=most, length=length)
    torch.testing.assert_close(inv_freq, expected, rtol=1e-6, atol=0)
    assert factor == expected_factor


@pytest.mark.parametrize("name", [None, *BY_LENGTH])
def test_angles_depend_only_on_each_rows_own_sequence(name):
    """Rows of a prompt take the whole prompt's length, others their own: as the module rotates one sequence alone."""
    most = 32 if name == "dynamic" else 128
    scaling = None if name is None else BY_LENGTH[name]
    angles = RopeAngles(
        8,
        1e4,
        scaling=scaling,
        max_position=most,
        num_positions=64,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    assert angles.by_length == (name is not None)
    block = StepBlock(torch.device("cpu"))
    positions = [0, 5, 40, 31, 32, 63, 7]
    tokens = [6, 6, 50, 32, 33, 64, 60]
    lengths = angles.stage(tokens, block)
    cos, sin = angles.rows(torch.tensor(positions), lengths)
    for row, (position, length) in enumerate(zip(positions, tokens, strict=True)):
        inv_freq, factor = rope_inverse_frequencies(8, 1e4, scaling=scaling, max_position=most, length=length)
        want_cos, want_sin = rope_table(inv_freq, factor, position + 1, torch.float32)
        torch.testing.assert_close(cos[row], want_cos[-1], rtol=0, atol=1e-5)
        torch.testing.assert_close(sin[row], want_sin[-1], rtol=0, atol=1e-5)
    alone, _ = angles.rows(torch.tensor(positions))  # without lengths each is the last of its sequence
    own, _ = angles.rows(torch.tensor(positions), angles.stage([position + 1 for position in positions], block))
    assert torch.equal(alone, own)
    room = torch.empty_like(cos), torch.empty_like(sin)
    into = angles.rows(torch.tensor(positions), lengths, cos=room[0], sin=room[1])
    assert into[0] is room[0] and torch.equal(room[0], cos) and torch.equal(room[1], sin)


def test_dynamic_needs_more_than_one_pair():
    with pytest.raises(ConfigError, match="more than 2 rotated columns"):
        rope_inverse_frequencies(2, 1e4, scaling={"rope_type": "dynamic", "factor": 2.0}, max_position=8)


def test_longrope_needs_a_number_for_each_pair():
    with pytest.raises(ConfigError, match="5 numbers for 'short_factor'"):
        rope_inverse_frequencies(10, 1e4, scaling=LONGROPE, max_position=128)


@pytest.mark.parametrize("scaling", [None, {}, {"rope_type": "default"}, {"type": "default"}])
def test_default_frequencies(scaling):
    expected, expected_factor = llama.LlamaRotaryEmbedding.compute_default_rope_parameters(
        LlamaConfig(hidden_size=256, num_attention_heads=4, rope_theta=5e5)
    )
    inv_freq, factor = rope_inverse_frequencies(64, 5e5, scaling=scaling, max_position=2048)
    assert torch.equal(inv_freq, expected) and factor == expected_factor == 1.0


def test_original_length_defaults_to_the_configs():
    short = {key: value for key, value in QWEN_YARN.items() if key != "original_max_position_embeddings"}
    got, _ = rope_inverse_frequencies(64, 1e6, scaling=short, max_position=32768)
    assert torch.equal(got, rope_inverse_frequencies(64, 1e6, scaling=QWEN_YARN, max_position=99)[0])


@pytest.mark.parametrize("rope_type", ["su", "axial", None])
def test_unknown_types_are_refused_by_name(rope_type):
    scaling = {"rope_type": rope_type, "factor": 2.0}
    with pytest.raises(ConfigError, match="default, dynamic, linear, llama3, longrope, yarn"):
        rope_inverse_frequencies(64, 1e4, scaling=scaling, max_position=2048)
    with pytest.raises(ConfigError, match="default, dynamic, linear, llama3, longrope, yarn"):
        mla_softmax_scale(192, scaling)


def test_missing_numbers_are_named():
    with pytest.raises(ConfigError, match="'factor'"):
        rope_inverse_frequencies(64, 1e4, scaling={"type": "linear"}, max_position=2048)
    with pytest.raises(ConfigError, match="'low_freq_factor'"):
        rope_inverse_frequencies(64, 1e4, scaling={"type": "llama3", "factor": 8.0}, max_position=2048)
    with pytest.raises(ConfigError, match="'factor'"):
        mla_softmax_scale(192, {"type": "yarn", "mscale_all_dim": 1.0})


@pytest.mark.parametrize(
    ("scaling", "mscale"),
    [
        (None, 1.0),
        ({"rope_type": "default", "mscale_all_dim": 1.0, "factor": 40}, 1.0),
        (QWEN_YARN, 1.0),
        (DEEPSEEK_V3, 0.1 * math.log(40) + 1),
        (DEEPSEEK_V2_LITE, 0.0707 * math.log(40) + 1),
        ({**DEEPSEEK_V3, "factor": 1.0}, 1.0),
    ],
)
def test_mla_scale_equals_v2_and_v3(scaling, mscale):
    parameters = {**(scaling or {}), "rope_theta": 1e4}
    parameters.setdefault("rope_type", parameters.get("type", "default"))
    got = mla_softmax_scale(192, scaling)
    assert got == v2.yarn_apply_mscale(parameters, 192**-0.5) == v3.yarn_apply_mscale(parameters, 192**-0.5)
    assert got == pytest.approx(192**-0.5 * mscale**2, rel=1e-12)


@USES_KERNELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_rotation_equals_v3_and_llama(dtype):
    config = DeepseekV3Config(rope_parameters={**DEEPSEEK_V3, "rope_type": "yarn", "rope_theta": 1e4})
    config.max_position_embeddings = 163840
    positions = torch.tensor([0, 1, 5, 4095, 100_000])
    cos, sin = v3.DeepseekV3RotaryEmbedding(config)(torch.empty(0, dtype=dtype), positions[None])
    table = rope_table(*rope_inverse_frequencies(64, 1e4, scaling=DEEPSEEK_V3, max_position=163840), 100_001, dtype)
    cos_TD2, sin_TD2 = (half[positions] for half in table)
    assert torch.equal(cos_TD2, cos[0, :, :32]) and torch.equal(sin_TD2, sin[0, :, :32])
    q = torch.randn((5, 3, 64)).to(dtype)
    for interleaved, rotate in ((True, v3.apply_rotary_pos_emb_interleave), (False, v3.apply_rotary_pos_emb)):
        expected = rotate(q.transpose(0, 1)[None], q.transpose(0, 1)[None], cos, sin)[0][0].transpose(0, 1)
        assert torch.equal(apply_rope(q, cos_TD2, sin_TD2, interleaved=interleaved), expected)
        assert torch.equal(apply_rope_reference(q, cos_TD2, sin_TD2, interleaved=interleaved), expected)


@USES_KERNELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_scores_equal_v2(dtype):
    """V2 leaves the pairs in place: another order of columns, the same numbers."""
    config = DeepseekV2Config(rope_parameters={**DEEPSEEK_V2_LITE, "rope_type": "yarn", "rope_theta": 1e4})
    config.max_position_embeddings = 163840
    positions = torch.arange(7)
    turn = v2.DeepseekV2RotaryEmbedding(config)(torch.empty(0, dtype=dtype), positions[None])
    x = torch.randn((7, 2, 64)).to(dtype)
    expected, _ = v2.apply_rotary_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], turn)
    frequencies = rope_inverse_frequencies(64, 1e4, scaling=DEEPSEEK_V2_LITE, max_position=163840)
    cos, sin = rope_table(*frequencies, 7, torch.float32)
    got = apply_rope(x, cos, sin, interleaved=True).unflatten(-1, (2, 32)).transpose(-1, -2).flatten(-2)
    assert got.dtype == dtype
    torch.testing.assert_close(
        got, expected[0].transpose(0, 1), rtol=1e-5 if dtype == torch.float32 else 8e-3, atol=1e-6
    )


@USES_KERNELS
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("num_rows", [0, 1, 6])
@torch.inference_mode()
def test_rotation_writes_out_even_in_place(interleaved, num_rows):
    cos, sin = rope_table(*rope_inverse_frequencies(16, 1e4, scaling=None, max_position=64), num_rows, torch.float32)
    heads = torch.randn((num_rows, 3, 24))
    x = heads[..., 8:]  # the rotated columns of wider heads
    expected = apply_rope_reference(x, cos, sin, interleaved=interleaved)
    assert torch.equal(apply_rope(x, cos, sin, interleaved=interleaved), expected)
    kept = heads[..., :8].clone()
    assert apply_rope(x, cos, sin, interleaved=interleaved, out=x) is x
    assert torch.equal(heads[..., 8:], expected) and torch.equal(heads[..., :8], kept)


TYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]


def table_of(num_rows, dim, dtype):
    frequencies = rope_inverse_frequencies(dim, 1e4, scaling=None, max_position=4096)
    positions = torch.randint(0, 4096, (num_rows,))
    return tuple(half[positions] for half in rope_table(*frequencies, 4096, dtype))


@pytest.mark.parametrize("dim", [2, 6, 64, 96])
@pytest.mark.parametrize("num_rows", [0, 1, 7])
@pytest.mark.parametrize(("dtype", "table"), TYPES)
@torch.inference_mode()
def test_latents_are_rotated_and_written(dtype, table, num_rows, dim):
    """The compiled pass against the ops it replaces: the same bits, and nothing else written."""
    rank, heads = 20, 3
    cos, sin = table_of(num_rows, dim, table)
    q, latents = torch.randn((num_rows, heads, 10 + dim)).to(dtype), torch.randn((num_rows, 5 + rank + dim)).to(dtype)
    slots = torch.randperm(40)[:num_rows]
    runs = []
    for op in (rope_write_latents, rope_write_latents_reference):
        cache, queries = torch.full((40, rank + dim), 7.0, dtype=dtype), q.clone()
        op(queries[..., 10:], latents[:, 5:], cos, sin, cache, slots)
        runs.append((queries, cache))
    for got, expected in zip(*runs, strict=True):
        assert torch.equal(got, expected)
    assert torch.equal(runs[0][0][..., :10], q[..., :10]) and (runs[0][1] == 7).all(1).sum() == 40 - num_rows


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dim", [2, 6, 64, 128])
@pytest.mark.parametrize("num_rows", [0, 1, 7])
@pytest.mark.parametrize(("dtype", "table"), TYPES)
@torch.inference_mode()
def test_heads_are_normed_rotated_and_written(dtype, table, num_rows, dim, normed):
    num_q, num_kv = 5, 2
    cos, sin = table_of(num_rows, dim, table)
    qkv = torch.randn((num_rows, num_q + 2 * num_kv, dim)).to(dtype)
    slots = torch.randperm(40)[:num_rows]
    weights = {"q_norm_D": torch.rand(dim).to(dtype), "k_norm_D": torch.rand(dim).to(dtype), "eps": 1e-6}
    runs = []
    for op in (rope_write_heads, rope_write_heads_reference):
        keys, values = torch.full((2, 40, num_kv, dim), 7.0, dtype=dtype)
        q = op(qkv.clone(), cos, sin, keys, values, slots, **(weights if normed else {}))
        assert q.shape == (num_rows, num_q, dim)
        runs.append((q, keys, values))
    for got, expected in zip(*runs, strict=True):
        # The norm's sum is taken in another order: now and then another bf16 number beside.
        close = dict(rtol=1.6e-2, atol=1.6e-2) if dtype == torch.bfloat16 else dict(rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got, expected, **(close if normed else dict(rtol=0, atol=0)))
    assert (runs[0][1] == 7).all(2).sum() == (40 - num_rows) * num_kv
