"""How many bytes of a text one token can stand for at most, so that a text's length alone says that it is too long.

Most tokenizers of language models keep every byte: byte-level BPE, and BPE or Unigram with byte fallback. Some drop or
merge text without limit (an unknown word that becomes one token, white space that is stripped); of those nothing is
said.
"""

from __future__ import annotations

import json
from typing import Any

import tokenizers

from narrows.text.token_bytes import BYTE_OF

__all__ = ["most_bytes_per_token"]

_NFC_SHRINKS = 3
"""Composing characters makes UTF-8 at most so many times shorter: three Hangul jamo of 3 bytes each become one syllable
of 3 bytes."""


def most_bytes_per_token(backend: tokenizers.Tokenizer, *, byte_level: bool) -> int | None:
    """The most UTF-8 bytes of a text that become one token; None if there may be no such number."""
    shrinks = _normalizer_shrinks(_state(backend.normalizer))
    added = backend.get_added_tokens_decoder().values()
    if (
        shrinks is None
        or not _splits_keep_all(_state(backend.pre_tokenizer))
        or not _keeps_unknown(backend, byte_level)
    ):
        return None
    if any(token.lstrip or token.rstrip for token in added):
        return None  # such a token takes in all white space around it
    special = [len(token.content.encode()) for token in added]
    names = backend.get_vocab(with_added_tokens=False)
    return shrinks * max([len(name) if byte_level else len(name.encode()) for name in names] + special, default=1)


def _state(part: Any) -> dict[str, Any] | None:
    return None if part is None else json.loads(part.__getstate__())


def _normalizer_shrinks(state: dict[str, Any] | None) -> int | None:
    """How many times shorter text may become; None: no limit is known."""
    kind = state["type"] if state is not None else ""
    if state is None or kind in ("Prepend", "ByteLevel", "NFD"):
        return 1
    if kind == "NFC":
        return _NFC_SHRINKS
    if kind == "Replace":
        pattern = state["pattern"].get("String", "")
        return 1 if pattern and len(state["content"].encode()) >= len(pattern.encode()) else None
    if kind == "Sequence":
        product = 1
        for part in state["normalizers"]:
            shrinks = _normalizer_shrinks(part)
            if shrinks is None:
                return None
            product *= shrinks
        return product
    return None


def _splits_keep_all(state: dict[str, Any] | None) -> bool:
    """Whether the pre-tokenizer drops nothing between its pieces."""
    if state is None or state["type"] in ("ByteLevel", "Metaspace", "Digits"):
        return True
    if state["type"] in ("Split", "Punctuation"):
        return bool(state["behavior"] != "Removed")
    return state["type"] == "Sequence" and all(_splits_keep_all(part) for part in state["pretokenizers"])


def _keeps_unknown(backend: tokenizers.Tokenizer, byte_level: bool) -> bool:
    """Whether what the vocabulary lacks becomes bytes; else it is dropped, or however much of it is one token."""
    if type(backend.model).__name__ not in ("BPE", "Unigram"):
        return False
    if byte_level:
        return all(backend.token_to_id(character) is not None for character in BYTE_OF)
    return all(backend.token_to_id(f"<0x{byte:02X}>") is not None for byte in range(256)) and bool(
        getattr(backend.model, "byte_fallback", True)
    )
