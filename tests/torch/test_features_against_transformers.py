"""Optional features of configs against transformers: logits of a prompt, and text in chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MLP
from transformers_lab import (
    DEEPSEEK,
    LLAMA,
    QWEN3_MOE,
    V2,
    V2_LITE,
    V3,
    Case,
    generated,
    prompt,
    run_logits,
    run_text,
    saved,
)

from narrows.arch.presets import load_model_config
from narrows.engine.config import EngineConfig, resolve
from narrows.engine.core import Engine
from narrows.layout import Mesh
from narrows.plan.named import applicable_layouts


def v2(**changes: Any) -> Any:
    return DeepseekV2ForCausalLM(DeepseekV2Config(**DEEPSEEK | V2 | changes))


def v2_lite(**changes: Any) -> Any:
    return DeepseekV2ForCausalLM(DeepseekV2Config(**DEEPSEEK | V2_LITE | changes))


def v3(**changes: Any) -> Any:
    return DeepseekV3ForCausalLM(DeepseekV3Config(**DEEPSEEK | V3 | changes))


def llama(**changes: Any) -> Any:
    return LlamaForCausalLM(LlamaConfig(**LLAMA | changes))


def every_second(model: Any) -> Any:
    """DeepSeek's ``moe_layer_freq`` 2, which transformers does not read: its dense layers in place of the odd ones."""
    for layer in (1, 3):
        model.model.layers[layer].mlp = DeepseekV3MLP(model.config)
        for weight in model.model.layers[layer].mlp.parameters():
            torch.nn.init.normal_(weight, 0, model.config.initializer_range)
    model.config.moe_layer_freq = 2
    return model


def glm(**changes: Any) -> Any:
    return Glm4MoeForCausalLM(Glm4MoeConfig(**GLM | changes))


def mistral(**changes: Any) -> Any:
    return MistralForCausalLM(MistralConfig(**LLAMA | {"head_dim": 12} | changes))


def qwen2(**changes: Any) -> Any:
    return Qwen2ForCausalLM(Qwen2Config(**LLAMA | changes))


def qwen3(**changes: Any) -> Any:
    return Qwen3ForCausalLM(Qwen3Config(**LLAMA | {"head_dim": 24} | changes))


def qwen3_moe(**changes: Any) -> Any:
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**QWEN3_MOE | changes))


@dataclass
class Feature:
    """How to make the model; the seed of the prompts whose texts are compared."""

    make: Callable[[], Any]
    seed: int = 2


FEATURES = {
    "v2-attention-bias": Feature(lambda: v2(attention_bias=True)),
    "v2-lite-attention-bias": Feature(lambda: v2_lite(attention_bias=True)),
    "v3-attention-bias": Feature(lambda: v3(attention_bias=True)),
    "v2-mlp-bias": Feature(lambda: v2(mlp_bias=True)),
    "v3-rotate-halves": Feature(lambda: v3(rope_interleave=False)),
    "llama-gelu": Feature(lambda: llama(hidden_act="gelu")),
    "v3-relu2": Feature(lambda: v3(hidden_act="relu2")),
    "qwen3-moe-gelu-tanh": Feature(lambda: qwen3_moe(hidden_act="gelu_pytorch_tanh")),
}


WINDOW = {"use_sliding_window": True, "sliding_window": 9}
FEATURES |= {
    "mistral": Feature(lambda: mistral(sliding_window=8)),
    "mistral-whole-context": Feature(lambda: mistral(sliding_window=None)),
    "mistral-window-of-two": Feature(lambda: mistral(sliding_window=2)),
    "qwen2-window": Feature(lambda: qwen2(**WINDOW, max_window_layers=1)),
    "qwen2-layer-types": Feature(
        lambda: qwen2(**WINDOW, layer_types=["sliding_attention", "full_attention"] * 2, num_hidden_layers=4)
    ),
    "qwen2-no-layer-slides": Feature(lambda: qwen2(**WINDOW, max_window_layers=3)),
    "qwen3-window": Feature(lambda: qwen3(**WINDOW, max_window_layers=0)),
    "qwen3-moe-window": Feature(lambda: qwen3_moe(**WINDOW)),
}


SHORT = {"max_position_embeddings": 24}
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}}


def longrope(num_pairs: int) -> dict[str, Any]:
    spread = torch.linspace(1, 2, num_pairs)
    numbers = {"short_factor": spread.tolist(), "long_factor": (3 * spread).tolist()}
    numbers |= {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 24}
    return {"max_position_embeddings": 96, "rope_parameters": numbers}


QWEN_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 24}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
GLM = LLAMA | {
    "moe_intermediate_size": 32,
    "n_routed_experts": 16,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
    "first_k_dense_replace": 1,
}
FEATURES |= {
    "llama-dynamic": Feature(lambda: llama(**SHORT | DYNAMIC)),
    "v3-dynamic": Feature(lambda: v3(**SHORT | DYNAMIC)),
    "llama-longrope": Feature(lambda: llama(**longrope(8))),
    "v2-longrope": Feature(lambda: v2(**longrope(4))),
    "qwen2-yarn-beyond": Feature(lambda: qwen2(**SHORT, rope_parameters=QWEN_YARN)),
    "llama-linear-beyond": Feature(lambda: llama(**SHORT, rope_parameters=LINEAR)),
    "glm": Feature(lambda: glm()),
    "glm-bias-and-norms": Feature(lambda: glm(attention_bias=True, use_qk_norm=True)),
    "glm-quarter": Feature(lambda: glm(partial_rotary_factor=0.25)),
    "glm-yarn": Feature(lambda: glm(**SHORT, rope_parameters=QWEN_YARN)),
}


