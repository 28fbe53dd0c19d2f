"""rms_norm, linear, act_mul, embedding, argmax: against their twins and against transformers."""

import pytest
import torch
from torch.nn import functional
from transformers.activations import ACT2FN
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm

from narrows.arch.model import HIDDEN_ACTS
from narrows.ops.act_mul import ACTIVATIONS, act_mul
from narrows.ops.add_rows import add_rows
from narrows.ops.argmax import argmax, pick, pick_reference, shard_argmax
from narrows.ops.embedding import embedding, embedding_reference
from narrows.ops.linear import linear, linear_reference
from narrows.ops.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_in_two, rms_norm_reference


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


DTYPES = [torch.float32, torch.bfloat16]


def ulps_apart(a, b):
    """Steps between two bf16 tensors of one sign pattern."""
    return (a.view(torch.int16).to(torch.int32) - b.view(torch.int16).to(torch.int32)).abs().max().item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [0, 1, 7])
@torch.inference_mode()
def test_rms_norm_is_transformers(dtype, num_rows):
    generator = torch.Generator().manual_seed(num_rows)
    x = (torch.randn((num_rows, 96), generator=generator) * 3).to(dtype)
    module = DeepseekV3RMSNorm(96, eps=1e-6).to(dtype)
    module.weight.copy_(torch.rand(96, generator=generator) + 0.5)
    expected = module(x)
    assert torch.equal(rms_norm_reference(x, module.weight, 1e-6), expected)
    got = rms_norm(x, module.weight, 1e-6)
    assert got.dtype == dtype and got.shape == x.shape
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6) if dtype == torch.float32 else None
    if dtype == torch.bfloat16 and num_rows:
        assert ulps_apart(got, expected) <= 1
    out = torch.empty_like(x)
    assert rms_norm(x, module.weight, 1e-6, out=out) is out and torch.equal(out, got)
    assert torch.equal(rms_norm(x, module.weight, 1e-6, out=x), got)  # in place


@torch.inference_mode()
def test_rms_norm_in_bf16_rounds_before_the_weight():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((64, 512), generator=generator).bfloat16()
    weight = (torch.rand(512, generator=generator) + 0.5).bfloat16()
    expected = rms_norm_reference(x, weight, 1e-6)
    got = rms_norm(x, weight, 1e-6)
    assert (got != expected).float().mean() < 1e-3
    assert (functional.rms_norm(x, (512,), weight, 1e-6) != expected).float().mean() > 0.1  # why it is not used


