"""Splits what a model thinks from what it says: ``<think>...</think>`` in front of the answer. Knows text only.

The result does not depend on where the text was cut into pieces.
"""

from __future__ import annotations

from narrows.server.events import Content, Event, Reasoning, Trimmed
from narrows.text.stop import StopStrings

__all__ = ["CLOSE", "OPEN", "PARSERS", "ReasoningSplit", "begins_inside", "reasoning_parser"]

OPEN, CLOSE = "<think>", "</think>"

PARSERS = ("auto", "none", "think")


def reasoning_parser(asked: str, template: str) -> str:
    """``think`` or ``none``; ``auto``: whether the chat template knows the tag."""
    if asked != "auto":
        return asked
    return "think" if CLOSE in template else "none"


def begins_inside(prompt: str) -> bool:
    """Whether the prompt has opened the reasoning already, as some templates do."""
    return prompt.rstrip().endswith(OPEN)


class ReasoningSplit:
    """Text in, reasoning and content out. White space around the reasoning belongs to neither.

    ``inside``: the prompt has opened it, so the text begins with reasoning. Otherwise a text that does not begin with
    the tag is content from the first character on.
    """

    def __init__(self, *, inside: bool) -> None:
        self.inside = inside
        self._begin: list[str] | None = None if inside else []
        self._tag = ""  # of the beginning, what follows its white space
        self._close = StopStrings((CLOSE,))
        self._thought = Trimmed()
        self._after_thought = False

    def push(self, text: str) -> list[Event]:
        """The events that are settled by ``text``."""
        events: list[Event] = []
        if self._begin is not None:
            self._begin.append(text)
            self._tag = (self._tag + text).lstrip()
            if self._tag.startswith(OPEN):
                self.inside, self._begin, text = True, None, self._tag.removeprefix(OPEN)
            elif OPEN.startswith(self._tag):
                return []
            else:
                text, self._begin = "".join(self._begin), None
        if self.inside:
            events.append(Reasoning(self._thought.push(self._close.push(text))))
            if not self._close.found:
                return events
            self.inside, self._after_thought, text = False, True, self._close.rest
        if self._after_thought:
            text = text.lstrip()
            self._after_thought = not text
        return [*events, Content(text)]

    def finish(self) -> list[Event]:
        """What was held back, once no more text comes."""
        if self._begin:
            return [Content("".join(self._begin))]
        return [Reasoning(self._thought.push(self._close.finish()))] if self.inside else []
