"""How many positions a model has, and which prompts are rotated alike."""

from __future__ import annotations

from narrows.arch.config import ModelConfig
from narrows.arch.rope import DynamicRope, LinearRope, LongRope, YarnRope

__all__ = ["cache_salt", "most_positions"]


def most_positions(config: ModelConfig) -> int:
    """Tokens that a sequence may have: ``max_position_embeddings``, or the model's original positions after rotary
    scaling where that is more (Qwen2.5's card: factor 4 beside 32768).

    ``linear`` and ``dynamic`` stretch ``max_position_embeddings`` itself, since their files name no original length.
    ``llama3`` and ``longrope`` files give the stretched length.
    """
    scaling, positions = config.rope.scaling, config.max_position_embeddings
    if isinstance(scaling, YarnRope):
        return max(positions, int(scaling.factor * scaling.original_max_position_embeddings))
    if isinstance(scaling, LinearRope | DynamicRope):
        return max(positions, int(scaling.factor * positions))
    return positions


def cache_salt(config: ModelConfig, num_prompt: int) -> bytes:
    """Salt of the cached keys of a prompt of ``num_prompt`` tokens.

    Empty for most models: a key depends on its token and those before it. Where the rotation also depends on the length
    of the prompt (``dynamic``, ``longrope``), only prompts of one salt share pages.
    """
    scaling = config.rope.scaling
    if isinstance(scaling, LongRope) and num_prompt > scaling.original_max_position_embeddings:
        return b"longrope"
    if isinstance(scaling, DynamicRope) and num_prompt > config.max_position_embeddings:
        return num_prompt.to_bytes(8, "little")
    return b""
