"""Which tool-call formats there are, and which of them a chat template teaches. Knows their names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from narrows.server.events import Event
from narrows.server.tools import deepseek, hermes

__all__ = ["FORMATS", "PARSERS", "ToolFormat", "ToolParser", "tool_format"]

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

PARSERS = ("auto", "none", *FORMATS)


def tool_format(asked: str, template: str) -> ToolFormat | None:
    """The format by its name; ``auto``: the one that the chat template writes; None: there are no tool calls."""
    if asked != "auto":
        return FORMATS.get(asked)
    if deepseek.CALLS_BEGIN in template:
        return FORMATS["deepseek_v3" if deepseek.FENCE in template else "deepseek_v31"]
    if hermes.OPEN in template and "<function=" not in template and "arguments" in template:
        return FORMATS["hermes"]
    return None
