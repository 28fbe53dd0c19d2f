"""Which tools a request lets the model call, and whether it has to. Knows fields; not how calls are written."""

from __future__ import annotations

from dataclasses import dataclass

from narrows.server.errors import invalid
from narrows.server.reading import Reading
from narrows.server.schema.chat import ChatRequest, Tool, ToolChoice

__all__ = ["Calls", "ToolUse", "tool_use"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """``tools``: those that the model is shown and may call, none if no call is read. ``must``: it has to call one.

    ``many``: it may call several. ``strangers``: a call of another function is handed out too; the client refuses it.
    """

    tools: tuple[Tool, ...] = ()
    must: bool = False
    many: bool = True
    strangers: bool = True

    def calls(self, *, parallel: bool) -> Calls:
        """What is read in the model's text."""
        names = None if self.strangers else frozenset(tool.function.name for tool in self.tools)
        return Calls(are_read=bool(self.tools), most=None if parallel else 1, names=names)


@dataclass(frozen=True, slots=True, kw_only=True)
class Calls:
    """Which calls are read in a text: none, or so many at ``most``, of these ``names`` (None: of any)."""

    are_read: bool
    most: int | None
    names: frozenset[str] | None


def tool_use(reading: Reading, body: ChatRequest) -> ToolUse:
    """What ``tools``, ``tool_choice`` and ``parallel_tool_calls`` come to.

    Raises:
        ApiError: 400, they contradict each other, or the model's template knows no tools.
    """
    choice = body.tool_choice
    tools = {tool.function.name: tool for tool in body.tools or ()}
    if len(tools) < len(body.tools or ()):
        raise invalid("tools: two functions have the same name", "tools")
    if choice not in (None, "none") and not tools:
        raise invalid("tool_choice is given, but no tools", "tool_choice")
    if not tools or choice == "none":
        return ToolUse()
    if reading.tools is None:
        message = "the model's chat template knows no tool calls in a format that this server reads"
        raise invalid(f"{message}; a server started with --tool-call-parser reads one", "tools")
    many = body.parallel_tool_calls is not False
    if not isinstance(choice, ToolChoice):
        return ToolUse(tools=tuple(tools.values()), must=choice == "required", many=many)
    return _of_choice(choice, tools, many)


def _of_choice(choice: ToolChoice, tools: dict[str, Tool], many: bool) -> ToolUse:
    names, must = [], True
    if choice.type == "function":
        if choice.function is None:
            raise invalid("tool_choice.function is missing: the name of the function to call", "tool_choice.function")
        names, many = [choice.function.name], False
    else:
        allowed = choice.allowed_tools
        if allowed is None:
            raise invalid("tool_choice.allowed_tools is missing: a mode and tools", "tool_choice.allowed_tools")
        names, must = [tool.function.name for tool in allowed.tools], allowed.mode == "required"
    for name in names:
        if name not in tools:
            raise invalid(f"tool_choice names {name!r}, which is not among tools", "tool_choice")
    return ToolUse(
        tools=tuple(tool for name, tool in tools.items() if name in names), must=must, many=many, strangers=False
    )
