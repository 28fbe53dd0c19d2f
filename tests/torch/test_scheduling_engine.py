"""Cached prefixes and preemption through the engine change no text, score or history: each equals the request alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from narrows.engine.config import EngineConfig, resolve
from narrows.engine.core import Engine
from narrows.errors import ConfigError
from narrows.sched.guide import Guide
from narrows.sched.sampling import SamplingParams
from narrows.sched.scheduler import Request

TinyModel = Callable[..., Path]
GENERATOR = torch.Generator().manual_seed(3)
SHARED = tuple(torch.randint(0, 67, (14,), generator=GENERATOR).tolist())
PROMPTS = [SHARED[:n] + tuple(torch.randint(0, 67, (m,), generator=GENERATOR).tolist()) for n, m in
           ((14, 5), (14, 1), (0, 9), (13, 4), (14, 0), (8, 7))]  # fmt: skip
PARAMS = [
    None,
    SamplingParams(repetition_penalty=1.3),
    SamplingParams(frequency_penalty=0.9, logprobs=2),
    SamplingParams(temperature=0.9, seed=4, presence_penalty=0.7),
    SamplingParams(repetition_penalty=1.2, frequency_penalty=0.4),
    SamplingParams(prompt_logprobs=1, logprobs=0),
]
NUM_TOKENS = 20


def engine(folder: Path, dp: int = 1, tp: int = 1, **options: Any) -> Engine:
    return Engine(resolve(EngineConfig(model=str(folder), dp=dp, tp=tp, dtype="float32", max_context=64, **options)))


def run(engine: Engine, which: list[int]) -> list[Request]:
    requests = [engine.add(PROMPTS[i], NUM_TOKENS, sampling=PARAMS[i]) for i in which]
    for _ in engine.run():
        engine.scheduler.check_integrity()
    assert engine.scheduler.stats().kv_pages_used == 0
    return requests


@pytest.mark.parametrize(("dp", "tp"), [(1, 1), (1, 2), (2, 1)])
@pytest.mark.parametrize("kind", ["llama", "v3"])
def test_texts_equal_each_request_alone(tiny_model: TinyModel, kind: str, dp: int, tp: int) -> None:
    folder = tiny_model(kind)
    with engine(folder, prefix_cache=False, page_size=4) as one:
        alone = [run(one, [i])[0] for i in range(len(PROMPTS))]
    with engine(folder, dp, tp, page_size=4, kv_tokens=48, rows_per_step=16) as tight:
        for _ in range(2):  # the second time, prompts and answers are in the cache
            for got, expected in zip(run(tight, list(range(len(PROMPTS)))), alone, strict=True):
                assert got.output == expected.output
                assert [value for value, _ in got.logprobs] == pytest.approx(
                    [v for v, _ in expected.logprobs], abs=1e-4
                )
                scores = [score.logprob for score in got.prompt_logprobs]
                assert scores == pytest.approx([score.logprob for score in expected.prompt_logprobs], abs=1e-4)
        stats = tight.scheduler.stats()
        assert stats.preemptions > 2 and stats.cached_prompt_tokens > 20


def test_batch_invariant_texts_are_the_same_bits_after_a_preemption(tiny_model: TinyModel) -> None:
    options: dict[str, Any] = dict(batch_invariant=True, page_size=4, rows_per_step=256)
    with engine(tiny_model("llama"), **options) as one, engine(tiny_model("llama"), kv_tokens=48, **options) as tight:
        alone = [run(one, [i])[0] for i in range(len(PROMPTS))]
        together = run(tight, list(range(len(PROMPTS))))
        assert tight.scheduler.stats().preemptions > 0 and tight.scheduler.stats().cached_prompt_tokens == 0
        for got, expected in zip(together, alone, strict=True):
            assert (got.output, got.logprobs) == (expected.output, expected.logprobs)


@pytest.mark.parametrize("options", [{}, {"prefix_cache": False}, {"batch_invariant": True}, {"dp": 2}])
def test_texts_preempted_for_other_clients_equal_each_request_alone(
    tiny_model: TinyModel, options: dict[str, Any]
) -> None:
    with engine(tiny_model("llama"), page_size=4, prefix_cache=False) as one:
        alone = [run(one, [i])[0].output for i in range(len(PROMPTS))]
    kv_tokens = 160 // options.get("dp", 1)
    with engine(tiny_model("llama"), page_size=4, kv_tokens=kv_tokens, rows_per_step=256, **options) as shared:
        requests = [shared.add(PROMPTS[i], NUM_TOKENS, sampling=PARAMS[i], client="flood") for i in range(len(PROMPTS))]
        own: list[Request] = []
        for count, _ in enumerate(shared.run()):
            shared.scheduler.check_integrity()
            if count % 9 == 8 and (which := len(own)) < len(PROMPTS):  # pages are short: texts of the flood go for it
                own.append(shared.add(PROMPTS[which], NUM_TOKENS, sampling=PARAMS[which], client=f"own {which}"))
        assert shared.scheduler.stats().kv_pages_used == 0 and shared.scheduler.stats().preemptions > 2
        assert [request.output for request in requests] == alone
        assert [request.output for request in own] == alone


def test_a_group_short_of_pages_has_right_texts_and_stalls_no_other(
    tiny_model: TinyModel,
) -> None:
    """TRT-LLM #17379, #17978: texts that grow long, all on the group that has their prefix, and one on the other."""
    ends = torch.randint(0, 67, (4, 2), generator=GENERATOR).tolist()
    long, other = [(*SHARED[:12], *end) for end in ends], tuple(range(20))
    with engine(tiny_model("v3"), page_size=4) as one:
        alone = []
        for prompt in (*long, other):
            alone.append(one.add(prompt, 40))
            list(one.run())
    resolved = resolve(
        EngineConfig(model=str(tiny_model("v3")), dp=2, dtype="float32", max_context=64, page_size=4, kv_tokens=120)
    )
    limits = replace(resolved.limits, decode_weight=0)  # otherwise so short a prefix attracts no request
    with Engine(replace(resolved, limits=limits)) as tight:
        requests = [tight.add(long[0], 40)]
        steps = 0
        for count, _ in enumerate(tight.run()):
            tight.scheduler.check_integrity()
            if not count:
                requests += [tight.add(prompt, 40) for prompt in (*long[1:], other)]
            elif count == 3:
                assert [request.group for request in requests] == [0, 0, 0, 0, 1]
            if not requests[-1].finish_reason:
                steps = tight.scheduler.stats().steps
        stats = tight.scheduler.stats()
    assert [request.output for request in requests] == [request.output for request in alone]
    assert stats.group_preemptions[0] > 0 and stats.group_preemptions[1] == 0
    assert stats.short_steps[0] > 0 and steps <= 45, "a row of the other text was in every step"


