"""Hugging Face transformers as a worker: all prompts, which have one length, as one static batch."""

from __future__ import annotations

import os

import torch
from common import Clock, Generate, Ticks, serve
from transformers import AutoModelForCausalLM, DynamicCache


def make(folder: str) -> Generate:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def generate(prompts: list[list[int]], max_tokens: int) -> tuple[list[list[int]], Ticks]:
        clock = Clock(len(prompts))
        cache, ids = DynamicCache(config=model.config), torch.tensor(prompts)
        for _ in range(max_tokens):
            logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            ids = logits[:, -1].argmax(-1, keepdim=True)
            for at, token in enumerate(ids.flatten().tolist()):
                clock.add(at, token)
        return clock.read()

    return generate


if __name__ == "__main__":
    serve(make)
