"""A message on its way: the model's tokens to events, and how it ended. Knows ids and text, not how APIs spell them."""

from __future__ import annotations

from typing import Any

from narrows.api import Update
from narrows.server.asked import Wishes
from narrows.server.errors import invalid
from narrows.server.events import Event, ToolCall, joined
from narrows.server.grammar.compiled import GrammarGuide
from narrows.server.logprobs import chat_logprob
from narrows.server.output import OutputParser
from narrows.server.reading import Reading
from narrows.server.reasoning import ReasoningSplit
from narrows.server.tool_use import Calls
from narrows.server.usage import Count
from narrows.text import GeneratedText

__all__ = ["Turn"]


class Turn:
    """A message that the model writes: its events so far, its tokens, and why it ended."""

    def __init__(
        self,
        reading: Reading,
        wishes: Wishes,
        index: int,
        calls: Calls,
        inside: bool,
        text: GeneratedText,
    ) -> None:
        self.index = index
        self.finish_reason: str | None = None
        self.count = Count()
        self._tokenizer = reading.tokenizer
        self.guide: GrammarGuide | None = None
        self._text = text
        self._parser = OutputParser(
            reasoning=ReasoningSplit(inside=inside) if reading.reasons else None,
            tools=reading.tools.new_parser() if calls.are_read and reading.tools is not None else None,
            max_calls=calls.most,
            names=calls.names,
        )
        self._has_calls = False
        self._wants_logprobs = wishes.logprobs is not None
        self._events: list[Event] = []
        self._logprobs: list[dict[str, Any]] = []

    def take(self, update: Update) -> bool:
        """Take an update in; whether a stop string has ended the text, so that nobody wants more."""
        if self.finish_reason is not None:
            return False  # came before the backend knew
        self.count.cached = max(self.count.cached, update.num_cached_prompt)
        for place, token in enumerate(update.token_ids):
            self.count.generated += 1
            self.count.reasoning += self._parser.is_reasoning
            if self._wants_logprobs:
                self._logprobs.append(chat_logprob(self._tokenizer, token, update.logprobs[place]))
            if text := self._text.push(token):
                self._add(self._parser.push(text))
            if self._text.stopped:
                self._end("stop")
                return not update.finish_reason
        if update.finish_reason:
            self._end(update.finish_reason)
        return False

    def _end(self, reason: str) -> None:
        if self.guide is not None and self.guide.problem:
            raise invalid(f"the text had to end before its form was complete: {self.guide.problem}")
        if text := self._text.finish():
            self._add(self._parser.push(text))
        self._add(self._parser.finish())
        self.finish_reason = "tool_calls" if self._has_calls and reason == "stop" else reason

    def _add(self, events: list[Event]) -> None:
        self._has_calls = self._has_calls or any(isinstance(event, ToolCall) for event in events)
        self._events = joined([*self._events, *events])

    @property
    def stop_string(self) -> str:
        """The stop string that ended the text; empty if none did."""
        return self._text.stop_string

    def take_events(self) -> tuple[list[Event], list[dict[str, Any]]]:
        """What is new since the last time, and the log-probabilities of its tokens."""
        events, self._events = self._events, []
        logprobs, self._logprobs = self._logprobs, []
        return events, logprobs