FOUR = {"num_hidden_layers": 4}
FEATURES |= {
    "qwen3-moe-listed-layers": Feature(lambda: qwen3_moe(**FOUR, mlp_only_layers=[1, 3])),
    "qwen3-moe-every-second": Feature(lambda: qwen3_moe(**FOUR, decoder_sparse_step=2)),
    "qwen3-moe-all-dense": Feature(lambda: qwen3_moe(mlp_only_layers=[0, 1, 2])),
    "v3-every-second": Feature(lambda: every_second(v3(**FOUR, first_k_dense_replace=0))),
    "v3-all-dense": Feature(lambda: v3(first_k_dense_replace=3)),
}


ODD = {"hidden_size": 60, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 10, "intermediate_size": 37}
FEATURES |= {
    "qwen3-without-head-dim": Feature(lambda: qwen3(head_dim=128), seed=6),  # the class's default, which is not saved
    "llama-odd-heads": Feature(lambda: llama(**ODD, attention_bias=True, mlp_bias=True)),
    "qwen2-heads-of-32": Feature(lambda: qwen2(**ODD | {"head_dim": 32}), seed=4),
    "llama-one-key-head": Feature(lambda: llama(num_key_value_heads=1)),
}
ONE_OF_EACH_KIND = (
    "v2-attention-bias",
    "v2-mlp-bias",
    "v3-rotate-halves",
    "llama-gelu",
    "v3-relu2",
    "mistral",
    "qwen2-layer-types",
    "llama-dynamic",
    "llama-longrope",
    "qwen2-yarn-beyond",
    "glm-bias-and-norms",
    "qwen3-moe-listed-layers",
    "v3-every-second",
)
ALL = [pytest.param(name, marks=() if name in ONE_OF_EACH_KIND else pytest.mark.full) for name in FEATURES]


@pytest.fixture(scope="module", params=ALL)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    torch.manual_seed(0)
    return saved(request.param, FEATURES[request.param].make(), tmp_path_factory.mktemp(request.param))


def same_logits(case: Case, dp: int, tp: int, layouts: Sequence[str]) -> None:
    ids = prompt(40)
    want = case.logits(ids)
    assert 3 < want.abs().max().item() < 20, "the tolerance below is meant for logits of this size"
    for layout in layouts:
        for got in run_logits(case, dp, tp, ids, dtype="float32", layout=layout):
            torch.testing.assert_close(got, want, atol=1e-4, rtol=0, msg=lambda text, at=layout: f"{at}: {text}")


def test_logits(case: Case) -> None:
    same_logits(case, 2, 2, ["auto"])


def test_text(case: Case) -> None:
    seed = FEATURES[case.name].seed
    assert run_text(case, 1, 3, seed=seed) == generated(case, seed=seed)


@pytest.mark.full
@pytest.mark.parametrize(("dp", "tp"), [(1, 1), (1, 4), (3, 1), (2, 2)])
def test_on_every_mesh_and_layout(case: Case, dp: int, tp: int) -> None:
    seed = FEATURES[case.name].seed
    same_logits(case, dp, tp, applicable_layouts(load_model_config(str(case.folder)), Mesh.of(dp=dp, tp=tp)))
    assert run_text(case, dp, tp, seed=seed) == generated(case, seed=seed)


PREFIXES = (40, 56, 40, 30, 9)
"""Each prompt begins with the next shorter one; the second 40 finds the first one's pages."""


@pytest.mark.parametrize(
    "case",
    [
        "mistral",
        "qwen2-layer-types",
        "llama-dynamic",
        "llama-longrope",
        pytest.param("v3-dynamic", marks=pytest.mark.full),
    ],
    indirect=True,
)
@pytest.mark.parametrize("kv_tokens", [512, 92])
def test_a_cached_prefix_is_as_good_as_a_computed_one(case: Case, kv_tokens: int) -> None:
    """One after the other, so that pages are found; and all at once in a cache so small that requests are put back."""
    ids, num_new = prompt(max(PREFIXES), seed=5), 24
    engine_config = EngineConfig(
        model=str(case.folder),
        dtype="float32",
        rows_per_step=16,
        max_context=92,
        page_size=4,
        kv_tokens=kv_tokens,
    )
    with Engine(resolve(engine_config)) as engine:
        requests = []
        for length in PREFIXES:
            requests.append(engine.add(tuple(ids[:length]), num_new))
            if kv_tokens == 512:
                list(engine.run())
        list(engine.run())
        stats = engine.scheduler.stats()
    assert stats.cached_prompt_tokens > 0 if kv_tokens == 512 else stats.preemptions > 0
    for request, length in zip(requests, PREFIXES, strict=True):
        case.forget()
        out = case.model.generate(
            torch.tensor([ids[:length]]),
            attention_mask=torch.ones(1, length, dtype=torch.int64),
            do_sample=False,
            max_new_tokens=num_new,
        )
        assert request.output == out[0, length:].tolist(), f"prompt of {length}"


@pytest.mark.parametrize(
    "case", ["mistral", "glm-bias-and-norms", "llama-gelu", "v3-relu2", "v2-mlp-bias"], indirect=True
)
def test_bfloat16_stays_close(case: Case) -> None:
    """The paths that CPUs with bf16 products take; a row whose experts flip is another row: so the median row."""
    ids = prompt(40)
    model = type(case.model).from_pretrained(case.folder, dtype=torch.bfloat16).eval()
    want = Case(case.name, case.folder, model).logits(ids)
    size_T = want.square().mean(dim=-1).sqrt()
    for got in run_logits(case, 1, 2, ids, dtype="bfloat16"):
        relative_T = (got - want).square().mean(dim=-1).sqrt() / size_T
        assert relative_T.median().item() < 3e-2
