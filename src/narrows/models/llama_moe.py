"""Qwen3-MoE and GLM-4.5: Llama's attention, and routed experts in the layers that the config says.

Sources of the numbers: transformers' ``Qwen3MoeForCausalLM`` and ``Glm4MoeForCausalLM``.
"""

from __future__ import annotations

from narrows.models.llama import Llama, LlamaLayer
from narrows.models.moe import MoeLayer

__all__ = ["LlamaMoe", "LlamaMoeLayer"]


class LlamaMoeLayer(MoeLayer, LlamaLayer):
    """input_norm, attention, post_attn_norm, then mlp or router, shared_expert, experts."""


class LlamaMoe(Llama):
    """A Qwen3-MoE or a GLM-4.5 on one rank."""

    layer_class = LlamaMoeLayer
