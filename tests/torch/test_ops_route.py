"""route: against the three routers of transformers and against its twin; ties, margins, replay."""

import pytest
import torch
from torch.nn import functional
from transformers import DeepseekV2Config, DeepseekV3Config, Qwen3MoeConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from narrows.ops import route as route_module
from narrows.ops.route import route, route_reference


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


V3 = dict(
    top_k=4,
    scoring="sigmoid",
    method="noaux_tc",
    num_groups=4,
    topk_group=2,
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
)
GREEDY = dict(
    top_k=3,
    scoring="softmax",
    method="greedy",
    num_groups=None,
    topk_group=None,
    norm_topk_prob=False,
    routed_scaling_factor=1.0,
)
V2 = {**GREEDY, "method": "group_limited_greedy", "num_groups": 4, "topk_group": 2, "routed_scaling_factor": 16.0}


@pytest.fixture(params=["few rows", "many rows", "reference"])
def router(request, monkeypatch):
    """Both compiled algorithms, for any number of rows, and the torch version."""
    monkeypatch.setattr(route_module, "SORTED_SCORES", 1 << 30 if request.param == "few rows" else 0)
    return route_reference if request.param == "reference" else route


def by_id(ids, weights):
    """Rows sorted by id: transformers leaves the order of the chosen open."""
    ids, order = ids.sort(dim=-1)
    return ids, weights.gather(1, order)


def assert_same(routing, weights, ids):
    got_ids, got_weights = by_id(routing.topk_ids_TK, routing.topk_weights_TK)
    ids, weights = by_id(ids, weights)
    assert got_ids.dtype == torch.int64 and got_weights.dtype == torch.float32
    assert torch.equal(got_ids, ids)
    torch.testing.assert_close(got_weights, weights, rtol=1e-6, atol=0)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("num_rows", [0, 1, 40])
@torch.inference_mode()
def test_v3(router, norm, num_rows):
    config = DeepseekV3Config(
        hidden_size=8, n_routed_experts=16, n_group=4, topk_group=2, num_experts_per_tok=4, norm_topk_prob=norm
    )
    module = DeepseekV3TopkRouter(config)
    module.weight.normal_()
    module.e_score_correction_bias.normal_(std=0.1)
    logits, weights, ids = module(torch.randn((num_rows, 8)))
    routing = router(logits, **{**V3, "norm_topk_prob": norm}, correction_bias_E=module.e_score_correction_bias)
    assert_same(routing, weights, ids)
    assert routing.margin_T is None


@pytest.mark.parametrize("method", ["greedy", "group_limited_greedy"])
@pytest.mark.parametrize("num_rows", [0, 1, 40])
@torch.inference_mode()
def test_v2(router, method, num_rows):
    config = DeepseekV2Config(
        hidden_size=8,
        n_routed_experts=16,
        n_group=4,
        topk_group=2,
        num_experts_per_tok=3,
        topk_method=method,
        routed_scaling_factor=16.0,
        norm_topk_prob=True,  # ignored by transformers
        num_attention_heads=2,
    )
    module = DeepseekV2TopkRouter(config)
    module.weight.normal_()
    logits, weights, ids = module(torch.randn((num_rows, 8)))
    assert_same(router(logits, **{**V2, "method": method}), weights, ids)


@pytest.mark.parametrize("norm", [True, False])
@torch.inference_mode()
def test_qwen3_moe(router, norm):
    module = Qwen3MoeTopKRouter(
        Qwen3MoeConfig(hidden_size=8, num_experts=16, num_experts_per_tok=3, norm_topk_prob=norm)
    )
    module.weight.normal_()
    logits, weights, ids = module(torch.randn((40, 8)))
    assert_same(router(logits, **{**GREEDY, "norm_topk_prob": norm}), weights, ids)


@pytest.mark.parametrize("rule", [V3, V2, GREEDY], ids=["v3", "v2", "greedy"])
@torch.inference_mode()
def test_compiled_and_torch_routing_agree_bit_for_bit_with_ties(rule, router):
    logits = torch.randint(-2, 3, (400, 16)).float() / 4
    bias = (torch.randint(-3, 3, (16,)).float() / 4) if rule is V3 else None
    got = router(logits, **rule, correction_bias_E=bias, with_margin=True)
    expected = route_reference(logits, **rule, correction_bias_E=bias, with_margin=True)
    assert torch.equal(got.topk_ids_TK, expected.topk_ids_TK)
    assert torch.equal(got.topk_weights_TK, expected.topk_weights_TK)
    assert torch.equal(got.margin_T, expected.margin_T)


