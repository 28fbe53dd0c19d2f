"""experts: the loop and the grouped path against the twin and against transformers' fused experts."""

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

from narrows.ops import experts as experts_module
from narrows.ops.experts import experts_mlp, experts_mlp_grouped, experts_mlp_reference


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


PATHS = pytest.mark.parametrize("path", [experts_mlp, experts_mlp_grouped])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
TOLERANCE = {torch.float32: dict(rtol=1e-5, atol=1e-5), torch.bfloat16: dict(rtol=2e-2, atol=2e-2)}


def example(num_rows, dtype, *, num_experts=8, top_k=3, hidden=16, inner=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((num_rows, hidden), generator=generator).to(dtype)
    gate_up = (torch.randn((num_experts, 2 * inner, hidden), generator=generator) / 4).to(dtype)
    down = (torch.randn((num_experts, hidden, inner), generator=generator) / 4).to(dtype)
    ids = torch.rand((num_rows, num_experts), generator=generator).argsort(dim=1)[:, :top_k]
    weights = torch.rand((num_rows, top_k), generator=generator)
    return x, ids, weights, gate_up, down


@PATHS
@DTYPES
@pytest.mark.parametrize("num_rows", [0, 1, 2, 33])
@torch.inference_mode()
def test_compiled_experts_agree_with_the_torch_version(path, dtype, num_rows):
    args = example(num_rows, dtype)
    expected = experts_mlp_reference(*args, first_expert=0)
    got = path(*args, first_expert=0)
    assert got.shape == args[0].shape and got.dtype == dtype
    torch.testing.assert_close(got, expected, **TOLERANCE[dtype])
    out = torch.full(args[0].shape, 9.0)  # a float32 buffer takes the unrounded sum
    assert path(*args, first_expert=0, out=out) is out
    torch.testing.assert_close(out.to(dtype), got, rtol=0, atol=0)


@torch.inference_mode()
def test_grouped_sums_in_blocks_of_rows(monkeypatch):
    """As many rows at a time as fit, however many that are: the same sums."""
    args = example(33, torch.float32)
    whole = experts_mlp_grouped(*args, first_expert=0)
    for summed in (1, 3 * 16 * 10, 3 * 16 * 33):
        monkeypatch.setattr(experts_module, "SUMMED", summed)
        torch.testing.assert_close(experts_mlp_grouped(*args, first_expert=0), whole, rtol=1e-6, atol=1e-6)


@PATHS
@torch.inference_mode()
def test_transformers(path):
    x, ids, weights, gate_up, down = example(20, torch.float32)
    config = DeepseekV3Config(hidden_size=16, moe_intermediate_size=8, n_routed_experts=8, num_experts_per_tok=3)
    config._experts_implementation = "eager"
    module = DeepseekV3Experts(config)
    module.gate_up_proj.copy_(gate_up)
    module.down_proj.copy_(down)
    torch.testing.assert_close(path(x, ids, weights, gate_up, down, first_expert=0), module(x, ids, weights))


@PATHS
@DTYPES
@pytest.mark.parametrize("split", [(4, 4), (1, 5, 2), (0, 8), (3, 0, 5)])
@torch.inference_mode()
def test_shards_of_experts_add_up(path, dtype, split):
    x, ids, weights, gate_up, down = example(17, dtype)
    whole, total, first = torch.empty(x.shape), torch.zeros(x.shape), 0
    path(x, ids, weights, gate_up, down, first_expert=0, out=whole)
    for size in split:
        held = slice(first, first + size)
        total += path(x, ids, weights, gate_up[held], down[held], first_expert=first, out=torch.empty(x.shape))
        first += size
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-5)


@PATHS
@torch.inference_mode()
def test_shards_of_the_inner_columns_add_up(path):
    x, ids, weights, gate_up, down = example(17, torch.float32)
    whole, total = path(x, ids, weights, gate_up, down, first_expert=0), torch.zeros(x.shape)
    for columns in (slice(0, 4), slice(4, 8)):
        held = torch.cat((gate_up[:, :8][:, columns], gate_up[:, 8:][:, columns]), dim=1)
        total += path(x, ids, weights, held, down[..., columns].contiguous(), first_expert=0)
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-5)


@PATHS
@torch.inference_mode()
def test_dead_rows_and_foreign_experts_add_nothing(path):
    x, ids, weights, gate_up, down = example(6, torch.float32)
    ids[2] = -1
    x[2] = float("nan")
    ids[4, 1] = 1000
    got = path(x, ids, weights, gate_up, down, first_expert=0)
    assert (got[2] == 0).all()
    weights[4, 1] = 0
    ids[4, 1] = (set(range(8)) - set(ids[4].tolist())).pop()
    torch.testing.assert_close(got[4], path(x[4:5], ids[4:5], weights[4:5], gate_up, down, first_expert=0)[0])
    ids[:] = -1
    assert (path(x, ids, weights, gate_up, down, first_expert=0) == 0).all()


@PATHS
@torch.inference_mode()
def test_the_sum_of_a_row_does_not_depend_on_the_order_of_its_choices(path):
    x, ids, weights, gate_up, down = example(33, torch.float32)
    order = torch.tensor([2, 0, 1])
    got = path(x, ids, weights, gate_up, down, first_expert=0)
    assert torch.equal(path(x, ids[:, order], weights[:, order], gate_up, down, first_expert=0), got)


@PATHS
@torch.inference_mode()
def test_a_row_is_the_same_in_another_batch(path):
    """With exact products (small integers), only the order of the sum remains."""
    x, ids, weights, gate_up, down = example(40, torch.float32)
    x, gate_up, down = x.round(), (gate_up * 4).round(), (down * 4).round()
    got = path(x, ids, weights, gate_up, down, first_expert=0)
    some = torch.tensor([3, 31, 7])
    alone = path(x[some], ids[some], weights[some], gate_up, down, first_expert=0)
    torch.testing.assert_close(alone, got[some], rtol=1e-6, atol=1e-6)
