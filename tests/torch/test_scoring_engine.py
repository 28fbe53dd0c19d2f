"""Scores of prompts' own tokens: transformers' on any mesh and layout, in chunks, beside other requests, bounded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from narrows.engine.config import EngineConfig, resolve
from narrows.engine.llm import LLM
from narrows.errors import ConfigError
from narrows.plan.named import applicable_layouts
from narrows.sched.batch import Batch
from narrows.sched.sampling import GREEDY, SamplingParams

VOCAB = 97


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DeepseekV3ForCausalLM]:
    """A DeepSeek-V3 of transformers, saved; logits of order 5, so that scores differ."""
    torch.manual_seed(11)
    config = DeepseekV3Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        max_position_embeddings=512,
        initializer_range=0.2,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=12,
        moe_intermediate_size=32,
        num_experts_per_tok=3,
        n_routed_experts=16,
        first_k_dense_replace=1,
        n_group=4,
        topk_group=2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = DeepseekV3ForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("theirs")
    model.save_pretrained(folder)
    return folder, model


def prompts(*lengths: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(5)
    return [tuple(torch.randint(0, VOCAB, (length,), generator=generator).tolist()) for length in lengths]


PROMPTS = prompts(37, 1, 2, 90, 15)


@pytest.fixture(scope="module")
def expected(theirs: tuple[Path, DeepseekV3ForCausalLM]) -> list[torch.Tensor]:
    """Log-probabilities [T - 1, V] after each prompt's tokens but the last."""
    with torch.inference_mode():
        return [theirs[1](torch.tensor([prompt])).logits[0, :-1].double().log_softmax(-1) for prompt in PROMPTS]


def check(scores: Any, prompt: tuple[int, ...], logprobs_TV: torch.Tensor, num_best: int) -> None:
    assert len(scores) == len(prompt) - 1
    for score, target, row in zip(scores, prompt[1:], logprobs_TV, strict=True):
        assert score.logprob == pytest.approx(row[target].item(), abs=2e-4)
        # Rounding may exchange neighbours: the rank is right for some value within it.
        assert int((row > row[target] + 2e-4).sum()) < score.rank <= 1 + int((row > row[target] - 2e-4).sum())
        assert [value for _, value in score.best] == pytest.approx(row.topk(num_best).values.tolist(), abs=2e-4)
        assert score.rank > num_best or score.best[score.rank - 1][0] == target


@pytest.mark.parametrize(("dp", "tp"), [(1, 1), (2, 2), (1, 3)])
def test_scores_equal_transformers_under_every_layout_and_in_chunks(
    theirs: tuple[Path, DeepseekV3ForCausalLM], expected: list[torch.Tensor], dp: int, tp: int
) -> None:
    options: dict[str, Any] = dict(dp=dp, tp=tp, dtype="float32", max_context=96, rows_per_step=16, checked=True)
    resolved = resolve(EngineConfig(model=str(theirs[0]), **options))
    for layout in applicable_layouts(resolved.config, resolved.mesh):
        with LLM(theirs[0], layout=layout, **options) as llm:
            done = llm.score(PROMPTS, num_best=3)
        for completion, prompt, logprobs_TV in zip(done, PROMPTS, expected, strict=True):
            assert completion.prompt_token_ids == prompt and completion.token_ids == () and completion.text == ""
            assert completion.finish_reason == "length"
            check(completion.prompt_logprobs, prompt, logprobs_TV, 3)


@pytest.fixture
def llm(theirs: tuple[Path, DeepseekV3ForCausalLM]) -> Iterator[LLM]:
    with LLM(theirs[0], dp=2, tp=2, dtype="float32", max_context=96, rows_per_step=24) as llm:
        yield llm


