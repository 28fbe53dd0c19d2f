"""Tool calls as Hermes and Qwen write them: ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``.

Source: NousResearch's Hermes function-calling format, as in Qwen2.5's and Qwen3's chat templates. Text that looks like
a call and is none stays content.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, Literal

from narrows.server.parsers.events import Arguments, Content, Event, ToolCall, Trimmed
from narrows.server.structured_output.json_schema import json_rule
from narrows.text.stream import StopStrings

__all__ = ["CallObject", "HermesParser", "hermes_grammar"]

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
        """The text after a call and its white space, while it may be the closing tag; None elsewhere."""

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
        """The text held back, at the end of the text."""
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
        """Past the closing tag and the white space before it; a model that omits it continues with content."""
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


_SPACE = " \t\r\n"
_ARGUMENTS = ("arguments", "parameters")

_State = Literal["open", "key", "in key", "colon", "value", "in value", "comma", "done", "failed"]


class CallObject:
    """One JSON object that names a function and its arguments, in any order, among other fields.

    ``name`` is None until it is known. Arguments are handed out as they were written once the name is known; arguments
    that are spelled as a JSON string are handed out as its content, and those left out or null as ``{}``.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.state: _State = "open"
        self._raw: list[str] = []
        self._arguments: list[str] = []
        self._has_arguments = False
        self._key: list[str] = []
        self._field = ""  # the value of the key
        self._first = ""  # character of the value
        self._value: list[str] = []  # all of it, unless it is streamed
        self._depth = 0
        self._in_string = False
        self._escaped = False

    @property
    def raw(self) -> str:
        """All that was read."""
        return "".join(self._raw)

    def push(self, text: str) -> tuple[str, str]:
        """``(arguments, rest)``: the new part of the arguments, and the text after the object ended or failed."""
        for index, character in enumerate(text):
            if self.state in ("done", "failed"):
                return self._take(), text[index:]
            self._raw.append(character)
            self._read(character)
        return self._take(), ""

    def _take(self) -> str:
        if self.state == "done" and not self._has_arguments:
            self._arguments, self._has_arguments = ["{}"], True
        if self.name is None:
            return ""
        out, self._arguments = self._arguments, []
        return "".join(out)

    def _read(self, character: str) -> None:
        if self.state == "in key":
            self._key.append(character)
            if self._string_ends(character):
                self._field = _text_of("".join(self._key)) or ""
                self.state = "colon"
        elif self.state == "in value":
            self._read_value(character)
        elif character in _SPACE:
            return
        elif self.state == "open":
            self.state = "key" if character == "{" else "failed"
        elif self.state == "key":
            self._key = [character]
            if character == "}":
                self._after_value(character)
            else:
                self.state = "in key" if character == '"' else "failed"
        elif self.state == "colon":
            self.state = "value" if character == ":" else "failed"
        elif self.state == "value" and character not in ",:}]":
            self._begin_value(character)
        elif self.state == "value":
            self.state = "failed"
        else:
            self._after_value(character)

    def _begin_value(self, character: str) -> None:
        self._first, self._value = character, []
        self._depth, self._in_string, self._escaped = 0, False, False
        self.state = "in value"
        self._read_value(character)

    def _read_value(self, character: str) -> None:
        bare = self._first not in ('"', "{", "[")
        if bare and self._value and character in _SPACE + ",}":
            self._end_value()
            if character not in _SPACE:
                self._after_value(character)
            return
        (self._arguments if self._streams else self._value).append(character)
        if self._in_string:
            if self._string_ends(character):
                self._in_string = False
                if self._depth == 0:
                    self._end_value()
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            if self._depth <= 0:
                self._end_value()

    @property
    def _streams(self) -> bool:
        """Whether the value is arguments that can be handed out as they come: an object or a list."""
        return self._field in _ARGUMENTS and self._first in ("{", "[") and not self._has_arguments

    def _end_value(self) -> None:
        self.state = "comma"
        value = "".join(self._value)
        if self._field == "name" and self.name is None:
            self.name = _text_of(value)
            if self.name is None:
                self.state = "failed"
        elif self._field in _ARGUMENTS and not self._has_arguments:
            self._has_arguments = True
            if self._first not in ("{", "["):
                text = _text_of(value)
                self._arguments = ["{}" if value == "null" else value if text is None else text]

    def _after_value(self, character: str) -> None:
        if character == "," or (character == "}" and self.name is not None):
            self.state = "key" if character == "," else "done"
        else:
            self.state = "failed"

    def _string_ends(self, character: str) -> bool:
        if self._escaped:
            self._escaped = False
            return False
        self._escaped = character == "\\"
        return character == '"'


def _text_of(literal: str) -> str | None:
    """The value of a JSON string; None if it is not one."""
    try:
        value = json.loads(literal)
    except ValueError:
        return None
    return value if isinstance(value, str) else None
