"""Reasoning and tool calls in text: independent of how it is cut into pieces; anything else stays text."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrows.server.parsers import deepseek
from narrows.server.parsers.events import Arguments, Content, Reasoning, ToolCall, joined
from narrows.server.parsers.formats import FORMATS, OutputParser, ReasoningSplit, reasoning_parser, tool_format
from narrows.server.parsers.hermes import CallObject

B, E = deepseek.CALLS_BEGIN, deepseek.CALLS_END
b, e, s = deepseek.CALL_BEGIN, deepseek.CALL_END, deepseek.SEP


def parser(name: str, *, inside: bool = False, max_calls: int | None = None) -> OutputParser:
    return OutputParser(reasoning=ReasoningSplit(inside=inside), tools=FORMATS[name].new_parser(), max_calls=max_calls)


def parse(of: OutputParser, pieces: list[str]):
    return joined([event for piece in pieces for event in of.push(piece)] + of.finish())


# Parts of generated texts: tags, parts of tags, JSON and its parts, white space.
PARTS = st.sampled_from(
    [
        *(
            "<think>",
            "</think>",
            "<",
            "think",
            "\n",
            " ",
            "word",
            "<tool_call>",
            "</tool_call>",
            "tool_call>",
            "{",
            "}",
        ),
        *('"name"', ": ", '"f"', ", ", '"arguments"', '{"a": [1, "}"]}', '"\\"x"', "null", B, E, b, e, s, "function"),
        *(
            "```json\n",
            "\n```",
            "`",
            '{"name": "g", "arguments": {"k": "</tool_call>"}}',
            "é\U0001f9ff",
            B[:5],
            "parameters",
        ),
    ]
)
TEXTS = st.lists(PARTS, max_size=14).map("".join)


@st.composite
def calls(draw) -> str:
    """A text with a thought and calls as the format has them, and anything in between."""
    name = draw(st.sampled_from(sorted(FORMATS)))
    arguments = json.dumps(draw(st.dictionaries(st.text(max_size=4), st.text(max_size=6) | st.none(), max_size=2)))
    one = {
        "hermes": f'<tool_call>\n{{"name": "f", "arguments": {arguments}}}\n</tool_call>',
        "deepseek_v3": f"{B}{b}function{s}f\n```json\n{arguments}\n```{e}{E}",
        "deepseek_v31": f"{B}{b}f{s}{arguments}{e}{E}",
    }[name]
    thought = draw(st.sampled_from(["", "<think>hm</think>\n\n", "<think>"]))
    return name, thought + draw(TEXTS) + one + draw(TEXTS)


@st.composite
def cut(draw, texts):
    """A format, a text, and the same text in pieces."""
    name, text = draw(texts)
    at = sorted(draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return name, text, [text[i:j] for i, j in zip([0, *at], [*at, len(text)], strict=True)]


@given(cut(calls() | st.tuples(st.sampled_from(sorted(FORMATS)), TEXTS)), st.booleans())
def test_pieces_change_nothing(drawn, inside: bool) -> None:
    name, text, pieces = drawn
    whole = parse(parser(name, inside=inside), [text])
    assert parse(parser(name, inside=inside), pieces) == whole
    assert parse(parser(name, inside=inside), list(text)) == whole
    indices = [event.index for event in whole if isinstance(event, ToolCall)]
    assert indices == list(range(len(indices)))
    assert all(event.index < len(indices) for event in whole if isinstance(event, Arguments))


@given(cut(st.tuples(st.just("hermes"), st.text())))
def test_text_without_tags_is_content_unchanged(drawn) -> None:
    _, text, pieces = drawn
    assert parse(parser("hermes"), pieces) == joined([Content(text)])


@pytest.mark.parametrize(
    ("name", "text", "want"),
    [
        ("hermes", "<think>a\n</think>\nb", [Reasoning("a"), Content("b")]),
        ("hermes", "<tool_call>nothing</tool_call> x", [Content("<tool_call>nothing</tool_call> x")]),
        (
            "hermes",
            '<tool_call>{"arguments": {"a": "\\"}"}, "name": "f"}</tool_call>\nrest',
            [ToolCall(0, "f"), Arguments(0, '{"a": "\\"}"}'), Content("rest")],
        ),
        ("hermes", '<tool_call>{"name": "f"}</tool_call>', [ToolCall(0, "f"), Arguments(0, "{}")]),
        (
            "hermes",
            '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}',
            [ToolCall(0, "f"), Arguments(0, '{"a": 1}')],
        ),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a', [ToolCall(0, "f"), Arguments(0, '{"a')]),
        ("hermes", '<tool_call>{"name": "', [Content('<tool_call>{"name": "')]),
        (
            "deepseek_v3",
            f'So:\n{B}{b}function{s}f\n```json\n{{"a": "```"}}\n```{e}\n{b}function{s}g\n```json\n{{}}\n```{e}{E}',
            [Content("So:"), ToolCall(0, "f"), Arguments(0, '{"a": "```"}'), ToolCall(1, "g"), Arguments(1, "{}")],
        ),
        ("deepseek_v31", f"{B}{b}f{s}{e}{E}done", [ToolCall(0, "f"), Arguments(0, "{}"), Content("done")]),
    ],
)
def test_parsed_calls_and_content_of_texts(name: str, text: str, want) -> None:
    assert parse(parser(name), [text]) == want


@given(
    st.dictionaries(st.text(), st.recursive(st.none() | st.text() | st.integers(), st.lists), max_size=3),
    st.dictionaries(
        st.text().filter(lambda k: k not in ("name", "arguments", "parameters")), st.integers(), max_size=2
    ),
    st.sampled_from([None, 2]),
    st.booleans(),
)
def test_any_json_spelling_of_a_call_is_read(arguments, others, indent, escaped: bool) -> None:
    text = json.dumps({**others, "arguments": arguments, "name": "fé"}, indent=indent, ensure_ascii=escaped)
    call = CallObject()
    out, rest = call.push(text + " rest")
    assert call.name == "fé" and json.loads(out) == arguments and rest == " rest"


def test_calls_after_the_most_are_left_out() -> None:
    text = '<tool_call>{"name": "f"}</tool_call>' * 2 + "x"
    assert parse(parser("hermes", max_calls=1), [text]) == [ToolCall(0, "f"), Arguments(0, "{}"), Content("x")]


def test_formats_are_detected_from_the_template() -> None:
    hermes = '<tool_call>{"name": <function-name>, "arguments": <args-json-object>}</tool_call>'
    assert tool_format("auto", hermes).name == "hermes"
    assert tool_format("auto", f"{B}{b} function ```json") is FORMATS["deepseek_v3"]
    assert tool_format("auto", f"{B}{b}") is FORMATS["deepseek_v31"]
    assert tool_format("auto", "<tool_call><function=x><parameter>arguments") is None
    assert tool_format("none", hermes) is None and tool_format("hermes", "") is FORMATS["hermes"]
    assert reasoning_parser("auto", "{{ content.split('</think>') }}") == "think"
    assert reasoning_parser("auto", "plain") == reasoning_parser("none", "</think>") == "none"
