"""Families against transformers on tiny random checkpoints: the same logits and the same greedy text, on any mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers_lab import (
    DEEPSEEK,
    LLAMA,
    LLAMA3,
    QWEN3_MOE,
    V2,
    V2_LITE,
    V3,
    Case,
    generated,
    one_prompt,
    prompt,
    run_logits,
    run_text,
    saved,
)

from narrows.arch.presets import load_model_config
from narrows.engine.config import EngineConfig, resolve
from narrows.engine.core import Engine
from narrows.evaluate.recorder import Recorder
from narrows.layout import Mesh
from narrows.plan.named import applicable_layouts

CASES: dict[str, Callable[[], Any]] = {
    "v2": lambda: DeepseekV2ForCausalLM(DeepseekV2Config(**DEEPSEEK | V2)),
    "v2-lite": lambda: DeepseekV2ForCausalLM(DeepseekV2Config(**DEEPSEEK | V2_LITE)),
    "v3": lambda: DeepseekV3ForCausalLM(DeepseekV3Config(**DEEPSEEK | V3)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, rope_parameters=LLAMA3)),
    "llama-bias": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, attention_bias=True, mlp_bias=True)),
    "llama-tied": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**LLAMA)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**LLAMA | {"head_dim": 24})),
    "qwen3-moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**QWEN3_MOE)),
}
MESHES = [(1, 1), (1, 3), (2, 2)]


def in_ci(*mesh: int) -> list[Any]:
    """The meshes, all but one of ``make test-full`` alone: every family runs on each of the three in ``make test``, by
    one test or another."""
    return [each if each == mesh else pytest.param(*each, marks=pytest.mark.full) for each in MESHES]


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A random model of each family."""
    torch.manual_seed(0)
    return saved(request.param, CASES[request.param](), tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize(("dp", "tp"), in_ci(2, 2))
def test_logits_equal_transformers(case: Case, dp: int, tp: int) -> None:
    ids = prompt(40)
    want = case.logits(ids)
    assert 4 < want.abs().max().item() < 20, "the tolerance below is meant for logits of this size"
    for layout in applicable_layouts(load_model_config(str(case.folder)), Mesh.of(dp=dp, tp=tp)):
        for got in run_logits(case, dp, tp, ids, dtype="float32", layout=layout):
            torch.testing.assert_close(got, want, atol=1e-4, rtol=0, msg=lambda text, at=layout: f"{at}: {text}")


@pytest.fixture(scope="module")
def greedy_text(case: Case) -> list[list[int]]:
    """transformers' text for each prompt."""
    return generated(case)


@pytest.mark.parametrize(("dp", "tp"), in_ci(1, 3))
def test_greedy_text_equals_transformers(case: Case, greedy_text: list[list[int]], dp: int, tp: int) -> None:
    """Prompts of different lengths at once, in chunks of at most 16 rows, decoding beside others' prefill."""
    assert run_text(case, dp, tp) == greedy_text


@pytest.mark.parametrize("case", ["v2", "v2-lite", "v3"], indirect=True)
def test_the_choice_of_experts_varies(case: Case) -> None:
    """Without this the tests above would not see a wrong router."""
    recorder = Recorder(1)
    recorder.begin(0)
    engine_config = EngineConfig(model=str(case.folder), dtype="float32", max_context=64)
    with Engine(resolve(engine_config), wrap=recorder.wrap) as engine:
        engine.submit(one_prompt(prompt(40), 1)).result()
    for ids_TK in recorder.routing.values():
        assert len(set(ids_TK.flatten().tolist())) > 12
        assert len({tuple(sorted(row)) for row in ids_TK.tolist()}) > 15


@pytest.mark.parametrize(("dp", "tp"), in_ci(1, 1))
def test_bfloat16_stays_close(case: Case, dp: int, tp: int) -> None:
    """Both round to bfloat16 in places of their own, and a row whose experts flip is another row: so the median row."""
    ids = prompt(40)
    model = type(case.model).from_pretrained(case.folder, dtype=torch.bfloat16).eval()
    want = Case(case.name, case.folder, model).logits(ids)
    size_T = want.square().mean(dim=-1).sqrt()
    for got in run_logits(case, dp, tp, ids, dtype="bfloat16"):
        relative_T = (got - want).square().mean(dim=-1).sqrt() / size_T
        assert relative_T.median().item() < 3e-2
        if case.name.startswith("llama"):
            assert relative_T.max().item() < 8e-2
