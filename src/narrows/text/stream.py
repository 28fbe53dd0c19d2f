"""Generated ids to text, token by token: whole characters, up to a stop string, without special tokens.

A stop string may name special tokens, which the text leaves out. Each of those gets a mark, half of a surrogate pair,
which decoded text never contains. The mark is put into the text that is searched and removed from what is passed on.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Collection, Mapping
from copy import copy

from narrows.errors import ConfigError
from narrows.text.tokenizer import Tokenizer

__all__ = ["GeneratedText", "SpecialStops", "StopStrings", "TextStream"]

_MANY, _KEPT = 16, 8
"""Of more ids than that, whose text ends in U+FFFD, so many are kept: a character has four bytes."""


class TextStream:
    """Incremental detokenisation of one sequence of ids.

    ``push`` costs the decoding of a few tokens at any length of text, since ids with settled text are dropped, except
    one, which is kept before the next tokens so that a tokenizer which drops the text's first space (sentencepiece)
    does not drop theirs. Exact for decoders that spell a token without looking further ahead than the above; all known
    language models' do. (A decoder that strips the END of a text cannot be streamed.)
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        """A stream at the beginning of a text; ``skip_special_tokens`` as in `Tokenizer.decode`."""
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids: list[int] = []  # the settled id in front, then all ids whose text may change
        self._num_given = 0  # characters of the text of `_ids` that have been handed out

    def push(self, token: int) -> str:
        """The text that ``token`` settles; may be empty, and may hold text of earlier tokens."""
        if self._tokenizer.is_silent(token, skip_special_tokens=self._skip):
            return ""  # not even the end of a run of byte tokens
        self._ids.append(token)
        if self._tokenizer.is_byte(token):
            return ""
        text = self._decode(self._ids)
        settled = text.removesuffix("\ufffd")
        piece = self._give(settled)
        if len(settled) == len(text):
            self._forget()
        elif len(self._ids) > _MANY:
            self._forget_front(text)
        return piece

    @property
    def held(self) -> str:
        """The text held back so far, without an incomplete character; later tokens may change it."""
        return self._decode(self._ids)[self._num_given :].rstrip("\ufffd")

    def finish(self) -> str:
        """The text that was held back; call it once, after the last id."""
        return self._give(self._decode(self._ids))

    def _give(self, text: str) -> str:
        piece = text[self._num_given :]
        self._num_given += len(piece)
        return piece

    def _forget(self) -> None:
        """Keep the last id only, if it has its own text: then no leading space is at stake any more."""
        last = self._ids[-1:]
        text = self._decode(last)
        if text:
            self._ids, self._num_given = last, len(text)

    def _forget_front(self, text: str) -> None:
        """Keep the last ids only, unless they begin inside a character: a run of partial characters may be endless."""
        front, back = self._ids[:-_KEPT], self._ids[-_KEPT:]
        before, after = self._decode(front), self._decode(back)
        if after and before + after == text:
            self._ids, self._num_given = back, self._num_given - len(before)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)


class StopStrings:
    """Passes text on until one of ``stops`` is complete in it; the stop string itself is not passed on.

    The one that ends first counts; of those that end together, the one that begins first. So the result does not
    depend on where the text was cut into pieces.

    Raises:
        ConfigError: an empty stop string, which would stop everywhere.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        if any(not stop for stop in stops):
            raise ConfigError("a stop string is empty: it would stop before the first token")
        self.stops = stops
        self.found = False
        self.which = ""
        """The stop string that was found."""
        self.rest = ""
        """The rest of the piece after it."""
        self._held = ""
        self._sorted = sorted(stops)  # those with the same beginning are adjacent
        self._longest = max(map(len, stops), default=0)

    def push(self, text: str) -> str:
        """The text that is now known to come before any stop string."""
        if self.found:
            return ""
        self._held += text
        ends = [(at + len(stop), at) for stop in self.stops if (at := self._held.find(stop)) >= 0]
        if ends:
            self.found = True
            end, at = min(ends)
            out, self.which, self.rest = self._held[:at], self._held[at:end], self._held[end:]
            self._held = ""
            return out
        keep = self._possible_start()
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return out

    def finish(self) -> str:
        """The text held back, at the end of the text."""
        out, self._held = self._held, ""
        return "" if self.found else out

    def _possible_start(self) -> int:
        """Length of the longest end of the text that a stop string could begin with."""
        for length in range(min(self._longest - 1, len(self._held)), 0, -1):
            end = self._held[-length:]
            at = bisect_left(self._sorted, end)
            if at < len(self._sorted) and self._sorted[at].startswith(end):
                return length
        return 0


_MARKS = range(0xD800, 0xE000)
_ANY_MARK = re.compile("[\ud800-\udfff]")


class SpecialStops:
    """``stops`` in the form that is searched, and the marks of the ``special`` tokens (by text) that they name.

    A stop string is found where all its special tokens are such, or all are spelled out by ordinary tokens.

    >>> stops = SpecialStops(("a<end>",), {"<end>": 7})
    >>> len(stops.searched), stops.visible("a" + stops.mark(7)), stops.mark(8), stops.as_given(stops.searched[1])
    (2, 'a', '', 'a<end>')
    """

    def __init__(self, stops: tuple[str, ...], special: Mapping[str, int]) -> None:
        named = sorted((text for text in special if text and any(text in stop for stop in stops)), key=len)
        marks = {text: chr(mark) for text, mark in zip(reversed(named), _MARKS, strict=False)}
        self._by_token = {special[text]: mark for text, mark in marks.items()}
        self._as_given: dict[str, str] = {}
        # One that has half of a pair itself is never found: no text has it.
        plain = {stop: stop for stop in stops if not _ANY_MARK.search(stop)}
        if marks:
            pattern = re.compile("|".join(map(re.escape, marks)))  # the longest text first
            marked = {pattern.sub(lambda found: marks[found.group()], stop): stop for stop in plain}
            self._as_given = {with_marks: stop for with_marks, stop in marked.items() if with_marks != stop}
        self.searched: tuple[str, ...] = (*plain, *self._as_given)

    def mark(self, token: int) -> str:
        """The mark of ``token`` in the searched text; empty for one that no stop string names."""
        return self._by_token.get(token, "")

    def visible(self, text: str) -> str:
        """The text without marks."""
        return _ANY_MARK.sub("", text) if self._by_token else text

    def as_given(self, stop: str) -> str:
        """The client's stop string of one that was found."""
        return self._as_given.get(stop, stop)


class GeneratedText:
    """One text so far: tokens to characters, held back while a stop string may be beginning.

    Args:
        tokenizer: None for a model that has none: then there is no text.
        stop: strings that end the text and are not part of it; a special token's text also matches the token.
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
        """A new text with the same rules, which are shared."""
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
