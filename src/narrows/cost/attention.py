"""Prices the attention core of one layer: scores, softmax and values, by measured kernels where there are any."""

from __future__ import annotations

from dataclasses import dataclass

from narrows.cost.devices import Device
from narrows.cost.grids import Grid, grids
from narrows.cost.kernels import attention_roofline
from narrows.cost.price import ZERO, Price, Source

__all__ = ["AttentionShape", "attention_price"]

_TABLE_HEAD_DIM = 128
"""Of the measured grouped-query kernels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """What one rank attends to in a step.

    ``latent``: DeepSeek's multi-head latent attention, absorbed in decode. ``rows`` of new tokens; in decode each is a
    sequence of ``context`` tokens, in prefill they are whole sequences of that length, or the last rows of one.
    ``flops`` and ``kv_bytes`` are what the roofline sees (masked positions left out).
    """

    latent: bool
    heads: int
    kv_heads: int
    head_dim: int
    decode: bool
    rows: int
    context: float
    flops: float
    kv_bytes: float
    share: float = 1.0
    """Of the pairs of a new token and an earlier one: those that a sliding window leaves."""


def attention_price(device: Device, shape: AttentionShape, *, dtype: str, kv_dtype: str) -> Price:
    """Seconds of one rank's attention core, launch included.

    ``dtype`` of the arithmetic and ``kv_dtype`` of the cache: ``bf16`` or ``fp8`` (which is multiplied in bf16), or
    ``fp32``. Measured kernels (NVIDIA AIConfigurator) are interpolated over heads, batch and length; beyond their range
    they are scaled by the roofline, and so are prompts under a sliding window. The roofline alone prices float32, and
    devices without tables.
    """
    if not shape.flops and not shape.kv_bytes:
        return ZERO
    limit = attention_roofline(device, flops=shape.flops, kv_bytes=shape.kv_bytes, dtype=dtype)
    kernel = f"{'mla' if shape.latent else 'gqa'}_{'decode' if shape.decode else 'prefill'}"
    tables = grids(device.kernels, kernel) if device.kernels is not None and dtype != "fp32" else {}
    own = device.kernels == device.name and (kv_dtype,) in tables
    grid = tables.get((kv_dtype,)) or tables.get(("bf16",))  # a kernel over an fp8 cache multiplies in bf16
    if grid is None:
        return limit
    price = _at(grid, shape, shape.rows, shape.context * shape.share) if shape.decode else _prefill(grid, shape)
    return price if own else Price(price.seconds, max(price.source, Source.SCALED))


def _prefill(grid: Grid, shape: AttentionShape) -> Price:
    """Whole sequences as measured. The last rows of a longer sequence: the sequence less what comes before them."""
    if shape.rows >= shape.context:
        price = _at(grid, shape, shape.rows / shape.context, shape.context)
    else:
        whole = _at(grid, shape, 1, shape.context)
        before = _at(grid, shape, 1, shape.context - shape.rows)
        alone = _at(grid, shape, 1, shape.rows)
        seconds = max(whole.seconds - before.seconds, alone.seconds)
        price = Price(seconds, max(whole.source, Source.INTERPOLATED))
    return price if shape.share == 1.0 else Price(price.seconds * shape.share, Source.SCALED)


def _at(grid: Grid, shape: AttentionShape, batch: float, length: float) -> Price:
    key = (shape.heads, batch) if shape.latent else (shape.heads, shape.kv_heads, batch)
    inside = grid.within(key)
    price = grid.at(inside, length)
    # Work grows with heads and batch, and with the width of a head; below the range a kernel takes its least time.
    beyond = max(shape.heads / inside[0], 1.0) * max(batch / inside[-1], 1.0)
    if not shape.latent:
        beyond *= max(shape.head_dim / _TABLE_HEAD_DIM, 0.5)
    return price if beyond == 1.0 else Price(price.seconds * beyond, Source.SCALED)
