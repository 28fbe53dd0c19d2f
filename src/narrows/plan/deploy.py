"""What a deployment decides before its first step: its limits, and the steps that it is planned for.

The engine and the simulation call the same functions, so that what is simulated is what would run.
"""

from __future__ import annotations

from narrows.arch.block_formats import BLOCK_FORMATS
from narrows.arch.config import ModelConfig
from narrows.arch.positions import most_positions
from narrows.arch.quantization import check_loadable
from narrows.cost.devices import Device
from narrows.cost.pricer import StepShape
from narrows.errors import ConfigError
from narrows.layout import Mesh, split_evenly
from narrows.sched.limits import Limits

__all__ = [
    "DEFAULT_REQUESTS",
    "DEFAULT_ROWS",
    "PAGE_SIZE",
    "STORED",
    "limits_of",
    "loaded_dtype",
    "longest_context",
    "planned_dtype",
    "priced_context",
    "step_mix",
    "stored_words",
]

DEFAULT_ROWS = 2048
"""Most rows of a step, all attention groups together."""
DEFAULT_REQUESTS = 256
"""Most requests that run at once in an attention group."""
PAGE_SIZE = 16
"""Tokens of a page of the KV cache."""
STORED = "stored"
"""The dtype of weights in the blocks of their checkpoint."""
_DEFAULT_CONTEXT = 8192
_PRICED_CONTEXT = 1024

_SCORED_LOGITS = 1 << 24
"""Logits of scored prompts in one step: 64 MB in float32, whatever the vocabulary."""


def longest_context(config: ModelConfig, requested: int | None) -> int:
    """Most tokens of a sequence: as requested, or the model's positions, at most 8192.

    Raises:
        ConfigError: fewer than 2, or more than the model has positions.
    """
    longest = most_positions(config)
    context = min(longest, _DEFAULT_CONTEXT) if requested is None else requested
    if not 2 <= context <= longest:
        raise ConfigError(f"--max-context {context} must be between 2 and the model's {longest} positions")
    return context


def limits_of(
    config: ModelConfig,
    mesh: Mesh,
    *,
    rows_per_step: int,
    max_context: int,
    kv_tokens: int,
    requests_per_group: int = DEFAULT_REQUESTS,
    page_size: int = PAGE_SIZE,
    prefix_cache: bool = True,
    prefill_chunk: int = 0,
    prompt_rows: int = 0,
) -> Limits:
    """The scheduler's limits for so many tokens of KV cache per attention group.

    Raises:
        ConfigError: no token of KV cache, no request, or a step without room for a chunk of a prompt.
    """
    if kv_tokens < 1:
        raise ConfigError(f"--kv-tokens is {kv_tokens}; it must be at least 1")
    if requests_per_group < 1:
        raise ConfigError(f"--requests-per-group is {requests_per_group}; it must be at least 1")
    return Limits(
        num_groups=mesh.num_groups,
        rows_per_step=rows_per_step,
        requests_per_group=requests_per_group,
        page_size=page_size,
        pages_per_group=1 + -(-kv_tokens // page_size),
        max_context=max_context,
        prefill_chunk=prefill_chunk,
        prompt_rows=prompt_rows,
        prefix_cache=prefix_cache,
        scored_rows_per_step=max(_SCORED_LOGITS // config.vocab_size, prefill_chunk, 1),
    )


def priced_context(max_context: int) -> int:
    """The context that the plans of a plan cache are priced at."""
    return min(_PRICED_CONTEXT, max_context)


def step_mix(mesh: Mesh, rows: int, max_context: int) -> list[tuple[StepShape, float]]:
    """The steps that weight sharding is chosen for: one full prefill step to 64 decode steps of a request per group."""
    context = priced_context(max_context)
    prefill = StepShape.of(mesh, split_evenly(rows, mesh.num_groups), phase="prefill", context=context)
    decode = StepShape.of(mesh, (1,) * mesh.num_groups, phase="decode", context=context)
    return [(prefill, 1.0), (decode, 64.0)]


def loaded_dtype(config: ModelConfig) -> tuple[str, str]:
    """What the checkpoint's weights are held as where none of their stored forms is computed with, and why: float32
    stays float32, all else becomes bfloat16."""
    dtype = "fp32" if config.dtype == "float32" else "bf16"
    if config.quantization is not None:
        return dtype, f"{_stored(config)}, which are dequantised when they are loaded"
    if config.dtype in ("float32", "bfloat16"):
        return dtype, f"the checkpoint's weights are {config.dtype}"
    return dtype, f"the checkpoint's weights are {config.dtype}, which runs as bfloat16"


def planned_dtype(config: ModelConfig, device: Device, name: str) -> tuple[str, str]:
    """What the checkpoint's weights are on ``device`` where no dtype is given, and why: FP8 in blocks as it is
    where the device multiplies FP8, blocks as they are on a CPU, else as :func:`loaded_dtype`. ``name``: the model's,
    for an error.

    Raises:
        ConfigError: weights stored in a way that nothing here loads, in the words of the code that would load them.
    """
    check_loadable(config.quantization, name)
    if config.blocks and device.is_cpu:
        return STORED, stored_words(config)
    if config.quantization is None:
        return loaded_dtype(config)
    if device.tflops_fp8 is not None:
        return "fp8", f"{_stored(config)}, which {device.name} multiplies as they are"
    dtype, because = loaded_dtype(config)
    return dtype, f"{because}: {device.name} has no fp8"


def stored_words(config: ModelConfig) -> str:
    """Which blocks a checkpoint's weights are in, and that rows are rounded where they meet these."""
    found = {blocks for _, blocks in config.blocks.formats}
    names = ", ".join(str(blocks) for blocks in BLOCK_FORMATS if blocks in found)
    return f"weights stay in their blocks ({names}), rows are rounded to int8 by groups of 32"


def _stored(config: ModelConfig) -> str:
    assert config.quantization is not None
    block = config.quantization.weight_block_size
    blocks = f" in blocks of {block[0]} x {block[1]}" if block else ""
    return f"the checkpoint's weights are {config.quantization.quant_method}{blocks}"
