"""A model's dimensions: the frozen form of a Hugging Face ``config.json`` that all other code reads.

Field names are those of ``config.json`` (transformers 4 and 5). ``configs/`` makes one from a file.
"""

from __future__ import annotations

from dataclasses import dataclass

from narrows.arch.block_formats import NO_BLOCKS, StoredBlocks
from narrows.arch.rope import Rope

__all__ = ["GQA", "HIDDEN_ACTS", "MLA", "CheckpointQuantization", "MoE", "ModelConfig"]

HIDDEN_ACTS = frozenset(
    (
        "gelu",
        "gelu_10",
        "gelu_accurate",
        "gelu_fast",
        "gelu_new",
        "gelu_python",
        "gelu_python_tanh",
        "gelu_pytorch_tanh",
        "hardswish",
        "laplace",
        "leaky_relu",
        "linear",
        "mish",
        "quick_gelu",
        "relu",
        "relu2",
        "relu6",
        "sigmoid",
        "silu",
        "sqrtsoftplus",
        "tanh",
    )
)
"""Valid values of ``hidden_act``: the functions of transformers' ``ACT2FN`` that have no weights, each by one name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MLA:
    """Multi-head latent attention: queries and keys come from low-rank latents (DeepSeek-V2, section 2.1).

    ``attention_bias``: of the projections into the latents (``q_a_proj``, ``kv_a_proj_with_mqa``) and of ``o_proj``.
    """

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    attention_bias: bool = False

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Width of what the cache keeps per token: the compressed latent and the shared rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def qkv_latent_dim(self) -> int:
        """Width of the low-rank projection's output: ``q_lora_rank + kv_lora_rank + qk_rope_head_dim``."""
        return (self.q_lora_rank or 0) + self.latent_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class GQA:
    """Grouped-query attention: ``num_key_value_heads`` heads of keys and values serve all query heads.

    ``sliding_window``: a row of a layer in ``sliding_layers`` sees itself and that many rows less one before it. None
    where no layer slides, even if the file has a window.
    """

    num_key_value_heads: int
    head_dim: int
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    sliding_layers: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class MoE:
    """Routed experts, the rule that routes to them, and which layers have them."""

    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    n_shared_experts: int
    first_k_dense_replace: int
    scoring_func: str
    topk_method: str
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    moe_layer_freq: int = 1
    decoder_sparse_step: int = 1
    mlp_only_layers: frozenset[int] = frozenset()

    @property
    def shared_intermediate_size(self) -> int:
        return self.n_shared_experts * self.moe_intermediate_size

    def in_layer(self, layer: int) -> bool:
        """Whether ``layer`` has routed experts. ``first_k_dense_replace`` layers do not, and of the others those whose
        index ``moe_layer_freq`` divides (DeepSeek), whose number from 1 ``decoder_sparse_step`` divides and which
        ``mlp_only_layers`` does not list (Qwen) do."""
        return (
            layer >= self.first_k_dense_replace
            and layer % self.moe_layer_freq == 0
            and (layer + 1) % self.decoder_sparse_step == 0
            and layer not in self.mlp_only_layers
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointQuantization:
    """How the checkpoint stores its linear weights, from ``quantization_config``.

    ``weight_block_size``: rows and columns of the blocks that share one scale; None where scales are laid otherwise.
    """

    quant_method: str
    weight_block_size: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder-only model. ``notes`` names unused parts of the checkpoint, such as the MTP layer.

    ``mlp_bias``: of every MLP, the shared experts' among them. ``intermediate_size``: 0 where no layer is dense.
    ``blocks``: weights that ranks may hold in the blocks in which the checkpoint has them.
    """

    name: str
    model_type: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    vocab_size: int
    attention: MLA | GQA
    moe: MoE | None
    rms_norm_eps: float
    max_position_embeddings: int
    rope: Rope
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    dtype: str = "bfloat16"
    eos_token_id: tuple[int, ...] = ()
    bos_token_id: int | None = None
    mlp_bias: bool = False
    quantization: CheckpointQuantization | None = None
    blocks: StoredBlocks = NO_BLOCKS
    notes: tuple[str, ...] = ()

    def is_moe_layer(self, layer: int) -> bool:
        """Whether ``layer`` has routed experts (:meth:`MoE.in_layer`); else it has an MLP of ``intermediate_size``."""
        return self.moe is not None and self.moe.in_layer(layer)

    def sliding_window(self, layer: int) -> int | None:
        """The window of ``layer``'s attention in rows; None: the whole context."""
        gqa = self.attention
        return gqa.sliding_window if isinstance(gqa, GQA) and layer in gqa.sliding_layers else None
