"""vLLM's CPU build as a worker, through its engine in this process: step by step, the tokens as they come."""

from __future__ import annotations

import os
from itertools import count

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1"}
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "0-1")

from common import Clock, Generate, Ticks, serve
from vllm import LLM, SamplingParams


def make(folder: str) -> Generate:
    llm = LLM(
        folder,
        dtype="bfloat16",
        max_model_len=8256,
        max_num_seqs=32,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    engine, numbers = llm.llm_engine, count()

    def generate(prompts: list[list[int]], max_tokens: int) -> tuple[list[list[int]], Ticks]:
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        clock = Clock(len(prompts))
        indices = {}
        for at, prompt in enumerate(prompts):
            name = str(next(numbers))
            indices[name] = at
            engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
        while engine.has_unfinished_requests():
            for output in engine.step():
                at = indices[output.request_id]
                held = len(clock.tokens[at])
                clock.add(at, *output.outputs[0].token_ids[held:])
        return clock.read()

    return generate


if __name__ == "__main__":
    serve(make)
