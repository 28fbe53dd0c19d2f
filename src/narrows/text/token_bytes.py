"""The bytes that one token stands for, which need not be whole characters. Knows how tokenizers spell bytes.

Two ways are in use: byte-level BPE writes each byte as a printable character (GPT-2's table, below), and byte fallback
has tokens named ``<0xE4>``.

>>> BYTE_OF["A"], BYTE_OF["Ġ"], BYTE_OF["Ċ"], len(BYTE_OF)
(65, 32, 10, 256)
"""

from __future__ import annotations

import tokenizers

__all__ = ["BYTE_OF", "is_byte_level", "token_bytes"]


def _table() -> dict[str, int]:
    """Printable bytes of Latin-1 stand for themselves; the others are the characters from U+0100 on, in their order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


BYTE_OF = _table()
"""The byte of each character of a byte-level token (Radford et al., 2019)."""


def is_byte_level(backend: tokenizers.Tokenizer) -> bool:
    """Whether the tokenizer's tokens are spelled in that table."""
    return backend.decoder is not None and backend.decoder.decode(["Ġ"]) == " "


def token_bytes(name: str, text: str, *, byte_level: bool, is_byte: bool) -> bytes:
    """Bytes of a token by its ``name`` in the vocabulary; ``text`` is what it decodes to, where that is all there is.

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
