"""Sampling over rank processes: the tokens and log-probabilities of rank threads, bit for bit; batch invariance too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from narrows.engine.config import EngineConfig, resolve
from narrows.engine.core import Engine
from narrows.sched.sampling import SamplingParams
from narrows.sched.scheduler import Request

PROMPTS = [tuple(range(1, 8)), (9, 8, 7), (5, 6) * 150, (33,)]
PARAMS = [
    SamplingParams(temperature=1.0, top_p=0.9, seed=3),
    None,
    SamplingParams(
        temperature=0.7, top_k=20, frequency_penalty=0.5, repetition_penalty=1.2, seed=4, logprobs=4, prompt_logprobs=2
    ),
    SamplingParams(presence_penalty=1.0, logprobs=1),
]


def serve(engine: Engine, which: list[int]) -> list[tuple[list[int], Any]]:
    requests: list[Request] = [engine.add(PROMPTS[i], 16, sampling=PARAMS[i]) for i in which]
    for _ in engine.run():
        pass
    return [(request.output, [*request.prompt_logprobs, *request.logprobs]) for request in requests]


@pytest.mark.parametrize(("dp", "tp"), [(1, 2), (2, 1)])
def test_processes_sample_as_threads_alone_and_in_batches(speaking_v3: Path, dp: int, tp: int) -> None:
    options: dict[str, Any] = dict(dp=dp, tp=tp, dtype="float32", max_context=512, checked=True, batch_invariant=True)
    everything = list(range(len(PROMPTS)))
    with Engine(resolve(EngineConfig(model=str(speaking_v3), **options))) as threads:
        expected = serve(threads, everything)
    assert [len(logprobs) for _, logprobs in expected] == [0, 0, len(PROMPTS[2]) - 1 + 16, 16]
    with Engine(resolve(EngineConfig(model=str(speaking_v3), ranks="processes", **options))) as processes:
        assert serve(processes, everything) == expected
        assert serve(processes, everything[::-1]) == expected[::-1]
        assert [serve(processes, [i])[0] for i in everything] == expected