@pytest.mark.parametrize("shape", [(0, 96), (7, 96), (64, 512), (5, 3, 64)])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_the_norm_of_gpus_rounds_before_the_weight_too(dtype, shape):
    """torch's norm without a weight, then the product: as near to the reference as `rms_norm` is."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn((*shape[:-1], shape[-1] + 8), generator=generator) * 3).to(dtype)[..., : shape[-1]]
    weight = (torch.rand(shape[-1], generator=generator) + 0.5).to(dtype)
    expected, got = rms_norm_reference(x, weight, 1e-6), rms_norm_in_two(x, weight, 1e-6)
    assert got.dtype == dtype and got.shape == x.shape
    if dtype == torch.float32:
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    elif x.numel():
        assert (got != expected).float().mean() < 1e-3
    out = torch.empty_like(x)
    assert rms_norm_in_two(x, weight, 1e-6, out=out) is out and torch.equal(out, got)
    assert torch.equal(rms_norm_in_two(x, weight, 1e-6, out=x), got)  # in place


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [0, 1, 5])
@torch.inference_mode()
def test_add_rms_norm(dtype, num_rows):
    x, residual = torch.randn((2, num_rows, 64)).to(dtype)
    weight = torch.rand(64).to(dtype)
    expected, expected_residual = add_rms_norm_reference(x, residual, weight, 1e-5)
    normed, new_residual = add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(new_residual, expected_residual)
    torch.testing.assert_close(normed, expected, rtol=1e-6 if dtype == torch.float32 else 8e-3, atol=1e-6)
    kept = residual.clone()
    normed_out, residual_out = add_rms_norm(x, kept, weight, 1e-5, out=torch.empty_like(x), residual_out=kept)
    assert residual_out is kept and torch.equal(kept, expected_residual) and torch.equal(normed_out, normed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "width"), [(0, 16), (1, 7), (5, 40), (600, 1024)])
@torch.inference_mode()
def test_add_rows_has_the_bits_of_torch(dtype, num_rows, width):
    draw = torch.Generator().manual_seed(num_rows)
    a, b = (torch.randn(num_rows, 2 * width, generator=draw).to(dtype) for _ in range(2))
    for left, right in ((a, b), (a[:, width:], b[:, :width])):  # the second pair has gaps between its rows
        before = left.clone(), right.clone()
        assert torch.equal(add_rows(left, right), left + right)
        assert torch.equal(left, before[0]) and torch.equal(right, before[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("num_rows", [0, 1, 6])
@torch.inference_mode()
def test_linear_out_is_linear(dtype, with_bias, num_rows):
    x, weight = torch.randn((num_rows, 32)).to(dtype), torch.randn((24, 32)).to(dtype)
    bias = torch.randn(24).to(dtype) if with_bias else None
    expected = linear_reference(x, weight, bias)
    assert torch.equal(linear(x, weight, bias), expected)
    wide = torch.full((num_rows, 30), 7.0, dtype=dtype)
    out = wide[:, :24]  # some columns of a packed buffer
    assert linear(x, weight, bias, out=out) is out
    torch.testing.assert_close(out, expected, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-5)
    assert (wide[:, 24:] == 7).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
@torch.inference_mode()
def test_activations_are_transformers(name):
    x = torch.cat((torch.linspace(-12, 12, 97), torch.zeros(1))).unsqueeze(0)
    up = torch.randn_like(x)
    want = ACT2FN[name](x) * up
    torch.testing.assert_close(act_mul(torch.cat((x, up), dim=1), name), want, rtol=2e-6, atol=1e-6)


def test_no_activation_is_left_out():
    assert ACTIVATIONS.keys() == HIDDEN_ACTS == ACT2FN.keys() - {"prelu", "xielu", "swish"}  # silu's other name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [0, 1, 5])
@torch.inference_mode()
def test_act_mul(dtype, num_rows):
    gate_up = torch.randn((num_rows, 20)).to(dtype)
    expected = functional.silu(gate_up[:, :10]) * gate_up[:, 10:]
    out = torch.empty((num_rows, 10), dtype=dtype)
    assert torch.equal(act_mul(gate_up), expected)
    assert act_mul(gate_up, out=out) is out and torch.equal(out, expected)


@pytest.mark.parametrize("split", [(11,), (4, 7), (0, 5, 0, 6), (1,) * 11])
@pytest.mark.parametrize("num_rows", [0, 1, 9])
@torch.inference_mode()
def test_embedding_shards_add_up(split, num_rows):
    table = torch.randn((11, 6))
    table[3] = float("inf")  # must not leak into other rows
    ids = torch.randint(0, 11, (num_rows,))
    total, first = torch.zeros((num_rows, 6)), 0
    for size in split:
        shard = table[first : first + size]
        part = embedding(ids, shard, first)
        assert torch.equal(part, embedding_reference(ids, shard, first))
        out = torch.full((num_rows, 6), 5.0)
        assert embedding(ids, shard, first, out=out) is out and torch.equal(out, part)
        total += part
        first += size
    assert torch.equal(total, table[ids])


@torch.inference_mode()
def test_embedding_of_a_dead_row_is_zero():
    assert torch.equal(embedding(torch.tensor([-1, 2]), torch.ones((2, 3)), 1), torch.tensor([[0.0] * 3, [1.0] * 3]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("split", [(40,), (13, 27), (0, 40, 0), (1, 0, 38, 1)])
@pytest.mark.parametrize("num_rows", [0, 1, 50])
@torch.inference_mode()
def test_argmax_over_shards_is_argmax(dtype, split, num_rows):
    logits = torch.randint(-3, 4, (num_rows, 40)).to(dtype)  # many ties
    candidates, first = [], 0
    for size in split:
        candidates.append(shard_argmax(logits[:, first : first + size], first))
        first += size
    packed = torch.cat(candidates[::-1], dim=1)  # the order of proposals is of no account
    assert packed.dtype == torch.float64 and packed.shape == (num_rows, 2 * len(split))
    expected = torch.tensor([row.index(max(row)) for row in logits.tolist()], dtype=torch.int64)
    assert torch.equal(pick(packed), expected)
    assert torch.equal(pick_reference(packed), expected)
    assert torch.equal(argmax(logits), expected) and torch.equal(logits.argmax(dim=-1), expected)  # the latter on GPUs


@torch.inference_mode()
def test_argmax_takes_the_first_of_equals_in_long_rows():
    for dtype in DTYPES:
        logits = torch.zeros((4, 5003), dtype=dtype)
        logits[1, [17, 4000]] = 1
        logits[2, [4999, 5002]] = 1
        logits[3] = float("-inf")
        assert pick(shard_argmax(logits, 100)).tolist() == [100, 117, 5099, 100]


@torch.inference_mode()
def test_argmax_of_infinities_and_nan():
    logits = torch.tensor([[float("-inf")] * 4, [0.0, float("nan"), 9.0, float("nan")]])
    empty = shard_argmax(logits[:, :0], 0)
    packed = torch.cat([empty, shard_argmax(logits[:, :3], 0), shard_argmax(logits[:, 3:], 3)], dim=1)
    assert pick(packed).tolist() == pick_reference(packed).tolist() == [0, 1] == logits.argmax(dim=1).tolist()


@torch.inference_mode()
def test_argmax_ids_are_exact():
    assert pick(shard_argmax(torch.tensor([[1.0, 2.0]]), 2**40)).tolist() == [2**40 + 1]
