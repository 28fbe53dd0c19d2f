"""The tokenizer of a GGUF file as Hugging Face files. Knows tokenizer metadata, not weights.

GGUF stores a vocabulary, merges and a NAME for how text is cut before merging (``tokenizer.ggml.pre``); the regexes
themselves live in llama.cpp. So each name here stands for the pre-tokenizer of the model it was made for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from narrows.convert.gguf_file import GgufFile
from narrows.errors import CheckpointError, ConfigError

__all__ = ["PRE_TOKENIZERS", "special_token_ids", "tokenizer_backend", "write_tokenizer"]

CONTROL, USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)

ROLES = MappingProxyType({"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"})  # ours -> GGUF's word


def _cut_smollm(backend: Tokenizer) -> None:
    """SmolLM and SmolLM2: each digit alone, then GPT-2's words."""
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def _cut_qwen2(backend: Tokenizer) -> None:
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


PRE_TOKENIZERS: Mapping[str, Callable[[Tokenizer], None]] = MappingProxyType(
    {"smollm": _cut_smollm, "qwen2": _cut_qwen2}
)
"""For each known ``tokenizer.ggml.pre``, what makes a tokenizer cut text that way."""


def special_token_ids(source: GgufFile) -> dict[str, int]:
    """Ids of the roles that the file names, of ``bos``, ``eos``, ``unk`` and ``pad``."""
    found = {role: source.get(f"tokenizer.ggml.{word}_token_id") for role, word in ROLES.items()}
    num_tokens = len(source.need("tokenizer.ggml.tokens"))
    for role, token in found.items():
        if token is not None and not 0 <= token < num_tokens:
            raise CheckpointError(f"{source.path}: {role} token id {token} is outside the {num_tokens} tokens")
    return {role: token for role, token in found.items() if token is not None}


def tokenizer_backend(source: GgufFile) -> Tokenizer:
    """The byte-level BPE tokenizer of the file.

    Raises `ConfigError` for a kind of tokenizer or a pre-tokenizer that is not known here, and `CheckpointError` when
    the vocabulary contradicts itself.
    """
    kind, pre = source.get("tokenizer.ggml.model"), source.get("tokenizer.ggml.pre")
    if kind != "gpt2":
        raise ConfigError(
            f"{source.path} has a tokenizer of kind {kind!r}; supported: 'gpt2' (byte-level BPE). "
            "Convert from the original Hugging Face folder instead"
        )
    if pre not in PRE_TOKENIZERS:
        raise ConfigError(
            f"{source.path} cuts text by the pre-tokenizer {pre!r}; supported: {', '.join(map(repr, PRE_TOKENIZERS))}"
        )
    tokens = source.need("tokenizer.ggml.tokens")
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise CheckpointError(f"{source.path}: {len(tokens) - len(vocab)} of {len(tokens)} tokens are repeated")
    merges = [tuple(merge.split(" ")) for merge in source.need("tokenizer.ggml.merges")]
    try:
        backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, fuse_unk=False, byte_fallback=False))
    except Exception as error:  # the library raises plain Exception for a merge of unknown tokens
        raise CheckpointError(f"{source.path}: its merges do not fit its {len(tokens)} tokens: {error}") from error
    PRE_TOKENIZERS[pre](backend)
    backend.decoder = decoders.ByteLevel()
    types = source.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    kinds = {CONTROL: True, USER_DEFINED: False}
    backend.add_tokens(
        [AddedToken(t, normalized=False, special=kinds[k]) for t, k in zip(tokens, types, strict=True) if k in kinds]
    )
    _add_ends(backend, source, tokens)
    return backend


def write_tokenizer(source: GgufFile, folder: Path, *, max_length: int) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` into ``folder``."""
    tokenizer_backend(source).save(str(folder / "tokenizer.json"))
    tokens = source.need("tokenizer.ggml.tokens")
    config: dict[str, Any] = {
        # Not "GPT2Tokenizer": transformers 5 would put that class's own pre-tokenizer in place of the file's.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        **{f"{role}_token": tokens[token] for role, token in special_token_ids(source).items()},
    }
    if (template := source.get("tokenizer.chat_template")) is not None:
        config["chat_template"] = template
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _add_ends(backend: Tokenizer, source: GgufFile, tokens: list[str]) -> None:
    """A post-processor, when the file asks that bos or eos be added to every text."""
    ids = special_token_ids(source)
    wanted = {role: bool(source.get(f"tokenizer.ggml.add_{role}_token", False)) for role in ("bos", "eos")}
    for role, added in wanted.items():
        if added and role not in ids:
            raise CheckpointError(f"{source.path} asks to add a {role} token to every text but names none")
    if any(wanted.values()):
        bos, eos = ([tokens[ids[role]]] if wanted[role] else [] for role in ("bos", "eos"))
        backend.post_processor = processors.TemplateProcessing(
            single=[*bos, "$A", *eos],
            pair=[*bos, "$A", *eos, *(f"{t}:1" for t in bos), "$B:1", *(f"{t}:1" for t in eos)],
            special_tokens=[(tokens[ids[role]], ids[role]) for role, added in wanted.items() if added],
        )
