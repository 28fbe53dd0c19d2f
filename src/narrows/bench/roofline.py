"""What a step must at least do: FLOPs of a prompt, bytes of weights that a decode step reads.

Only products count: the gates and norms between them are passes over memory, which a better engine makes shorter.
"""

from __future__ import annotations

from math import prod

from narrows.arch.chain import build_chain
from narrows.arch.config import MLA, ModelConfig
from narrows.arch.stages import AttentionCore, Gemm, GroupedGemm, Stage
from narrows.arch.weight_sharding import WeightSharding
from narrows.arch.weights import Weight, embed_weights, head_weights, layer_weights
from narrows.layout import Mesh

__all__ = ["decode_bound", "decode_kv_bytes", "decode_weight_bytes", "prefill_flops"]


def prefill_flops(config: ModelConfig, length: int) -> int:
    """Of a prompt of ``length`` tokens whose last row is sampled, two per product and sum.

    Attention is causal and in its expanded form: every query meets the keys up to its own, ``length (length + 1) / 2``
    pairs per head, or within a window those in it.
    """
    chain = build_chain(config, Mesh.of(dp=1, tp=1))
    layers = [stage for kind in chain.layers for stage in chain.layer_types[kind].stages]
    flops = sum(_flops(stage, length) for stage in layers)
    return flops + sum(_flops(stage, 1) for stage in chain.epilogue)


def _flops(stage: Stage, rows: int) -> int:
    flops = 0.0
    for item in stage.work:
        if isinstance(item, Gemm):
            flops += 2 * rows * item.n * item.k
        elif isinstance(item, GroupedGemm):
            flops += 2 * rows * item.pairs_per_row * item.n * item.k
        elif isinstance(item, AttentionCore):
            flops += 2 * _pairs(rows, stage.window) * item.heads * item.prefill_dims
    return round(flops)


def _pairs(rows: int, window: int | None) -> int:
    """Pairs of a query and a key that it sees, of a whole prompt."""
    hidden = 0 if window is None else max(rows - window, 0)
    return (rows * (rows + 1) - hidden * (hidden + 1)) // 2


def decode_weight_bytes(
    config: ModelConfig, itemsize: int, *, rows: int, experts_hit: float, int8: bool = False
) -> float:
    """Bytes of distinct weights that a decode step of ``rows`` sequences reads.

    ``experts_hit``: how many routed experts, all layers added up, at least one row was sent to. Of the embedding only
    the rows' own lines are read. ``int8``: what can be rounded is held in one byte, with a float32 scale per output.
    What ``config`` has in blocks is held in these.
    """

    def nbytes(weight: Weight) -> float:
        if weight.blocks is not None:
            return weight.shape[0] * weight.blocks.row_bytes(weight.shape[1])
        if int8 and weight.int8:
            return prod(weight.shape) * (1 + 4 / weight.shape[1])
        return prod(weight.shape) * (4 if weight.float32 else itemsize)

    mesh, sharding = Mesh.of(dp=1, tp=1), WeightSharding()
    weights: list[Weight] = list(head_weights(config, mesh).values())
    of_expert = 0.0
    for layer in range(config.num_hidden_layers):
        of_layer = layer_weights(config, mesh, sharding, layer)
        weights += [weight for weight in of_layer.values() if not weight.experts]
        of_expert = sum(nbytes(weight) for weight in of_layer.values() if weight.experts) or of_expert
    line = embed_weights(config, mesh, sharding)["embed_tokens"].shape[1]
    return sum(nbytes(weight) for weight in weights) + itemsize * rows * line + experts_hit * of_expert


def decode_kv_bytes(config: ModelConfig, itemsize: int, *, rows: int, context: int) -> int:
    """Bytes of KV cache that a decode step reads once: ``rows`` sequences of ``context`` tokens, in windows less."""
    attention = config.attention
    width = (
        attention.latent_dim if isinstance(attention, MLA) else 2 * attention.num_key_value_heads * attention.head_dim
    )
    windows = (config.sliding_window(layer) for layer in range(config.num_hidden_layers))
    return itemsize * width * rows * sum(context if window is None else min(context, window) for window in windows)


def decode_bound(
    config: ModelConfig,
    itemsize: int,
    *,
    rows: int,
    context: int,
    experts_hit: float,
    bytes_per_s: float,
    flop_per_s: float,
) -> float:
    """Seconds that a decode step takes at least, of plain weights.

    Each product takes the longer of two times: to read its weights (attention: the rows' keys and values) once, and to
    compute its FLOPs. A weight that many rows share is bound by the second, and then waiting for memory is no excuse.
    ``experts_hit``: as in :func:`decode_weight_bytes`.
    """
    chain = build_chain(config, Mesh.of(dp=1, tp=1))
    layers = [stage for kind in chain.layers for stage in chain.layer_types[kind].stages]
    num_moe = sum(config.is_moe_layer(layer) for layer in range(config.num_hidden_layers))
    seconds = 0.0
    for stage in (*layers, *chain.epilogue):
        for item in stage.work:
            if isinstance(item, Gemm):
                nbytes, flops = float(itemsize * item.n * item.k), 2.0 * rows * item.n * item.k
            elif isinstance(item, GroupedGemm):
                nbytes = itemsize * item.n * item.k * experts_hit / num_moe
                flops = 2.0 * rows * item.pairs_per_row * item.n * item.k
            elif isinstance(item, AttentionCore):
                seen = context if stage.window is None else min(context, stage.window)
                nbytes = float(rows * seen * item.kv_row_bytes)
                flops = 2.0 * rows * seen * item.heads * item.decode_dims
            else:
                continue
            seconds += max(nbytes / bytes_per_s, flops / flop_per_s)
    return seconds
