"""Generated text to what an answer is made of: reasoning first, then content and tool calls. Knows text only."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from narrows.server.events import Arguments, Content, Event, ToolCall, joined
from narrows.server.reasoning import ReasoningSplit
from narrows.server.tools.formats import ToolParser

__all__ = ["OutputParser"]


class OutputParser:
    """The parsers that a request needs, one after the other; without any, all text is content.

    ``max_calls``: calls after so many are left out; ``names``: so are those of other functions; None: all are kept.
    """

    def __init__(
        self,
        *,
        reasoning: ReasoningSplit | None = None,
        tools: ToolParser | None = None,
        max_calls: int | None = None,
        names: Collection[str] | None = None,
    ) -> None:
        self._reasoning = reasoning
        self._tools = tools
        self._max_calls = max_calls
        self._names = names
        self._num_calls = 0
        self._keeps = True
        """Whether the call that is being read is handed out."""

    @property
    def is_reasoning(self) -> bool:
        """Whether the next token is one of the reasoning."""
        return self._reasoning is not None and self._reasoning.inside

    def push(self, text: str) -> list[Event]:
        """The events that are settled by ``text``."""
        return self._through_tools(self._reasoning.push(text) if self._reasoning else [Content(text)])

    def finish(self) -> list[Event]:
        """What was held back, once no more text comes."""
        events = self._through_tools(self._reasoning.finish() if self._reasoning else [])
        return joined([*events, *self._kept(self._tools.finish() if self._tools else [])])

    def _through_tools(self, events: list[Event]) -> list[Event]:
        if self._tools is None:
            return joined(events)
        out: list[Event] = []
        for event in events:
            out.extend(self._kept(self._tools.push(event.text)) if isinstance(event, Content) else [event])
        return joined(out)

    def _kept(self, events: list[Event]) -> list[Event]:
        """Without the calls that are left out; those that stay are counted anew."""
        out: list[Event] = []
        for event in events:
            if isinstance(event, ToolCall):
                wanted = self._names is None or event.name in self._names
                self._keeps = wanted and (self._max_calls is None or self._num_calls < self._max_calls)
                self._num_calls += self._keeps
            if isinstance(event, ToolCall | Arguments):
                if self._keeps:
                    out.append(replace(event, index=self._num_calls - 1))
            else:
                out.append(event)
        return out
