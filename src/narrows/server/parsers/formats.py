"""Parsers of generated text: reasoning first, then content and tool calls in the format of the model.

Their result does not depend on where the text was cut into pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from narrows.server.parsers import deepseek, hermes
from narrows.server.parsers.events import Arguments, Content, Event, Reasoning, ToolCall, Trimmed, joined
from narrows.text.stream import StopStrings

__all__ = [
    "CLOSE",
    "FORMATS",
    "OPEN",
    "REASONING_PARSERS",
    "TOOL_PARSERS",
    "Calls",
    "OutputParser",
    "ReasoningSplit",
    "ToolFormat",
    "ToolParser",
    "begins_inside",
    "reasoning_parser",
    "tool_format",
]

OPEN, CLOSE = "<think>", "</think>"

REASONING_PARSERS = ("auto", "none", "think")


def reasoning_parser(name: str, template: str) -> str:
    """``think`` or ``none``; ``auto``: by whether the chat template has the tag."""
    if name != "auto":
        return name
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
        self._tag = ""  # the beginning, without its white space
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


Grammar = Callable[[Sequence[tuple[str, dict[str, Any]]], Callable[[str], str], bool], str]


class ToolParser(Protocol):
    """Text in pieces to content and calls."""

    def push(self, text: str) -> list[Event]:
        """The events that are settled by ``text``."""
        ...

    def finish(self) -> list[Event]:
        """What was held back, once no more text comes."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFormat:
    """``markers``: texts that a tokenizer may hold as special tokens, which have to stay in the text.

    ``arguments_as_text``: its chat templates want a past call's arguments as JSON text, others as an object.
    """

    name: str
    markers: tuple[str, ...]
    arguments_as_text: bool
    new_parser: Callable[[], ToolParser]
    grammar: Grammar


FORMATS = {
    each.name: each
    for each in (
        ToolFormat(
            name="hermes",
            markers=(hermes.OPEN, hermes.CLOSE),
            arguments_as_text=False,
            new_parser=hermes.HermesParser,
            grammar=hermes.hermes_grammar,
        ),
        *(
            ToolFormat(
                name=name,
                markers=deepseek.MARKERS,
                arguments_as_text=True,
                new_parser=partial(deepseek.DeepseekParser, fenced=fenced),
                grammar=partial(deepseek.deepseek_grammar, fenced=fenced),
            )
            for name, fenced in (("deepseek_v3", True), ("deepseek_v31", False))
        ),
    )
}

TOOL_PARSERS = ("auto", "none", *FORMATS)


def tool_format(name: str, template: str) -> ToolFormat | None:
    """The format by its name; ``auto``: the one that the chat template writes; None: without tool calls."""
    if name != "auto":
        return FORMATS.get(name)
    if deepseek.CALLS_BEGIN in template:
        return FORMATS["deepseek_v3" if deepseek.FENCE in template else "deepseek_v31"]
    if hermes.OPEN in template and "<function=" not in template and "arguments" in template:
        return FORMATS["hermes"]
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Calls:
    """Which calls are read in a text: none, or so many at ``most``, of these ``names`` (None: of any)."""

    are_read: bool
    most: int | None
    names: frozenset[str] | None


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
        """Without the calls that are left out; the others are renumbered."""
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
