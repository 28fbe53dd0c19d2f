"""Generated ids to the text that a reader sees: up to a stop string, without the token that ends it. Knows text only.

Built on :class:`~narrows.text.stream.TextStream`, :class:`~narrows.text.stop.StopStrings` and
:class:`~narrows.text.special_stops.SpecialStops`.
"""

from __future__ import annotations

from collections.abc import Collection
from copy import copy

from narrows.text.special_stops import SpecialStops
from narrows.text.stop import StopStrings
from narrows.text.stream import TextStream
from narrows.text.tokenizer import Tokenizer

__all__ = ["GeneratedText"]


class GeneratedText:
    """One text so far: tokens to characters, held back while a stop string may be beginning.

    Args:
        tokenizer: None for a model that has none: then there is no text.
        stop: strings that end the text and are not part of it; a special token's text stands for the token too.
        keep_stop: the string that ended the text is part of it.
        end_ids: tokens that end it and are not part of it.
        skip_special_tokens: leave special tokens out of the text, but for ``spelled_out``.

    Raises:
        ConfigError: an empty stop string.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        *,
        stop: tuple[str, ...] = (),
        keep_stop: bool = False,
        end_ids: Collection[int] = frozenset(),
        skip_special_tokens: bool = True,
        spelled_out: Collection[int] = frozenset(),
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._keep_stop = keep_stop
        self._end_ids = end_ids
        self._spelled_out = spelled_out if skip_special_tokens else frozenset()
        left_out = tokenizer.special_tokens if tokenizer is not None and skip_special_tokens else {}
        hidden = {name: token for name, token in left_out.items() if token not in self._spelled_out}
        self._special = SpecialStops(stop, hidden)
        self._begin()

    def another(self) -> GeneratedText:
        """A text of its own by the same rules, which are not made anew."""
        text = copy(self)
        text._begin()
        return text

    def _begin(self) -> None:
        self._stream = self._new_stream()
        self._stop = StopStrings(self._special.searched)
        self._pieces: list[str] = []

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the text."""
        return self._stop.found

    @property
    def stop_string(self) -> str:
        """The stop string that has; empty if none has."""
        return self._special.as_given(self._stop.which)

    @property
    def text(self) -> str:
        """All that has been handed out."""
        return "".join(self._pieces)

    def push(self, token: int) -> str:
        """The text that ``token`` settles; may be empty, and may hold text of earlier tokens."""
        if self._stream is None or token in self._end_ids:
            return ""
        if mark := self._special.mark(token):
            return self._give(mark)
        if token not in self._spelled_out:
            return self._give(self._stream.push(token))
        assert self._tokenizer is not None, "a stream has a tokenizer"
        before = self._stream.finish()
        self._stream = self._new_stream()
        return self._give(before + self._tokenizer.decode([token], skip_special_tokens=False))

    def finish(self) -> str:
        """The text that was held back; call it once, after the last token."""
        rest = self._give(self._stream.finish()) if self._stream is not None else ""
        held = self._special.visible(self._stop.finish())
        self._pieces.append(held)
        return rest + held

    def _give(self, text: str) -> str:
        if self._stop.found:
            return ""
        text = self._special.visible(self._stop.push(text))
        if self._stop.found and self._keep_stop:
            text += self.stop_string
        if text:
            self._pieces.append(text)
        return text

    def _new_stream(self) -> TextStream | None:
        return TextStream(self._tokenizer, skip_special_tokens=self._skip) if self._tokenizer is not None else None
