"""Where each token of a text begins in it, in characters."""

from __future__ import annotations

from collections.abc import Collection

from narrows.text.stream import TextStream
from narrows.text.tokenizer import Tokenizer

__all__ = ["TokenOffsets"]

_FAR = 64
"""Most characters of a client's text that the tokenizer's normalizer may drop between two tokens."""


class TokenOffsets:
    """Offsets of tokens in their order, as `text_offset` of OpenAI and vLLM; they never fall.

    A token whose text is whole characters begins at its offset. One that is not in the text (a special token that is
    left out, part of a character) has the offset that it would have.

    Args:
        tokenizer: None for a model that has none: then there is no text.
        start: characters before the first token.
        skip_special_tokens: the text leaves special tokens out.
        left_out: further tokens that the text leaves out.
        text: what was encoded, if the text is not what the ids decode to; special tokens that it does not spell out
            are taken as left out.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        *,
        start: int = 0,
        skip_special_tokens: bool = True,
        left_out: Collection[int] = frozenset(),
        text: str | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens and text is None
        self._stream = TextStream(tokenizer, skip_special_tokens=self._skip) if tokenizer is not None else None
        self._left_out = left_out
        self._text = text
        self._at = start
        self._last = start

    @property
    def here(self) -> int:
        """The offset of the next token, which is not in the text."""
        held = self._stream.held if self._stream is not None else ""
        self._last = max(self._last, self._at + len(held))
        return self._last

    def push(self, token: int) -> int:
        """The offset of the next token, ``token``."""
        if self._stream is not None and self._tokenizer is not None:
            before = self._at + len(self._stream.held)
            offset = before
            if not self._is_left_out(self._tokenizer, token, before):
                piece = self._stream.push(token)
                self._go_past(piece)
                own = _whole(self._tokenizer.bytes_of(token))
                offset = self._at - len(own) if own and piece.endswith(own) else before
            self._last = max(self._last, offset)
        return self._last

    def _is_left_out(self, tokenizer: Tokenizer, token: int, before: int) -> bool:
        if token in self._left_out or tokenizer.is_silent(token, skip_special_tokens=self._skip):
            return True
        if self._text is None or not tokenizer.is_special(token):
            return False
        name = _whole(tokenizer.bytes_of(token))
        return not self._text.startswith(name, before)

    def _go_past(self, piece: str) -> None:
        if self._text is None or self._text.startswith(piece, self._at):
            self._at += len(piece)
            return
        found = self._text.find(piece, self._at, self._at + len(piece) + _FAR)
        begin = found if found >= 0 else self._at
        self._at = min(begin + len(piece), len(self._text))


def _whole(data: bytes) -> str:
    """The text of bytes that are whole characters; empty for others."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return ""
