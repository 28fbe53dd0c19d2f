"""Generated tokens to the parts of answers: events of a message, log-probabilities and token counts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from narrows.api import Update
from narrows.sched.sampling import Logprobs
from narrows.server.http.errors import invalid
from narrows.server.parsers.events import Event, ToolCall, joined
from narrows.server.parsers.formats import Calls, OutputParser, ReasoningSplit
from narrows.server.request import AnswerOptions, RequestReader
from narrows.server.structured_output.guide import GrammarGuide
from narrows.text import GeneratedText, Tokenizer

__all__ = ["ChatOutput", "Count", "LogprobColumns", "chat_logprob", "usage"]


class ChatOutput:
    """One chat message that is being generated: its events so far, its tokens, and why it ended."""

    def __init__(
        self,
        reader: RequestReader,
        options: AnswerOptions,
        index: int,
        calls: Calls,
        inside: bool,
        text: GeneratedText,
    ) -> None:
        self.index = index
        self.finish_reason: str | None = None
        self.count = Count()
        self._tokenizer = reader.tokenizer
        self.guide: GrammarGuide | None = None
        self._text = text
        self._parser = OutputParser(
            reasoning=ReasoningSplit(inside=inside) if reader.reasons else None,
            tools=reader.tools.new_parser() if calls.are_read and reader.tools is not None else None,
            max_calls=calls.most,
            names=calls.names,
        )
        self._has_calls = False
        self._wants_logprobs = options.logprobs is not None
        self._events: list[Event] = []
        self._logprobs: list[dict[str, Any]] = []

    def take(self, update: Update) -> bool:
        """Take an update in; whether a stop string has completed the text."""
        if self.finish_reason is not None:
            return False  # came before the backend knew
        self.count.cached = max(self.count.cached, update.num_cached_prompt)
        for index, token in enumerate(update.token_ids):
            self.count.generated += 1
            self.count.reasoning += self._parser.is_reasoning
            if self._wants_logprobs:
                self._logprobs.append(chat_logprob(self._tokenizer, token, update.logprobs[index]))
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
            raise invalid(f"the text ended before its required format was complete: {self.guide.problem}")
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
        """The new text since the last call, and the log-probabilities of its tokens."""
        events, self._events = self._events, []
        logprobs, self._logprobs = self._logprobs, []
        return events, logprobs


_LEAST = -9999.0
"""Replaces minus infinity, which JSON does not have."""


def chat_logprob(tokenizer: Tokenizer, token: int, found: Logprobs) -> dict[str, Any]:
    """One entry of a chat's ``logprobs.content``."""
    logprob, best = found
    top = [_named(tokenizer, other, value) for other, value in best]
    return {**_named(tokenizer, token, logprob), "top_logprobs": top}


def _named(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.bytes_of(token)
    return {"token": _spelled(data), "logprob": max(logprob, _LEAST), "bytes": list(data)}


def _spelled(data: bytes) -> str:
    """The token's text; incomplete characters byte by byte, as in ``bytes:\\xe4\\xb8``."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class LogprobColumns:
    """The columns of a completion's ``logprobs``, filled token by token; :meth:`take` returns the new entries."""

    def __init__(self, tokenizer: Tokenizer | None, *, num_best: int, as_ids: bool) -> None:
        self._tokenizer = tokenizer
        self._num_best = num_best
        self._as_ids = as_ids or tokenizer is None
        self._columns = _no_columns()

    def add(self, token: int, offset: int, logprob: float | None, best: Sequence[tuple[int, float]]) -> None:
        """A token that begins at character ``offset`` of the text; ``logprob`` None: the first of a prompt."""
        self._columns["tokens"].append(self._name(token))
        self._columns["text_offset"].append(offset)
        self._columns["token_logprobs"].append(None if logprob is None else max(logprob, _LEAST))
        top = None
        if logprob is not None and self._num_best:
            top = {self._name(other): max(value, _LEAST) for other, value in best[: self._num_best]}
            top.setdefault(self._name(token), max(logprob, _LEAST))
        elif logprob is not None:
            top = {self._name(token): max(logprob, _LEAST)}
        self._columns["top_logprobs"].append(top)

    def take(self) -> dict[str, list[Any]]:
        """The columns since the last time."""
        columns, self._columns = self._columns, _no_columns()
        return columns

    def _name(self, token: int) -> str:
        if self._as_ids or self._tokenizer is None:
            return f"token_id:{token}"
        return _spelled(self._tokenizer.bytes_of(token))


def _no_columns() -> dict[str, list[Any]]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


@dataclass(slots=True)
class Count:
    """Of one text: tokens up to where it ends, those of its reasoning, and those of its prompt that were cached."""

    prompt: int = 0
    """Which prompt it belongs to."""
    generated: int = 0
    reasoning: int = 0
    cached: int = 0


def usage(prompt_tokens: int, texts: Iterable[Count]) -> dict[str, Any]:
    """As the API spells it. A prompt counts once, for any number of texts.

    >>> usage(5, [Count(generated=2, cached=4), Count(generated=3)])["total_tokens"]
    10
    """
    counts = list(texts)
    generated = sum(count.generated for count in counts)
    cached: dict[int, int] = {}
    for count in counts:
        cached[count.prompt] = max(cached.get(count.prompt, 0), count.cached)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": prompt_tokens + generated,
        "prompt_tokens_details": {"cached_tokens": sum(cached.values())},
        "completion_tokens_details": {"reasoning_tokens": sum(count.reasoning for count in counts)},
    }
