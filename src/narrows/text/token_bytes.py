"""The bytes of a token, and the most bytes of any token.

Tokenizers spell bytes in two ways: byte-level BPE writes each byte as a printable character (GPT-2's table), and byte
fallback has tokens named ``<0xE4>``. Most tokenizers keep every byte of a text, so a text's length alone can show that
it is too long. Some drop or merge text without limit (an unknown word as one token, stripped white space); for those
there is no bound.

>>> BYTE_OF["A"], BYTE_OF["Ġ"], BYTE_OF["Ċ"], len(BYTE_OF)
(65, 32, 10, 256)
"""

from __future__ import annotations

import json
from typing import Any

import tokenizers

__all__ = ["BYTE_OF", "is_byte_level", "most_bytes_per_token", "token_bytes"]


def _table() -> dict[str, int]:
    """Printable bytes of Latin-1 are themselves; the others are the characters from U+0100 on, in their order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


BYTE_OF = _table()
"""The byte of each character of a byte-level token (Radford et al., 2019)."""


def is_byte_level(backend: tokenizers.Tokenizer) -> bool:
    """Whether the tokenizer's tokens are spelled in that table."""
    return backend.decoder is not None and backend.decoder.decode(["Ġ"]) == " "


def token_bytes(name: str, text: str, *, byte_level: bool, is_byte: bool) -> bytes:
    """Bytes of a token by its ``name`` in the vocabulary; ``text`` is its decoded text, the fallback.

    >>> token_bytes("Ġä¸", "?", byte_level=True, is_byte=False)
    b' \\xe4\\xb8'
    >>> token_bytes("<0xE4>", "?", byte_level=False, is_byte=True)
    b'\\xe4'
    """
    if is_byte:
        return bytes([int(name[3:5], 16)])
    if byte_level and all(character in BYTE_OF for character in name):
        return bytes(BYTE_OF[character] for character in name)
    return text.encode()


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
    """Whether text outside the vocabulary becomes bytes; else it is dropped, or becomes one token of any length."""
    if type(backend.model).__name__ not in ("BPE", "Unigram"):
        return False
    if byte_level:
        return all(backend.token_to_id(character) is not None for character in BYTE_OF)
    return all(backend.token_to_id(f"<0x{byte:02X}>") is not None for byte in range(256)) and bool(
        getattr(backend.model, "byte_fallback", True)
    )
