"""Compares a checkpoint's tensors with its config before loading: missing, unused, tied or padded ones.

Reads names and shapes, and values only where needed: of an embedding and a head that may be one tensor.
"""

from __future__ import annotations

import re
from dataclasses import replace

import torch

from narrows.arch.config import ModelConfig
from narrows.arch.weight_sharding import WeightSharding
from narrows.arch.weights import Weight, embed_weights, head_weights, layer_weights
from narrows.errors import CheckpointError
from narrows.layout import Mesh
from narrows.weights.safetensors_folder import SafetensorsFolder

__all__ = ["fit_checkpoint"]

_LAYER = re.compile(r"layers\.(\d+)\.")
_ROWS = 4096
"""Rows compared at a time."""


def fit_checkpoint(source: SafetensorsFolder, config: ModelConfig) -> tuple[ModelConfig, tuple[str, ...]]:
    """The config with ``tie_word_embeddings`` as the checkpoint has it, and notes.

    As in transformers: of a tied pair either tensor will do, and two that differ are not tied.

    Raises:
        CheckpointError: tensors are missing; the message names the first.
    """
    config, notes = _untied(source, config)
    one = Mesh.of(dp=1, tp=1)
    embed, head = embed_weights(config, one, WeightSharding()), head_weights(config, one)
    weights = [*embed.values(), *head.values()]
    for layer in range(config.num_hidden_layers):
        weights += layer_weights(config, one, WeightSharding(), layer).values()
    used: set[str] = set()
    missing: list[tuple[Weight, int | None]] = []
    for weight in weights:
        for expert in range(*weight.experts[0]) if weight.experts else (None,):
            stored = source.names.find(weight, expert)
            if stored is None:
                missing.append((weight, expert))
            else:
                used.add(stored.name)
    unused = [name for name in source if name not in used and not _is_known(source, config, name, used)]
    if missing:
        raise CheckpointError(_missing(source, missing, unused))
    notes += source.notes + _padded(source, config, embed["embed_tokens"]) + _named(source)
    if unused:
        notes += (f"{len(unused)} tensor(s) of the checkpoint are in no layer of the model: {_some(unused)}",)
    return config, notes


def _missing(source: SafetensorsFolder, missing: list[tuple[Weight, int | None]], unused: list[str]) -> str:
    """The first missing tensor, the number of others, and tensors that may be these under other names."""
    first = source.missing(*missing[0])
    block = source.names.local(missing[0][0].name).rsplit(".", 2)[0]
    near = [name for name in unused if name.startswith(block)] or unused
    return (
        first
        + (f"; {len(missing) - 1} more are missing" if len(missing) > 1 else "")
        + (f"; it has {_some(near)}, which the model has not" if near else "")
    )


def _some(names: list[str]) -> str:
    """A few of them."""
    return ", ".join(sorted(names)[:3]) + (" ..." if len(names) > 3 else "")


def _untied(source: SafetensorsFolder, config: ModelConfig) -> tuple[ModelConfig, tuple[str, ...]]:
    """The config; no longer tied if the checkpoint holds an embedding and a head that differ."""
    if not config.tie_word_embeddings:
        return config, ()
    apart, one = replace(config, tie_word_embeddings=False), Mesh.of(dp=1, tp=1)
    pair = (embed_weights(apart, one, WeightSharding())["embed_tokens"], head_weights(apart, one)["lm_head"])
    if any(source.names.find(weight, None) is None for weight in pair) or _equal(source, *pair):
        return config, ()
    note = "config.json ties the LM head to the embedding, but the checkpoint's two differ: each is used, not tied"
    return apart, (note,)


def _equal(source: SafetensorsFolder, a: Weight, b: Weight) -> bool:
    num_rows = a.shape[0]
    spans = ((lo, min(lo + _ROWS, num_rows)) for lo in range(0, num_rows, _ROWS))
    by_rows = (replace(a, dim=0), replace(b, dim=0))
    return all(torch.equal(*(source.take(each, span) for each in by_rows)) for span in spans)


def _padded(source: SafetensorsFolder, config: ModelConfig, embed: Weight) -> tuple[str, ...]:
    stored = source.names.find(embed, None)
    rows = config.vocab_size if stored is None else source.shape(stored.name)[0]
    if rows == config.vocab_size:
        return ()
    return (f"the checkpoint's embedding has {rows} rows; the first {config.vocab_size} (vocab_size) are used",)


def _named(source: SafetensorsFolder) -> tuple[str, ...]:
    body = source.names.body
    if body == "model.":
        return ()
    return (f"the checkpoint names its layers {body}layers...: read as model.layers...",)


def _is_known(source: SafetensorsFolder, config: ModelConfig, name: str, used: set[str]) -> bool:
    """Scales of used tensors, computed tables, one of a tied pair, and multi-token-prediction layers."""
    if name.removesuffix("_scale_inv") in used or name.endswith(("rotary_emb.inv_freq", "lm_head.weight")):
        return True
    layer = _LAYER.match(name.removeprefix(source.names.body))
    return layer is not None and int(layer[1]) >= config.num_hidden_layers
