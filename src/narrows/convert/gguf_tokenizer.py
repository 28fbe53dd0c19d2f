"""The tokenizer of a GGUF file, and its chat templates, as Hugging Face has them.

Two kinds: byte-level BPE (``tokenizer.ggml.model`` ``gpt2``), cut as `gguf_pre_tokenizers` says, and sentencepiece BPE
(``llama``), in `gguf_sentencepiece`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, processors

from narrows.convert.gguf_config import special_token_ids
from narrows.convert.gguf_header import GgufHeader
from narrows.convert.gguf_pre_tokenizers import PRE_TOKENIZERS
from narrows.convert.gguf_sentencepiece import sentencepiece_tokenizer
from narrows.errors import CheckpointError, ConfigError

__all__ = ["chat_templates", "tokenizer_backend", "write_tokenizer"]

KINDS = ("gpt2", "llama")
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # values of tokenizer.ggml.token_type
ADDED = {UNKNOWN: True, CONTROL: True, USER_DEFINED: False}  # tokens matched whole in a text; whether they are special


def tokenizer_backend(source: GgufHeader) -> Tokenizer:
    """The tokenizer of the file.

    Raises:
        ConfigError: a kind of tokenizer or a pre-tokenizer that is not known here.
        CheckpointError: the vocabulary contradicts itself.
    """
    kind = source.get("tokenizer.ggml.model", str)
    if kind not in KINDS:
        raise ConfigError(
            f"{source.path} has a tokenizer of kind {kind!r}; supported: 'gpt2' (byte-level BPE), 'llama' "
            "(sentencepiece). Convert from the original Hugging Face folder instead"
        )
    tokens, types = _tokens(source), _types(source)
    ids = special_token_ids(source)
    if kind == "llama":
        backend = sentencepiece_tokenizer(source, tokens, types, tokens[ids["unk"]])
    else:
        backend = _byte_level(source, tokens)
    backend.add_tokens(
        [AddedToken(t, normalized=False, special=ADDED[k]) for t, k in zip(tokens, types, strict=True) if k in ADDED]
    )
    _add_ends(backend, source, tokens, ids)
    return backend


def _tokens(source: GgufHeader) -> list[str]:
    """Tokens by id; one without a name gets one, as llama.cpp gives it."""
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(source.need("tokenizer.ggml.tokens", list[str]))]
    if not tokens:
        raise CheckpointError(f"{source.path}: tokenizer.ggml.tokens is empty; fetch a complete file")
    if repeated := len(tokens) - len(set(tokens)):
        raise CheckpointError(f"{source.path}: {repeated} of {len(tokens)} tokens are repeated")
    return tokens


def _types(source: GgufHeader) -> list[int]:
    num_tokens = len(source.need("tokenizer.ggml.tokens", list[str]))
    types: list[int] = source.get("tokenizer.ggml.token_type", list[int]) or [1] * num_tokens
    if len(types) != num_tokens:
        raise CheckpointError(f"{source.path}: {num_tokens} tokens but {len(types)} in tokenizer.ggml.token_type")
    return types


def _byte_level(source: GgufHeader, tokens: list[str]) -> Tokenizer:
    pre = source.get("tokenizer.ggml.pre", str)
    if pre is None:
        raise ConfigError(
            f"{source.path} does not say how its tokenizer cuts text (tokenizer.ggml.pre), as files before May 2024; "
            "convert the model again"
        )
    if pre not in PRE_TOKENIZERS:
        raise ConfigError(
            f"{source.path} cuts text by the pre-tokenizer {pre!r}; supported: {', '.join(map(repr, PRE_TOKENIZERS))}"
        )
    merges = [_merge(source, merge) for merge in source.need("tokenizer.ggml.merges", list[str])]
    try:
        bpe = models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=merges,
            fuse_unk=False,
            byte_fallback=False,
            ignore_merges=PRE_TOKENIZERS[pre].ignore_merges,
        )
    except Exception as error:  # the library raises plain Exception for a merge of unknown tokens
        raise CheckpointError(f"{source.path}: its merges do not fit its {len(tokens)} tokens: {error}") from error
    backend = Tokenizer(bpe)
    PRE_TOKENIZERS[pre].cut(backend)
    backend.decoder = decoders.ByteLevel()
    return backend


def _merge(source: GgufHeader, merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    if not left or not right or " " in right:
        raise CheckpointError(f"{source.path}: a merge is {merge!r}, where two tokens are needed")
    return left, right


def chat_templates(source: GgufHeader) -> dict[str, str]:
    """The file's chat templates by name; ``default`` is the one without a name."""
    source.get("tokenizer.chat_templates", list[str])  # their names, which the keys say too
    key = "tokenizer.chat_template"
    found = {"default": key, **{k.removeprefix(f"{key}."): k for k in source.metadata if k.startswith(f"{key}.")}}
    return {name: source.get(key, str) for name, key in found.items() if key in source.metadata}


def write_tokenizer(source: GgufHeader, folder: Path, *, max_length: int) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` into ``folder``."""
    tokenizer_backend(source).save(str(folder / "tokenizer.json"))
    tokens = source.need("tokenizer.ggml.tokens", list[str])
    config: dict[str, Any] = {
        # Not "GPT2Tokenizer": transformers 5 would put that class's own pre-tokenizer in place of the file's.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        **{f"{role}_token": tokens[token] for role, token in special_token_ids(source).items()},
    }
    if templates := chat_templates(source):
        config["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
        if list(templates) == ["default"]:
            config["chat_template"] = templates["default"]
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _add_ends(backend: Tokenizer, source: GgufHeader, tokens: list[str], ids: dict[str, int]) -> None:
    """A post-processor, when the file asks that bos or eos be added to every text."""
    usual = source.get("tokenizer.ggml.model", str) == "llama" or _adds_bos(source)
    bos_by_default = usual and "bos" in ids
    wanted = {
        "bos": source.get("tokenizer.ggml.add_bos_token", bool, bos_by_default),
        "eos": source.get("tokenizer.ggml.add_eos_token", bool, False),
    }
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


def _adds_bos(source: GgufHeader) -> bool:
    pre = source.get("tokenizer.ggml.pre", str)
    return pre in PRE_TOKENIZERS and PRE_TOKENIZERS[pre].adds_bos
