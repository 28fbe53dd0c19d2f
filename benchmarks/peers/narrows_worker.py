"""narrows as a worker: ``narrows_worker.py FOLDER OPTIONS``, with options as `narrows bench --against` takes them."""

from __future__ import annotations

import sys
from dataclasses import replace

from common import Clock, Generate, Ticks, serve

from narrows.imports import quick_imports

with quick_imports():  # as the command does
    from narrows.arch.presets import load_model_config
    from narrows.bench.engines import parse_variants
    from narrows.engine.config import EngineConfig, resolve
    from narrows.engine.core import Engine


def make(folder: str) -> Generate:
    config = parse_variants(EngineConfig(model=folder), (), sys.argv[2:3])[-1].config
    # Room for 32 requests of 512 + 64 tokens, and for one of 8192 where the model has it, as the peers are given it.
    context = min(8256, load_model_config(folder).max_position_embeddings)
    room = {"max_context": context, "kv_tokens": -(-32 // max(config.dp, 1)) * 640}
    engine = Engine(resolve(replace(config, prefix_cache=False, fork_self=True, **room)))

    def generate(prompts: list[list[int]], max_tokens: int) -> tuple[list[list[int]], Ticks]:
        clock = Clock(len(prompts))
        indices = {engine.add(tuple(prompt), max_tokens).id: at for at, prompt in enumerate(prompts)}
        for request in engine.run():
            clock.add(indices[request.id], request.output[-1])
        return clock.read()

    return generate


if __name__ == "__main__":
    serve(make)
