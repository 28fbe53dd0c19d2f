"""The tokenizer of a GGUF file as Hugging Face files. Knows tokenizer metadata, not weights.

GGUF stores a vocabulary, merges and a NAME for how text is cut before merging (``tokenizer.ggml.pre``); the regexes
themselves live in llama.cpp. So each name here stands for the pre-tokenizer of the model it was made for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from narrows.convert.gguf_config import special_token_ids
from narrows.convert.gguf_header import GgufHeader
from narrows.errors import CheckpointError, ConfigError

__all__ = ["PRE_TOKENIZERS", "chat_templates", "tokenizer_backend", "write_tokenizer"]

CONTROL, USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)  # digits in threes, else the same


@dataclass(frozen=True, kw_only=True)
class PreTokenizer:
    """What a name under ``tokenizer.ggml.pre`` stands for.

    ``cut`` sets a tokenizer's normalizer and pre-tokenizer; ``ignore_merges``: a word that is a token is that token,
    whatever the merges would make of it; ``adds_bos``: what is done where the file does not say.
    """

    cut: Callable[[Tokenizer], None]
    ignore_merges: bool = False
    adds_bos: bool = False


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
    backend.pre_tokenizer = _split(QWEN2)


def _cut_llama3(backend: Tokenizer) -> None:
    backend.pre_tokenizer = _split(LLAMA3)


def _split(regex: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


PRE_TOKENIZERS: Mapping[str, PreTokenizer] = MappingProxyType(
    {
        "smollm": PreTokenizer(cut=_cut_smollm),
        "qwen2": PreTokenizer(cut=_cut_qwen2),
        "llama-bpe": PreTokenizer(cut=_cut_llama3, ignore_merges=True, adds_bos=True),
    }
)
"""The known values of ``tokenizer.ggml.pre``."""


def tokenizer_backend(source: GgufHeader) -> Tokenizer:
    """The byte-level BPE tokenizer of the file.

    Raises `ConfigError` for a kind of tokenizer or a pre-tokenizer that is not known here, and `CheckpointError` when
    the vocabulary contradicts itself.
    """
    kind, pre = source.get("tokenizer.ggml.model", str), source.get("tokenizer.ggml.pre", str)
    if kind != "gpt2":
        raise ConfigError(
            f"{source.path} has a tokenizer of kind {kind!r}; supported: 'gpt2' (byte-level BPE). "
            "Convert from the original Hugging Face folder instead"
        )
    if pre not in PRE_TOKENIZERS:
        raise ConfigError(
            f"{source.path} cuts text by the pre-tokenizer {pre!r}; supported: {', '.join(map(repr, PRE_TOKENIZERS))}"
        )
    tokens = source.need("tokenizer.ggml.tokens", list[str])
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise CheckpointError(f"{source.path}: {len(tokens) - len(vocab)} of {len(tokens)} tokens are repeated")
    merges = [tuple(merge.split(" ")) for merge in source.need("tokenizer.ggml.merges", list[str])]
    if wrong := next((merge for merge in merges if len(merge) != 2), None):
        raise CheckpointError(f"{source.path}: a merge is {' '.join(wrong)!r}, where two tokens are needed")
    try:
        bpe = models.BPE(
            vocab=vocab,
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
    types = source.get("tokenizer.ggml.token_type", list[int]) or [1] * len(tokens)
    if len(types) != len(tokens):
        raise CheckpointError(f"{source.path}: {len(tokens)} tokens but {len(types)} in tokenizer.ggml.token_type")
    kinds = {CONTROL: True, USER_DEFINED: False}
    backend.add_tokens(
        [AddedToken(t, normalized=False, special=kinds[k]) for t, k in zip(tokens, types, strict=True) if k in kinds]
    )
    _add_ends(backend, source, tokens)
    return backend


def chat_templates(source: GgufHeader) -> dict[str, str]:
    """The file's chat templates by name; ``default`` is the one without a name."""
    keys = {name: f"tokenizer.chat_template.{name}" for name in source.get("tokenizer.chat_templates", list[str], ())}
    found = {name: source.get(key, str) for name, key in {"default": "tokenizer.chat_template", **keys}.items()}
    return {name: template for name, template in found.items() if template is not None}


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


def _add_ends(backend: Tokenizer, source: GgufHeader, tokens: list[str]) -> None:
    """A post-processor, when the file asks that bos or eos be added to every text."""
    ids = special_token_ids(source)
    wanted = {role: source.get(f"tokenizer.ggml.add_{role}_token", bool, False) for role in ("bos", "eos")}
    if source.get("tokenizer.ggml.add_bos_token", bool) is None:
        wanted["bos"] = PRE_TOKENIZERS[source.need("tokenizer.ggml.pre", str)].adds_bos and "bos" in ids
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
