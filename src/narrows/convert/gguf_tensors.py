"""Which tensors of a GGUF file make which of Hugging Face's, and how their rows lie. Names and shapes; pure Python.

Four ways in which they differ:

- llama.cpp rotates pairs of NEIGHBOURING rows of q and k, Hugging Face's Llama the two HALVES of a head, so llama.cpp's
  converter reorders these rows of the llama architecture (`Target.heads`). Qwen rotates halves in both, DeepSeek pairs
  in both: nothing is reordered.
- All experts of a layer are one tensor ``[experts, rows, columns]``, and gate and up may be one (`Target.first_row`).
- DeepSeek's ``kv_b_proj`` is cut into keys and values by head, the keys' part transposed (`Latent`). Older files hold
  it whole.
- A bias that only some projections have is zero elsewhere (``source`` None).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from narrows.convert.gguf_families import Family, gguf_family
from narrows.convert.gguf_header import GgufHeader
from narrows.convert.gguf_part import shown
from narrows.convert.gguf_rope import ROPE_FACTORS
from narrows.errors import CheckpointError, ConfigError

__all__ = ["Latent", "Target", "gguf_targets"]

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Latent:
    """``kv_b_proj`` in two tensors: ``keys`` is ``[heads, rank, nope]``, ``values`` is ``[heads, v, rank]``."""

    keys: str
    values: str
    heads: int
    nope: int
    v: int


@dataclass(frozen=True, kw_only=True)
class Target:
    """One of Hugging Face's tensors, or one per expert (``{expert}`` in its name), and where its values are.

    ``shape``: of one tensor. ``source``: the GGUF tensor's name, a `Latent`, or None for zeros. ``heads``: of a tensor
    with reordered rows. ``first_row``, ``stride``: expert e begins at row ``first_row + e * stride`` of the source.
    """

    name: str
    shape: Shape
    source: str | Latent | None
    heads: int | None = None
    experts: int | None = None
    first_row: int = 0
    stride: int = 0


def gguf_targets(file: GgufHeader, config: Mapping[str, Any]) -> dict[str, Target]:
    """Every tensor of the model with this ``config`` (`gguf_config`) by Hugging Face's name, checked against the file:
    none missing, none unknown, shapes right.

    Raises:
        CheckpointError: a tensor is missing, or has another shape than the metadata implies.
        ConfigError: an architecture that is not known here, or a tensor that its models do not have.
    """
    family = gguf_family(file)
    names = _Names(file, family, config)
    targets = {target.name: target for target in names.targets()}
    if names.missing:
        missing = names.missing
        raise CheckpointError(f"{file.path} lacks {len(missing)} of {len(names.used)} tensors, first {missing[0]}")
    layers = config["num_hidden_layers"]
    allowed = names.used.keys() | ({ROPE_FACTORS} if family.rows_reordered else set())
    unknown = [name for name in file.tensors if name not in allowed and not _is_passed_by(name, layers, family)]
    if unknown:
        raise ConfigError(
            f"{file.path} has {len(unknown)} tensors that a {family.hf_class} does not, first {shown(unknown[0])}; "
            "narrows would ignore what they do to the model, so it refuses the file"
        )
    for name, shape in names.used.items():
        found = file.tensors[name].shape
        if (prod(found[:-1]), found[-1:]) != (prod(shape[:-1]), shape[-1:]):  # some files flatten the leading ones
            raise CheckpointError(f"{file.path}: {name} is {found}, but the metadata makes it {shape}")
    return targets


def _is_passed_by(name: str, layers: int, family: Family) -> bool:
    """Tensors that change no number: layers that predict further tokens, rotary tables of old files, and kv_b beside
    its two parts."""
    part = name.split(".")
    if part[0] != "blk" or len(part) < 3:
        return False
    beyond = family.latent and part[1].isdecimal() and int(part[1]) >= layers
    return beyond or part[2] == "attn_rot_embd" or (family.latent and part[2] == "attn_kv_b")


class _Names:
    """Builds the targets of one file; notes the GGUF tensors they use, with their shapes, and those it lacks."""

    def __init__(self, file: GgufHeader, family: Family, config: Mapping[str, Any]) -> None:
        self.file, self.family, self.config = file, family, config
        self.used: dict[str, Shape] = {}
        self.missing: list[str] = []

    def take(self, name: str, shape: Shape) -> str:
        self.used[name] = shape
        if name not in self.file.tensors:
            self.missing.append(name)
        return name

    def plain(self, name: str, shape: Shape, source: str, heads: int | None = None) -> Target:
        return Target(name=name, shape=shape, source=self.take(source, shape), heads=heads)

    def bias(self, name: str, size: int, source: str, heads: int | None, *, needed: bool) -> Target:
        if not needed and source not in self.file.tensors:
            return Target(name=name, shape=(size,), source=None)
        return self.plain(name, (size,), source, heads)

    def targets(self) -> Iterator[Target]:
        config = self.config
        vocab, hidden = config["vocab_size"], config["hidden_size"]
        yield self.plain("model.embed_tokens.weight", (vocab, hidden), "token_embd.weight")
        for layer in range(config["num_hidden_layers"]):
            prefix, block = f"model.layers.{layer}.", f"blk.{layer}."
            yield self.plain(prefix + "input_layernorm.weight", (hidden,), block + "attn_norm.weight")
            attention = self.latent if self.family.latent else self.grouped
            yield from attention(prefix + "self_attn.", block)
            yield self.plain(prefix + "post_attention_layernorm.weight", (hidden,), block + "ffn_norm.weight")
            yield from self.experts(prefix, block) if self.is_routed(layer) else self.dense(prefix + "mlp.", block)
        yield self.plain("model.norm.weight", (hidden,), "output_norm.weight")
        if not config["tie_word_embeddings"]:
            yield self.plain("lm_head.weight", (vocab, hidden), "output.weight")

    def is_routed(self, layer: int) -> bool:
        experts = self.config.get("num_experts") or self.config.get("n_routed_experts")
        return bool(experts) and layer >= self.config.get("first_k_dense_replace", 0)

    def grouped(self, prefix: str, block: str) -> Iterator[Target]:
        config, hidden, family = self.config, self.config["hidden_size"], self.family
        heads, kv_heads, dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
        q, kv = heads * dim, kv_heads * dim
        for key, name, shape, reordered in (
            ("q", "q_proj", (q, hidden), heads),
            ("k", "k_proj", (kv, hidden), kv_heads),
            ("v", "v_proj", (kv, hidden), None),
            ("output", "o_proj", (hidden, q), None),
        ):
            order = reordered if family.rows_reordered else None
            yield self.plain(f"{prefix}{name}.weight", shape, f"{block}attn_{key}.weight", order)
            if key in family.biases or config.get("attention_bias"):
                source = f"{block}attn_{key}.bias"
                yield self.bias(f"{prefix}{name}.bias", shape[0], source, order, needed=key in family.biases)
        if family.qk_norm:
            for key in "qk":
                yield self.plain(f"{prefix}{key}_norm.weight", (dim,), f"{block}attn_{key}_norm.weight")

    def latent(self, prefix: str, block: str) -> Iterator[Target]:
        config, hidden = self.config, self.config["hidden_size"]
        heads, q_rank, rank = config["num_attention_heads"], config["q_lora_rank"], config["kv_lora_rank"]
        nope, rope, v = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
        q = heads * (nope + rope)
        if q_rank is None:
            yield self.plain(prefix + "q_proj.weight", (q, hidden), block + "attn_q.weight")
        else:
            yield self.plain(prefix + "q_a_proj.weight", (q_rank, hidden), block + "attn_q_a.weight")
            yield self.plain(prefix + "q_a_layernorm.weight", (q_rank,), block + "attn_q_a_norm.weight")
            yield self.plain(prefix + "q_b_proj.weight", (q, q_rank), block + "attn_q_b.weight")
        source = block + "attn_kv_a_mqa.weight"
        yield self.plain(prefix + "kv_a_proj_with_mqa.weight", (rank + rope, hidden), source)
        yield self.plain(prefix + "kv_a_layernorm.weight", (rank,), block + "attn_kv_a_norm.weight")
        yield self.kv_b(prefix + "kv_b_proj.weight", block, heads, rank, nope, v)
        yield self.plain(prefix + "o_proj.weight", (hidden, heads * v), block + "attn_output.weight")

    def kv_b(self, name: str, block: str, heads: int, rank: int, nope: int, v: int) -> Target:
        shape, whole = (heads * (nope + v), rank), block + "attn_kv_b.weight"
        keys, values = block + "attn_k_b.weight", block + "attn_v_b.weight"
        if whole in self.file.tensors and not {keys, values} <= self.file.tensors.keys():
            return self.plain(name, shape, whole)
        self.take(keys, (heads, rank, nope))
        self.take(values, (heads, v, rank))
        return Target(name=name, shape=shape, source=Latent(keys=keys, values=values, heads=heads, nope=nope, v=v))

    def dense(self, prefix: str, block: str) -> Iterator[Target]:
        yield from self.gated(prefix, block, "", self.config["intermediate_size"], bias=self.config.get("mlp_bias"))

    def gated(self, prefix: str, block: str, suffix: str, inner: int, *, bias: bool | None = False) -> Iterator[Target]:
        hidden = self.config["hidden_size"]
        for key, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
            source = f"{block}ffn_{key}{suffix}"
            yield self.plain(f"{prefix}{key}_proj.weight", shape, f"{source}.weight")
            if bias:
                yield self.bias(f"{prefix}{key}_proj.bias", shape[0], f"{source}.bias", None, needed=False)

    def experts(self, layer: str, block: str) -> Iterator[Target]:
        config, hidden, prefix = self.config, self.config["hidden_size"], layer + "mlp."
        count, inner = config.get("num_experts") or config["n_routed_experts"], config["moe_intermediate_size"]
        yield self.plain(prefix + "gate.weight", (count, hidden), block + "ffn_gate_inp.weight")
        if config.get("topk_method") == "noaux_tc":
            source = block + "exp_probs_b.bias"
            yield self.plain(prefix + "gate.e_score_correction_bias", (count,), source)
        fused = block + "ffn_gate_up_exps.weight"
        has_fused = fused in self.file.tensors
        for key, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
            source, stride, first = f"{block}ffn_{key}_exps.weight", shape[0], 0
            if has_fused and key != "down":
                source, stride, first = fused, 2 * inner, inner if key == "up" else 0
            yield Target(
                name=f"{prefix}experts.{{expert}}.{key}_proj.weight",
                shape=shape,
                source=self.take(source, (count, stride, shape[1])),
                experts=count,
                first_row=first,
                stride=stride,
            )
        if config.get("n_shared_experts"):
            shared = config["n_shared_experts"] * inner
            yield from self.gated(prefix + "shared_experts.", block, "_shexp", shared)
