"""Memory per rank: weights, KV cache per token, and the context that fits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from narrows.arch.block_formats import BlockFormat
from narrows.arch.config import MLA, ModelConfig
from narrows.arch.weight_sharding import WeightSharding, head_spans, kv_head_spans
from narrows.arch.weights import Weight, embed_weights, head_weights, layer_weights
from narrows.cost.devices import Device
from narrows.layout import Mesh

__all__ = ["MemoryUse", "kv_token_bytes", "memory_use", "stored_bytes", "weight_bytes"]

FP8_BLOCK = (128, 128)
"""Rows and columns that share one float32 scale in FP8, where the checkpoint does not say."""
CPU_PROCESS = 210e6
"""Of a rank process on a CPU before its weights: the interpreter and torch, private memory. 185 MB were measured on
an AMD EPYC (Zen 4), 216 to 247 on a Xeon with AMX (benchmarks/memory.py). Libraries that all map are not counted."""
GPU_PROCESS = 3.5e9
"""Of a rank on a GPU: the context, kernels, graphs and workspaces of libraries. NVIDIA AIConfigurator's figure."""
GPU_COLLECTIVES = 0.4e9
"""Of NCCL, where there are several ranks; from the same source."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """Bytes on the rank that holds most. ``process``: what a rank takes before its weights, ``workspace``: what its
    largest step takes beside them."""

    weights: int
    kv_per_token: int
    device: float
    process: float
    workspace: int = 0

    @property
    def usable(self) -> float:
        """Bytes of the device that weights and KV cache may take."""
        return max(0.0, self.device - self.process - self.workspace)

    @property
    def context_tokens(self) -> int:
        """Tokens of KV cache that an attention group can hold in what is left; 0 if the weights alone do not fit."""
        return max(0, int((self.usable - self.weights) // self.kv_per_token))

    @property
    def fits(self) -> bool:
        return self.weights <= self.usable

    def holds(self, tokens: int) -> bool:
        """Whether the weights fit and leave room for the KV cache of so many tokens per attention group."""
        return self.fits and tokens <= self.context_tokens


def weight_bytes(config: ModelConfig, mesh: Mesh, sharding: WeightSharding, dtype: str, rank: int) -> int:
    """Bytes of weights that ``rank`` holds; ``fp8`` stores linear weights in one byte with scales by block, ``int8`` in
    one with a scale per output, ``bf16`` in two, ``fp32`` in four, ``stored`` in the blocks of the checkpoint. What is
    not linear is as wide as the activations, and the router's are float32 always."""
    return _rank_bytes(_kinds_of_weights(config, mesh, sharding), _scale_block(config), mesh, dtype, rank)


def _kinds_of_weights(config: ModelConfig, mesh: Mesh, sharding: WeightSharding) -> list[tuple[int, list[Weight]]]:
    """Weights that a model has so many times, which are the same question for every rank."""
    head = head_weights(config, mesh)
    if config.tie_word_embeddings and (head["lm_head"].blocks is None or sharding.embed == "vocab"):
        del head["lm_head"]  # a slice of the embedding, which is held already; panels are not sliced
    found = [(1, [*embed_weights(config, mesh, sharding).values(), *head.values()])]
    blocks = _blocks_by_layer(config)
    kinds = [(config.is_moe_layer(layer), blocks.get(str(layer))) for layer in range(config.num_hidden_layers)]
    for kind in dict.fromkeys(kinds):  # all layers of a kind hold as much
        found.append((kinds.count(kind), list(layer_weights(config, mesh, sharding, kinds.index(kind)).values())))
    return found


def _blocks_by_layer(config: ModelConfig) -> dict[str, frozenset[tuple[str, BlockFormat]]]:
    """What of each layer is in which blocks, by names without the layer's."""
    found: dict[str, set[tuple[str, BlockFormat]]] = {}
    for name, blocks in config.blocks.formats:
        if name.startswith("model.layers."):
            _, _, layer, part = name.split(".", 3)
            found.setdefault(layer, set()).add((part, blocks))
    return {layer: frozenset(parts) for layer, parts in found.items()}