class Even(Guide):
    """Allows even tokens below 67 only, one bit each."""

    def allowed(self) -> bytes:
        return b"\x55" * 9

    def advance(self, token: int) -> None:
        assert token % 2 == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_guides_bias_and_min_tokens_decide_what_is_sampled(tiny_model: TinyModel, temperature: float) -> None:
    def params(**more: Any) -> SamplingParams:
        return SamplingParams(temperature=temperature, seed=1, **more)

    with engine(tiny_model("llama"), 1, 2) as two:
        guided = two.add(PROMPTS[0], 12, sampling=params(), guide=Even())
        biased = two.add(PROMPTS[0], 12, sampling=params(logit_bias=((5, 100.0),)))
        plain = two.add(PROMPTS[0], 12, sampling=params())
        ends = frozenset(range(60))
        late = two.add(PROMPTS[0], 12, ends, params(min_tokens=7))
        for _ in two.run():
            pass
        assert len(guided.output) == 12 and any(token % 2 for token in plain.output)
        assert biased.output == [5] * 12
        assert len(late.output) >= 8 and not ends & set(late.output[:7])
        with pytest.raises(ConfigError, match="logit_bias names token 99999, outside"):
            two.add((1,), 1, sampling=SamplingParams(logit_bias=((99999, 1.0),)))
