"""Tiny random models of transformers, saved as a user would, and the same prompts through both engines.

Weights are wide enough that logits are of order 5 and the choice of experts varies; an absolute difference of 1e-4 is
then some twenty units in the last place of float32, and a wrong constant (a norm's epsilon, YaRN's mscale, a scaling
factor) is far beyond it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from narrows.engine.config import EngineConfig, resolve
from narrows.engine.core import Engine
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
NEW_TOKENS = 32
PROMPT_LENGTHS = (40, 1, 23, 7)


@dataclass
class Case:
    name: str
    folder: Path
    model: Any

    def forget(self) -> None:
        """With ``dynamic`` positions a model keeps the longest sequence it has seen, until it sees a short one."""
        with torch.no_grad():
            self.model(torch.tensor([[0]]))

    def logits(self, ids: list[int]) -> Tensor:
        self.forget()
        with torch.no_grad():
            logits: Tensor = self.model(torch.tensor([ids])).logits[0]
        return logits.float()


@contextmanager
def quietly() -> Iterator[None]:
    """No progress bars and no advice while transformers saves."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()
    logging.set_verbosity(verbosity)


def saved(name: str, model: Any, folder: Path) -> Case:
    """A random model whose biases, norms and correction biases are none of them 0 or 1, in ``folder``."""
    model = model.eval()
    with torch.no_grad():
        for tensor_name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in tensor_name:
                tensor.add_(0.1 * torch.randn_like(tensor))
            elif tensor_name.endswith((".bias", "correction_bias")):
                tensor.normal_(0, 0.1)
    with quietly():
        model.save_pretrained(folder)
    return Case(name, folder, model)


def prompt(length: int, seed: int = 1) -> list[int]:
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def one_prompt(ids: list[int], dp: int) -> Batch:
    chunk = Chunk(request=0, start=0, tokens=tuple(ids), pages=tuple(range(1, 2 + len(ids) // 16)), num_logits=len(ids))
    return Batch(groups=(*((),) * (dp - 1), (chunk,)))


def run_logits(case: Case, dp: int, tp: int, ids: list[int], **options: Any) -> list[Tensor]:
    """Each rank's logits of every row of one prompt, which only the last attention group sees."""
    engine_config = EngineConfig(
        model=str(case.folder), dp=dp, tp=tp, want_logits=True, checked=True, max_context=max(64, len(ids)), **options
    )
    with Engine(resolve(engine_config)) as engine:
        results = engine.submit(one_prompt(ids, dp), keep_logits=True).result()
    assert all(result.logits is not None for result in results)
    return [result.logits.float() for result in results if result.logits is not None]


def generated(case: Case, lengths: Sequence[int] = PROMPT_LENGTHS, seed: int = 2) -> list[list[int]]:
    """transformers' text for a prompt of each length."""
    texts = []
    for length in lengths:
        case.forget()
        out = case.model.generate(
            torch.tensor([prompt(length, seed)]),
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


def run_text(
    case: Case, dp: int, tp: int, lengths: Sequence[int] = PROMPT_LENGTHS, seed: int = 2, **options: Any
) -> list[list[int]]:
    """Prompts of different lengths at once, in chunks of at most 16 rows, decoding beside others' prefill."""
    longest = max(lengths) + NEW_TOKENS + 8
    engine_config = EngineConfig(
        model=str(case.folder),
        dp=dp,
        tp=tp,
        dtype="float32",
        checked=True,
        rows_per_step=16,
        max_context=longest,
        page_size=4,
        kv_tokens=4 * longest,
        **options,
    )
    with Engine(resolve(engine_config)) as engine:
        requests = [engine.add(tuple(prompt(length, seed)), NEW_TOKENS) for length in lengths]
        for _ in engine.run():
            pass
    return [request.output for request in requests]
