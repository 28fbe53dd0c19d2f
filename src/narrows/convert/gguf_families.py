"""The architectures of llama.cpp that narrows reads from GGUF, and how they differ.

``general.architecture`` is llama.cpp's word: ``llama`` covers Mistral too, ``deepseek2`` every model with DeepSeek's
attention, V2 and V3 alike. Which of the two a file holds is decided by how its experts are routed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from narrows.convert.gguf_fields import Fields
from narrows.convert.gguf_header import GgufHeader
from narrows.errors import ConfigError

__all__ = ["GGUF_FAMILIES", "SIGMOID", "SOFTMAX", "Family", "gating", "gguf_family"]

SOFTMAX, SIGMOID = 1, 2  # values of expert_gating_func


@dataclass(frozen=True, kw_only=True)
class Family:
    """An architecture of GGUF in Hugging Face's words.

    ``rows_reordered``: llama.cpp's converter reorders the rows of q and k. ``biases``: projections that always have
    one. ``qk_norm``: queries and keys are normed by head. ``experts``: layers may hold routed experts. ``latent``:
    DeepSeek's attention.
    """

    hf_class: str
    model_type: str
    rows_reordered: bool = False
    biases: tuple[str, ...] = ()
    qk_norm: bool = False
    experts: bool = False
    latent: bool = False


GGUF_FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": Family(hf_class="LlamaForCausalLM", model_type="llama", rows_reordered=True),
        "qwen2": Family(hf_class="Qwen2ForCausalLM", model_type="qwen2", biases=("q", "k", "v")),
        "qwen3": Family(hf_class="Qwen3ForCausalLM", model_type="qwen3", qk_norm=True),
        "qwen3moe": Family(hf_class="Qwen3MoeForCausalLM", model_type="qwen3_moe", qk_norm=True, experts=True),
        "deepseek2": Family(hf_class="DeepseekV2ForCausalLM", model_type="deepseek_v2", experts=True, latent=True),
    }
)
"""The architectures that narrows reads from GGUF."""

DEEPSEEK_V3 = Family(hf_class="DeepseekV3ForCausalLM", model_type="deepseek_v3", experts=True, latent=True)
GLM_LITE_VOCABULARY = 154880


def gguf_family(file: GgufHeader) -> Family:
    """The architecture; `ConfigError` names those that are known."""
    name = file.need("general.architecture", str)
    if name not in GGUF_FAMILIES:
        raise ConfigError(
            f"{file.path} is of the architecture {name!r}; supported: {', '.join(map(repr, GGUF_FAMILIES))}"
        )
    if name == "deepseek2" and _routes(Fields(file)) and gating(Fields(file)) == SIGMOID:
        return DEEPSEEK_V3
    return GGUF_FAMILIES[name]


def _routes(fields: Fields) -> bool:
    """Whether any layer has routed experts."""
    return fields.integer("leading_dense_block_count", 0) < fields.count("block_count") and fields.has("expert_count")


def gating(fields: Fields) -> int:
    """How a deepseek2 file's experts are scored, `SOFTMAX` or `SIGMOID`.

    Files older than the key hold DeepSeek V2 (softmax), but for GLM-4.7-Flash, which llama.cpp knows by its sizes.
    """
    given = fields.integer("expert_gating_func", 0)
    if given == 0:
        vocab = fields.integer("vocab_size", len(fields.file.get("tokenizer.ggml.tokens", list[str], ())))
        layers = fields.integer("block_count") - fields.integer("nextn_predict_layers", 0)
        return SIGMOID if vocab == GLM_LITE_VOCABULARY and layers in (47, 48) else SOFTMAX
    if given not in (SOFTMAX, SIGMOID):
        raise fields.refuse("expert_gating_func", f"supported: {SOFTMAX} (softmax) and {SIGMOID} (sigmoid)")
    return given