def test_scoring_and_generating_requests_share_steps_and_change_nothing(llm: LLM, expected: list[torch.Tensor]) -> None:
    greedy = [completion.token_ids for completion in llm.generate(PROMPTS[:3], max_tokens=9, sampling=GREEDY)]
    drawn = SamplingParams(temperature=1.0, seed=4, logprobs=1)
    both = SamplingParams(prompt_logprobs=2, logprobs=1)
    add = llm.engine.add
    requests = [add(PROMPTS[i], 9, sampling=params) for i, params in ((0, None), (1, drawn), (0, both), (2, None))]
    scored = [add(prompt, 0, sampling=SamplingParams(prompt_logprobs=1)) for prompt in PROMPTS]
    ended = [request.id for request in llm.engine.run() if request.finish_reason]
    assert sorted(ended) == sorted(request.id for request in (*requests, *scored)), "each ends once, and is told"
    assert [tuple(requests[i].output) for i in (0, 2, 3)] == [greedy[0], greedy[0], greedy[2]]
    assert len(requests[1].logprobs) == len(requests[2].logprobs) == 9 and requests[0].prompt_logprobs == []
    check(requests[2].prompt_logprobs, PROMPTS[0], expected[0], 2)
    for request, prompt, logprobs_TV in zip(scored, PROMPTS, expected, strict=True):
        check(request.prompt_logprobs, prompt, logprobs_TV, 1)
    assert not llm.engine.scheduler.has_work


def test_the_logits_of_a_step_are_bounded_for_any_prompts(
    theirs: tuple[Path, DeepseekV3ForCausalLM], expected: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("narrows.plan.deploy._SCORED_LOGITS", 5 * VOCAB)
    with LLM(theirs[0], tp=2, dtype="float32", max_context=96) as llm:
        true_submit = llm.engine.submit
        seen: list[tuple[int, int]] = []

        def submit(batch: Batch, **options: Any) -> Any:
            seen.append((batch.num_rows, batch.num_logit_rows))
            return true_submit(batch, **options)

        monkeypatch.setattr(llm.engine, "submit", submit)
        plain = llm.engine.add(PROMPTS[3], 2)
        scored = [llm.engine.add(prompt, 0, sampling=SamplingParams(prompt_logprobs=0)) for prompt in PROMPTS]
        for _ in llm.engine.run():
            pass
    assert max(logits for _, logits in seen) <= 5 + len(PROMPTS) + 1 and len(seen) >= sum(map(len, PROMPTS)) // 5
    assert seen[0][0] >= len(PROMPTS[3]), "prompts that are not scored fill the step as before"
    assert plain.finish_reason
    for request, prompt, logprobs_TV in zip(scored, PROMPTS, expected, strict=True):
        check(request.prompt_logprobs, prompt, logprobs_TV, 0)


def test_a_prompt_may_fill_the_context_if_nothing_is_generated(llm: LLM) -> None:
    (full,) = prompts(96)
    assert len(llm.score([full])[0].prompt_logprobs) == 95
    with pytest.raises(
        ConfigError, match="the prompt has 97 tokens, but the context holds 96; shorten it to 96 tokens"
    ):
        llm.score([(*full, 1)])
    with pytest.raises(ConfigError, match="at least 1 must be left for the answer"):
        llm.generate([full], max_tokens=1, sampling=SamplingParams(prompt_logprobs=0))
    with pytest.raises(ConfigError, match="max_tokens is 0; it must be at least 1"):
        llm.generate([full], max_tokens=0, sampling=GREEDY)
    with pytest.raises(ConfigError, match="prompt_logprobs is 21"):
        llm.score([full], num_best=21)


def test_batch_invariant_scores_do_not_depend_on_the_batch(theirs: tuple[Path, DeepseekV3ForCausalLM]) -> None:
    long = prompts(300, 40, 7)
    with LLM(theirs[0], tp=2, dtype="float32", max_context=320, batch_invariant=True, kv_tokens=2000) as llm:
        together = [completion.prompt_logprobs for completion in llm.score(long, num_best=2)]
        assert [llm.score([prompt], num_best=2)[0].prompt_logprobs for prompt in long] == together
