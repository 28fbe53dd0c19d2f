"""Tool calls as DeepSeek's models write them, in two versions.

    V3, R1   <calls begin><call begin>function<sep>NAME \\n```json \\n ARGUMENTS \\n```<call end>...<calls end>
    V3.1 on  <calls begin><call begin>NAME<sep>ARGUMENTS<call end>...<calls end>

Source: the chat templates of DeepSeek-V3-0324, R1-0528 and V3.1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from narrows.server.parsers.events import Arguments, Content, Event, ToolCall, Trimmed
from narrows.server.structured_output.json_schema import json_rule
from narrows.text.stream import StopStrings

__all__ = ["CALLS_BEGIN", "MARKERS", "DeepseekParser", "deepseek_grammar"]


def _token(words: str) -> str:
    """A token's name, in DeepSeek's bars and low lines."""
    return f"<\uff5c{words}\uff5c>".replace(" ", "\u2581")


CALLS_BEGIN, CALLS_END = _token("tool calls begin"), _token("tool calls end")
CALL_BEGIN, CALL_END, SEP = _token("tool call begin"), _token("tool call end"), _token("tool sep")
MARKERS = (CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, SEP)
FENCE, FENCE_END = "```json", "\n```"


class DeepseekParser:
    """Text in, content and calls out, however the text was cut into pieces. ``fenced``: as V3 and R1 write them."""

    def __init__(self, *, fenced: bool) -> None:
        self._fenced = fenced
        self._num_calls = 0
        self._content = Trimmed(begun=True)
        self._enter("content")

    def _enter(self, state: str) -> None:
        """Continue in ``state``, which ends at one of its marks."""
        self._state = state
        self._marks = StopStrings(
            {
                "content": (CALLS_BEGIN, CALL_BEGIN),
                "between": (CALL_BEGIN, CALLS_END),
                "kind": (SEP,),
                "name": ("\n",) if self._fenced else (SEP,),
                "fence": (FENCE, CALL_END),
                "arguments": (FENCE_END, CALL_END) if self._fenced else (CALL_END,),
                "end": (CALL_END,),
            }[state]
        )
        if state == "name":
            self._name: list[str] = []
        if state == "arguments":
            self._arguments = Trimmed()

    def push(self, text: str) -> list[Event]:
        """The events that are settled by ``text``."""
        events: list[Event] = []
        while text:
            before = self._marks.push(text)
            self._take(before, events)
            if not self._marks.found:
                break
            mark, text = self._marks.which, self._marks.rest
            self._leave(mark, events)
        return events

    def finish(self) -> list[Event]:
        """The text held back, at the end of the text."""
        events: list[Event] = []
        self._take(self._marks.finish(), events)
        if self._state == "content" and not self._num_calls:
            events.append(Content(self._content.held))
        return events

    def _take(self, text: str, events: list[Event]) -> None:
        if self._state == "content":
            events.append(Content(self._content.push(text)))
        elif self._state == "name":
            self._name.append(text)
        elif self._state == "arguments":
            events.append(Arguments(self._num_calls - 1, self._arguments.push(text)))

    def _leave(self, mark: str, events: list[Event]) -> None:
        if self._state == "name":
            events.append(ToolCall(self._num_calls, "".join(self._name).strip()))
            self._num_calls += 1
        if mark == CALL_END and (self._state == "fence" or not self._arguments.begun):
            events.append(Arguments(self._num_calls - 1, "{}"))
        if mark == CALLS_END:
            self._content = Trimmed()
        self._enter(self._next(mark))

    def _next(self, mark: str) -> str:
        if mark in (CALLS_BEGIN, CALL_END):
            return "between"
        if mark == CALLS_END:
            return "content"
        if mark == CALL_BEGIN:
            return "kind" if self._fenced else "name"
        if self._state == "kind":
            return "name"
        if self._state == "name":
            return "fence" if self._fenced else "arguments"
        return "arguments" if self._state == "fence" else "end"


def deepseek_grammar(
    functions: Sequence[tuple[str, dict[str, Any]]], literal: Callable[[str], str], many: bool, *, fenced: bool
) -> str:
    """Lark rules by which ``calls`` is one call of one of the functions (name, schema of its arguments), or several."""
    between = f" ({literal(chr(10))} call)*" if fenced else " call*"
    rules = [f"calls: {literal(CALLS_BEGIN)} call{between if many else ''} {literal(CALLS_END)}"]
    rules.append(f"call: {literal(CALL_BEGIN)} ({' | '.join(f'call{i}' for i in range(len(functions)))})")
    for i, (name, schema) in enumerate(functions):
        begin = f"function{SEP}{name}\n{FENCE}\n" if fenced else f"{name}{SEP}"
        end = FENCE_END + CALL_END if fenced else CALL_END
        rules.append(f"call{i}: {literal(begin)} {json_rule(schema)} {literal(end)}")
    return "\n".join(rules)