@lru_cache(maxsize=16)
def stored_bytes(config: ModelConfig) -> float:
    """Bytes of a value of the weights that products read, on average, where they are held in the checkpoint's blocks;
    those that are not in any count too."""
    nbytes = values = 0
    mesh = Mesh.of(dp=1, tp=1)
    for times, weights in _kinds_of_weights(config, mesh, WeightSharding()):
        for weight in weights:
            if weight.int8 or weight.blocks:
                nbytes += times * _held_bytes(weight, mesh, 0, "stored", FP8_BLOCK)
                values += times * weight.num_values(mesh, 0)
    return nbytes / values if values else 2.0


def _scale_block(config: ModelConfig) -> tuple[int, int]:
    stored = config.quantization
    return (stored.weight_block_size if stored else None) or FP8_BLOCK


def _rank_bytes(
    kinds: list[tuple[int, list[Weight]]], block: tuple[int, int], mesh: Mesh, dtype: str, rank: int
) -> int:
    return sum(
        times * sum(_held_bytes(weight, mesh, rank, dtype, block) for weight in weights) for times, weights in kinds
    )


def _held_bytes(weight: Weight, mesh: Mesh, rank: int, dtype: str, block: tuple[int, int]) -> int:
    """Bytes of one weight on a rank, of all its experts there, with its scales."""
    values = weight.num_values(mesh, rank)
    if weight.float32 or dtype == "fp32":
        return 4 * values
    if dtype == "fp8" and weight.quantized:
        rows, columns = weight.local_shape(mesh, rank)
        return values + 4 * -(-rows // block[0]) * -(-columns // block[1]) * weight.num_experts(rank)
    if dtype == "stored" and weight.blocks is not None:
        rows, columns = weight.local_shape(mesh, rank)
        return rows * weight.blocks.row_bytes(columns) * weight.num_experts(rank)
    if dtype in ("int8", "int8-weight-only") and weight.int8:
        return values + 4 * weight.local_shape(mesh, rank)[0] * weight.num_experts(rank)
    return 2 * values


def kv_token_bytes(config: ModelConfig, mesh: Mesh, itemsize: int = 2) -> int:
    """Bytes of KV cache per token on the largest rank of its group, all layers. MLA's latent is held by every rank."""
    attention = config.attention
    if isinstance(attention, MLA):
        values = attention.latent_dim
    else:
        heads = max(hi - lo for lo, hi in kv_head_spans(config, mesh.group_size))
        values = 2 * heads * attention.head_dim
    return values * itemsize * config.num_hidden_layers


def memory_use(
    config: ModelConfig,
    mesh: Mesh,
    sharding: WeightSharding,
    device: Device,
    dtype: str,
    workspace: int = 0,
    kv_dtype: str = "bf16",
) -> MemoryUse:
    """Weights and KV cache on the rank that holds most weights, and what fits beside them where steps take
    ``workspace`` bytes. ``kv_dtype`` is ``fp8``, or that of the activations."""
    itemsize = 1 if kv_dtype == "fp8" else 4 if dtype == "fp32" else 2
    kinds, block = _kinds_of_weights(config, mesh, sharding), _scale_block(config)
    weights = max(_rank_bytes(kinds, block, mesh, dtype, rank) for rank in range(mesh.size))
    return MemoryUse(
        weights=weights,
        kv_per_token=kv_token_bytes(config, mesh, itemsize),
        device=device.memory_bytes,
        process=_process_bytes(config, mesh, device, dtype),
        workspace=workspace,
    )


def _process_bytes(config: ModelConfig, mesh: Mesh, device: Device, dtype: str) -> float:
    if not device.is_cpu:
        return GPU_PROCESS + (GPU_COLLECTIVES if mesh.size > 1 else 0.0)
    attention = config.attention
    if dtype == "fp32" or not isinstance(attention, MLA):
        return CPU_PROCESS
    # Packed for two products: latents to keys, and queries to latents (ops/kv_b.py).
    lo, hi = head_spans(config, mesh.group_size)[0]
    twice = 2 * (hi - lo) * attention.qk_nope_head_dim * attention.kv_lora_rank
    return CPU_PROCESS + twice * config.num_hidden_layers
