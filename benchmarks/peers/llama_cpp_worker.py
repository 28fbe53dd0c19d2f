"""llama.cpp as a worker, through the functions of its library: prompts one after the other, then all decode together.

``argv[1]`` is the GGUF file that `to_gguf.py` made.
"""

from __future__ import annotations

import ctypes
import os

import llama_cpp
import numpy as np
from common import Clock, Generate, Ticks, serve

LOGICAL, PHYSICAL = 2048, 512
"""Rows that a call may hold, and that are computed at once (llama.cpp's defaults)."""
MOST_SEQUENCES = 32


def make(file: str) -> Generate:
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(file.encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp cannot load {file}")
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = (
        MOST_SEQUENCES * 640,
        LOGICAL,
        PHYSICAL,
        MOST_SEQUENCES,
    )
    params.n_threads = params.n_threads_batch = int(os.environ["OMP_NUM_THREADS"])
    params.kv_unified = True
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise SystemExit("llama.cpp cannot make a context")
    vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    batch = llama_cpp.llama_batch_init(LOGICAL, 0, 1)

    def decode(rows: list[tuple[int, int, int, bool]]) -> None:
        """(token, position, sequence, whether its logits are wanted) of every row."""
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, logits) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, logits
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
        if (code := llama_cpp.llama_decode(context, batch)) != 0:
            raise RuntimeError(f"llama_decode gave {code}")

    def best(row: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(context, row)
        return int(np.ctypeslib.as_array(ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (vocab_size,)).argmax())

    def generate(prompts: list[list[int]], max_tokens: int) -> tuple[list[list[int]], Ticks]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        clock = Clock(len(prompts))
        for at, prompt in enumerate(prompts):
            rows = [(token, i, at, i == len(prompt) - 1) for i, token in enumerate(prompt)]
            for first in range(0, len(rows), LOGICAL):
                decode(rows[first : first + LOGICAL])
            clock.add(at, best(batch.n_tokens - 1))
        for step in range(max_tokens - 1):
            decode([(clock.tokens[at][-1], len(prompt) + step, at, True) for at, prompt in enumerate(prompts)])
            for at in range(len(prompts)):
                clock.add(at, best(at))
        return clock.read()

    return generate


if __name__ == "__main__":
    serve(make)
