"""Tool calls as Hermes, Qwen and others write them: ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``.

Source: NousResearch's Hermes function-calling format, as in Qwen2.5's and Qwen3's chat templates. Knows text only. What
looks like a call and is none stays content.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from narrows.server.events import Arguments, Content, Event, ToolCall, Trimmed
from narrows.server.json_rule import json_rule
from narrows.server.tools.json_object import CallObject
from narrows.text.stop import StopStrings

__all__ = ["HermesParser", "hermes_grammar"]

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class HermesParser:
    """Text in, content and calls out, however the text was cut into pieces."""

    def __init__(self) -> None:
        self._num_calls = 0
        self._content = Trimmed(begun=True)
        self._open = StopStrings((OPEN,))
        self._call: CallObject | None = None
        self._announced = False
        self._after: str | None = None
        """What follows a call and its white space, while it may be the closing tag; None elsewhere."""

    def push(self, text: str) -> list[Event]:
        """The events that are settled by ``text``."""
        events: list[Event] = []
        while text:
            if self._after is not None:
                text = self._skip_close(text)
            elif self._call is not None:
                text = self._read_call(text, events)
            else:
                events.append(Content(self._content.push(self._open.push(text))))
                text = ""
                if self._open.found:
                    text, self._open = self._open.rest, StopStrings((OPEN,))
                    self._call, self._announced = CallObject(), False
        return events

    def finish(self) -> list[Event]:
        """What was held back, once no more text comes."""
        if self._call is not None:
            return [] if self._announced else self._as_content(self._call.raw)
        rest = self._after if self._after is not None else self._open.finish()
        if self._after is not None and CLOSE.startswith(rest):
            return []
        content = self._content.push(rest)
        return [Content(content + (self._content.held if not self._num_calls else ""))]

    def _read_call(self, text: str, events: list[Event]) -> str:
        call = self._call
        assert call is not None, "a call is being read"
        arguments, rest = call.push(text)
        if call.name is not None and not self._announced:
            self._announced = True
            self._content = Trimmed()
            events.append(ToolCall(self._num_calls, call.name))
            self._num_calls += 1
        if self._announced:
            events.append(Arguments(self._num_calls - 1, arguments))
        if call.state == "failed" and not self._announced:
            events.extend(self._as_content(call.raw))
        if call.state in ("done", "failed"):
            self._call = None
            self._after = "" if self._announced else None
        return rest

    def _as_content(self, raw: str) -> list[Event]:
        return [Content(self._content.push(OPEN + raw))]

    def _skip_close(self, text: str) -> str:
        """Past the closing tag and the white space before it; a model that leaves it out goes on with content."""
        assert self._after is not None, "a call has ended"
        self._after = after = (self._after + text).lstrip()
        if CLOSE.startswith(after) and after != CLOSE:
            return ""
        self._after = None
        return after.removeprefix(CLOSE)


def hermes_grammar(functions: Sequence[tuple[str, dict[str, Any]]], literal: Callable[[str], str], many: bool) -> str:
    """Lark rules by which ``calls`` is one call of one of the functions (name, schema of its arguments), or several."""
    rules = [f"calls: call{' (' + literal(chr(10)) + ' call)*' if many else ''}"]
    rules.append(f"call: {literal(OPEN + chr(10))} ({' | '.join(f'call{i}' for i in range(len(functions)))}) closed")
    rules.append(f"closed: {literal(chr(10) + CLOSE)}")
    for i, (name, schema) in enumerate(functions):
        begin = literal(f'{{"name": {json.dumps(name)}, "arguments": ')
        rules.append(f"call{i}: {begin} {json_rule(schema)} {literal('}')}")
    return "\n".join(rules)
