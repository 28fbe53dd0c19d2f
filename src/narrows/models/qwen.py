"""Qwen2, Qwen3 and Qwen3-MoE: Llama's layer with a bias on q, k and v (2), a norm per head (3), and experts (3-MoE).

Knows what differs from Llama. Sources of the numbers: transformers' ``Qwen2ForCausalLM``, ``Qwen3ForCausalLM`` and
``Qwen3MoeForCausalLM``.

Letters: D head_dim.
"""

from __future__ import annotations

from narrows.arch.config import ModelConfig
from narrows.models.llama import Llama, LlamaLayer
from narrows.models.moe import MoeLayer
from narrows.models.parts import Loader

__all__ = ["Qwen2", "Qwen3", "Qwen3Moe"]


class Qwen2(Llama):
    """A Qwen2 on one rank: the bias on q, k and v is in the config, so its layers are Llama's."""


class Qwen3Layer(LlamaLayer):
    """input_norm, attention with a norm of each query and key head, post_attn_norm, mlp."""

    def __init__(self, config: ModelConfig, load: Loader, layer: int) -> None:
        super().__init__(config, load, layer)
        self.q_norm_D = load(self.weights["q_norm"])
        self.k_norm_D = load(self.weights["k_norm"])


class Qwen3(Llama):
    """A Qwen3 on one rank."""

    layer_class = Qwen3Layer


class Qwen3MoeLayer(MoeLayer, Qwen3Layer):
    """Qwen3's attention, and router and experts in place of the MLP."""


class Qwen3Moe(Llama):
    """A Qwen3-MoE on one rank."""

    layer_class = Qwen3MoeLayer