@torch.inference_mode()
def test_ties_go_to_the_lower_id_in_falling_order(router):
    ids = router(torch.tensor([[0.0, 2.0, 1.0, 2.0, 1.0, 1.0]]), **GREEDY).topk_ids_TK
    assert ids.tolist() == [[1, 3, 2]]
    assert router(torch.zeros((1, 300)), **{**GREEDY, "top_k": 8}).topk_ids_TK.tolist() == [list(range(8))]
    # Groups too: all four are worth the same.
    assert router(torch.zeros((1, 16)), **V2).topk_ids_TK.tolist() == [[0, 1, 2]]
    # A bias may make scores negative, or -0.0.
    bias = torch.tensor([-0.5, -0.5, -0.75, -1.0])
    rule = {**V3, "num_groups": 1, "topk_group": 1}
    assert router(torch.zeros((1, 4)), **rule, correction_bias_E=bias).topk_ids_TK.tolist() == [[0, 1, 2, 3]]


@torch.inference_mode()
def test_forced_ids_are_weighted_by_this_runs_scores(router):
    logits = torch.randn((5, 16))
    bias = torch.randn(16) / 10
    forced = torch.stack([torch.randperm(16)[:4] for _ in range(5)])
    free = router(logits, **V3, correction_bias_E=bias, with_margin=True)
    routing = router(logits, **V3, correction_bias_E=bias, forced_ids_TK=forced, with_margin=True)
    score = logits.sigmoid().gather(1, forced)
    assert torch.equal(routing.topk_ids_TK, forced)
    torch.testing.assert_close(routing.topk_weights_TK, score / score.sum(dim=1, keepdim=True) * 2.5)
    assert torch.equal(routing.margin_T, free.margin_T)
    replay = router(logits, **V3, correction_bias_E=bias, forced_ids_TK=free.topk_ids_TK)
    assert torch.equal(replay.topk_weights_TK, free.topk_weights_TK)


@torch.inference_mode()
def test_margin_is_the_distance_to_another_choice(router):
    scores = torch.tensor([[0.5, 0.25, 0.125, 0.0625, 0.0625]])
    rule = {**GREEDY, "top_k": 2, "with_margin": True}
    assert router(scores.log(), **rule).margin_T.item() == pytest.approx(0.125)
    assert router(scores.log(), **{**rule, "top_k": 5}).margin_T.tolist() == [float("inf")]
    # Two groups of two, one chosen: within the group nothing is left out, between the groups 0.4 - 0.35.
    scores = torch.tensor([[0.35, 0.2, 0.4, 0.05]])
    rule = {**V2, "num_groups": 2, "topk_group": 1, "top_k": 2, "with_margin": True}
    routing = router(scores.log(), **rule)
    assert routing.topk_ids_TK.tolist() == [[2, 3]]
    assert routing.margin_T.item() == pytest.approx(0.05, abs=1e-6)


@torch.inference_mode()
def test_a_group_that_is_out_stays_out_when_scores_underflow(router):
    logits = torch.full((1, 8), -200.0)
    logits[0, 0], logits[0, 4] = 0.0, -0.5  # groups of two: 0 wins, everything else but expert 4 underflows
    routing = router(logits, **{**V2, "topk_group": 1, "top_k": 2})
    assert routing.topk_ids_TK.tolist() == [[0, 1]]
    assert routing.topk_weights_TK[0, 1] == 0


@pytest.mark.parametrize("rule", [V3, GREEDY, V2], ids=["V3", "greedy", "V2"])
@torch.inference_mode()
def test_a_gate_of_16_bits_gives_the_same_choice(rule):
    """As GPUs hold it where the checkpoint does: products of the same values, summed in float32."""
    x, gate = torch.randn(40, 64).bfloat16(), torch.randn(16, 64).bfloat16()
    ids, weights = route_module.router(x, gate, **rule)
    want_ids, want_weights = route_module.router_reference(x, gate.float(), **rule)
    assert torch.equal(ids, want_ids) and ids.dtype == torch.int32
    torch.testing.assert_close(weights, want_weights, rtol=1e-5, atol=1e-6)
    rounded = functional.linear(x, gate)  # what it must not be
    assert (route_module.router_logits(x, gate) - rounded.float()).abs().max() > 1e-3


def test_a_gate_is_narrow_where_that_loses_nothing():
    cpu, gpu = torch.device("cpu"), torch.device("cuda:0")
    wide, narrow = torch.float32, torch.bfloat16
    assert route_module.gate_dtype(narrow, narrow, gpu) == narrow
    assert route_module.gate_dtype(narrow, narrow, cpu) == wide
    assert route_module.gate_dtype(wide, narrow, gpu) == wide
    assert route_module.gate_dtype(narrow, wide, gpu) == wide
    assert route_module.gate_dtype(torch.float16, narrow, gpu) == wide
