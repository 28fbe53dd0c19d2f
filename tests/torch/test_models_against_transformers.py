"""Models against transformers on tiny random checkpoints: the same logits and the same greedy text, on any mesh.

Weights are wide enough that logits are of order 5 and the choice of experts varies; an absolute difference of 1e-4 is
then some twenty units in the last place of float32, and a wrong constant (a norm's epsilon, YaRN's mscale, a scaling
factor) is far beyond it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
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
from transformers.utils import logging

from narrows.arch.presets import load_model_config
from narrows.engine.config import EngineConfig, resolve
from narrows.engine.core import Engine
from narrows.engine.recorder import Recorder
from narrows.layout import Mesh
from narrows.plan.named import applicable_layouts
from narrows.sched.batch import Batch, Chunk

VOCAB = 97
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-2,  # large, so that a norm which uses another shows
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
DEEPSEEK = COMMON | {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 3,
    "n_routed_experts": 16,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
}
LLAMA = COMMON | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
QWEN3_MOE = LLAMA | {
    "head_dim": 24,
    "moe_intermediate_size": 32,
    "num_experts": 16,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.7,
    "mscale_all_dim": 1.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
V2 = {"n_shared_experts": 2, "topk_method": "group_limited_greedy", "routed_scaling_factor": 1.5}
V2_LITE = {"n_shared_experts": 2, "topk_method": "greedy", "q_lora_rank": None, "n_group": 1, "topk_group": 1}
V3 = {"n_shared_experts": 1, "routed_scaling_factor": 2.5, "norm_topk_prob": True, "rope_parameters": YARN}
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
NEW_TOKENS = 32


@dataclass
class Case:
    name: str
    folder: Path
    model: Any

    def logits(self, ids: list[int]) -> Tensor:
        with torch.no_grad():
            logits: Tensor = self.model(torch.tensor([ids])).logits[0]
        return logits.float()


@pytest.fixture(scope="module")
def quiet() -> Iterator[None]:
    """No progress bars and no advice while transformers saves."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()
    logging.set_verbosity(verbosity)


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, quiet: None, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A random model whose biases, norms and correction biases are none of them 0 or 1."""
    torch.manual_seed(0)
    model = CASES[request.param]().eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in name:
                tensor.add_(0.1 * torch.randn_like(tensor))
            elif name.endswith(".bias") or name.endswith("correction_bias"):
                tensor.normal_(0, 0.1)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return Case(request.param, folder, model)


def prompt(length: int, seed: int = 1) -> list[int]:
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def one_prompt(ids: list[int], dp: int) -> Batch:
    chunk = Chunk(request=0, start=0, tokens=tuple(ids), pages=tuple(range(1, 5)), num_logits=len(ids))
    return Batch(groups=(*((),) * (dp - 1), (chunk,)))


def run_logits(case: Case, dp: int, tp: int, ids: list[int], **options: Any) -> list[Tensor]:
    """Each rank's logits of every row of one prompt, which only the last attention group sees."""
    asked = EngineConfig(
        model=str(case.folder), dp=dp, tp=tp, want_logits=True, checked=True, max_context=64, **options
    )
    with Engine(resolve(asked)) as engine:
        results = engine.submit(one_prompt(ids, dp), keep_logits=True).result()
    assert all(result.logits is not None for result in results)
    return [result.logits.float() for result in results if result.logits is not None]


@pytest.mark.parametrize(("dp", "tp"), MESHES)
def test_logits_are_those_of_transformers(case: Case, dp: int, tp: int) -> None:
    ids = prompt(40)
    want = case.logits(ids)
    assert 4 < want.abs().max().item() < 20, "the tolerance below is meant for logits of this size"
    for layout in applicable_layouts(load_model_config(str(case.folder)), Mesh.of(dp=dp, tp=tp)):
        for got in run_logits(case, dp, tp, ids, dtype="float32", layout=layout):
            torch.testing.assert_close(got, want, atol=1e-4, rtol=0, msg=lambda text, at=layout: f"{at}: {text}")


PROMPT_LENGTHS = (40, 1, 23, 7)


@pytest.fixture(scope="module")
def greedy_text(case: Case) -> list[list[int]]:
    """What transformers generates for each prompt."""
    texts = []
    for length in PROMPT_LENGTHS:
        out = case.model.generate(
            torch.tensor([prompt(length, seed=2)]),
            attention_mask=torch.ones(1, length, dtype=torch.int64),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            return_dict_in_generate=True,
            output_logits=True,
        )
        best_two = torch.cat(out.logits).topk(2).values
        assert (best_two[:, 0] - best_two[:, 1]).min() > 1e-4, "so close that either token would be right: another seed"
        texts.append(out.sequences[0, length:].tolist())
    assert all(len(text) == NEW_TOKENS and len(set(text)) > 5 for text in texts), "texts that loop prove little"
    return texts


@pytest.mark.parametrize(("dp", "tp"), MESHES)
def test_greedy_text_is_that_of_transformers(case: Case, greedy_text: list[list[int]], dp: int, tp: int) -> None:
    """Prompts of different lengths at once, in chunks of at most 16 rows, decoding beside others' prefill."""
    asked = EngineConfig(
        model=str(case.folder),
        dp=dp,
        tp=tp,
        dtype="float32",
        checked=True,
        rows_per_step=16,
        max_context=80,
        page_size=4,
        kv_tokens=4 * 80,
    )
    with Engine(resolve(asked)) as engine:
        requests = [engine.add(tuple(prompt(length, seed=2)), NEW_TOKENS) for length in PROMPT_LENGTHS]
        for _ in engine.run():
            pass
    assert [request.output for request in requests] == greedy_text


@pytest.mark.parametrize("case", ["v2", "v2-lite", "v3"], indirect=True)
def test_the_choice_of_experts_varies(case: Case) -> None:
    """Without this the tests above would not see a wrong router."""
    recorder = Recorder(1)
    recorder.begin(0)
    asked = EngineConfig(model=str(case.folder), dtype="float32", max_context=64)
    with Engine(resolve(asked), wrap=recorder.wrap) as engine:
        engine.submit(one_prompt(prompt(40), 1)).result()
    for ids_TK in recorder.routing.values():
        assert len(set(ids_TK.flatten().tolist())) > 12
        assert len({tuple(sorted(row)) for row in ids_TK.tolist()}) > 15


@pytest.mark.parametrize(("dp", "tp"), MESHES)
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
