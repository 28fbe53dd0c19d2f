"""Stop strings with special tokens in them, over a text that leaves special tokens out. Knows text and ids only.

A special token that a stop string names gets a mark, half of a surrogate pair, which no decoded text has. The mark is
put into the text that is searched, and taken out of what is passed on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = ["SpecialStops"]

_MARKS = range(0xD800, 0xE000)
_ANY_MARK = re.compile("[\ud800-\udfff]")


class SpecialStops:
    """``stops`` as they are to be searched for, and the marks of the ``special`` tokens (by text) that they name.

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
        """What stands for ``token`` in the text that is searched; empty for one that no stop string names."""
        return self._by_token.get(token, "")

    def visible(self, text: str) -> str:
        """The text without marks."""
        return _ANY_MARK.sub("", text) if self._by_token else text

    def as_given(self, stop: str) -> str:
        """The client's stop string of one that was found."""
        return self._as_given.get(stop, stop)
