"""The events of an answer: content, reasoning and tool calls, in any format of the model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

__all__ = ["Arguments", "Content", "Event", "Reasoning", "ToolCall", "Trimmed", "joined"]


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the reader."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A text of reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call begins; ``index`` counts the calls of one answer from 0."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """More of a call's arguments, as the model wrote them; together they are to be JSON."""

    index: int
    text: str


Event = Content | Reasoning | ToolCall | Arguments


def joined(events: Iterable[Event]) -> list[Event]:
    """Texts that follow each other and belong to the same as one, empty ones left out: the same however text was cut.

    >>> joined([Content("a"), Content("b"), Arguments(0, ""), Reasoning("c")])
    [Content(text='ab'), Reasoning(text='c')]
    """
    out: list[Event] = []
    for event in events:
        if isinstance(event, ToolCall):
            out.append(event)
            continue
        if not event.text:
            continue
        last = out[-1] if out else None
        if last is not None and not isinstance(last, ToolCall) and replace(last, text=event.text) == event:
            out[-1] = replace(last, text=last.text + event.text)
        else:
            out.append(event)
    return out


class Trimmed:
    """A text without white space at its beginning; that at its end is held back until it is known not to be the end.

    >>> text = Trimmed()
    >>> text.push(" \\n a "), text.push(" b\\n"), text.held
    ('a', '  b', '\\n')
    """

    def __init__(self, *, begun: bool = False) -> None:
        """``begun``: white space at the beginning stays."""
        self.begun = begun
        self._held: list[str] = []

    @property
    def held(self) -> str:
        """The white space that may be its end."""
        return "".join(self._held)

    def push(self, text: str) -> str:
        """The part that certainly belongs to the text."""
        if not self.begun:
            text = text.lstrip()
            self.begun = bool(text)
        settled = text.rstrip()
        if not settled:
            self._held.append(text)
            return ""
        out = self.held + settled
        self._held = [text[len(settled) :]]
        return out
