"""Fields of all servers that constrain the text: each is enforced, or is a 400 that names it."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest
import server_lab as lab

from narrows.errors import ConfigError
from narrows.server.structured_output.gbnf import gbnf_to_lark
from narrows.server.structured_output.json_schema import close_objects

SUM = 'root ::= term ("+" term)*  # of\nterm ::= [0-9] | "(" root ")"\n'
LARK = 'start: "a" B\nB: /[0-9]{2}/'
NUMBER = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
IS_NUMBER = r'\{\s*"n"\s*:\s*-?\d+\s*\}'
IS_OBJECT = r"(?s:\{.*\})"
IS_SUM = r"[0-9+()]+"

KEPT: list[tuple[dict[str, Any], str]] = [
    ({"structured_outputs": {"grammar": SUM}}, IS_SUM),
    ({"structured_outputs": {"grammar": LARK}}, r"a\d\d"),
    ({"structured_outputs": {"regex": "x[yz]{3}"}}, "x[yz]{3}"),
    ({"structured_outputs": {"json": NUMBER}}, IS_NUMBER),
    ({"structured_outputs": {"json": json.dumps(NUMBER), "disable_any_whitespace": True}}, r'\{"n": -?\d+\}'),
    ({"structured_outputs": {"json": NUMBER, "whitespace_pattern": "~"}}, r'\{~?"n"~?:~?-?\d+~?\}'),
    ({"structured_outputs": {"json_object": True}}, IS_OBJECT),
    ({"structured_outputs": {"choice": ["left", "right"]}}, "left|right"),
    ({"structured_outputs": {"json": {"type": "object"}, "disable_additional_properties": True}}, r"\{\s*\}"),
    ({"guided_grammar": SUM}, IS_SUM),
    ({"guided_json": json.dumps(NUMBER)}, IS_NUMBER),
    ({"guided_json": NUMBER, "guided_whitespace_pattern": "~"}, r'\{~?"n"~?:~?-?\d+~?\}'),
    ({"guided_regex": "x[yz]{3}"}, "x[yz]{3}"),
    ({"guided_choice": ["left", "right"]}, "left|right"),
    ({"regex": "x[yz]{3}"}, "x[yz]{3}"),
    ({"ebnf": SUM}, IS_SUM),
    ({"json_schema": json.dumps(NUMBER)}, IS_NUMBER),
    ({"json_schema": NUMBER, "grammar": ""}, IS_NUMBER),
    ({"grammar": SUM}, IS_SUM),
    ({"response_format": {"type": "json_object", "schema": NUMBER}}, IS_NUMBER),
    ({"response_format": {"type": "json_schema", "schema": NUMBER}}, IS_NUMBER),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": NUMBER}}}, IS_NUMBER),
    ({"response_format": {"type": "json_object"}}, IS_OBJECT),
    ({"response_format": {"type": "regex", "pattern": "x[yz]{3}"}}, "x[yz]{3}"),
    ({"response_format": {"type": "grammar", "grammar": SUM}}, IS_SUM),
]


def post(of: lab.Lab, path: str, fields: dict[str, Any]) -> Any:
    prompt = {"prompt": "hi"} if "chat" not in path else {"messages": [{"role": "user", "content": "hi"}]}
    return asyncio.run(of.post(path, prompt | {"max_tokens": 300} | fields))


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(("fields", "pattern"), KEPT)
def test_the_text_matches_the_requested_constraint(
    shared: lab.Lab, path: str, fields: dict[str, Any], pattern: str
) -> None:
    for seed in range(4):
        answer = post(shared, path, fields | {"seed": seed})
        assert answer.status_code == 200, answer.text
        choice = answer.json()["choices"][0]
        if choice["finish_reason"] == "length":
            continue  # a random text may be long
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        assert re.fullmatch(pattern, text), text
    assert shared.sent.guide is not None


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"response_format": {"type": "structural_tag", "structures": []}}, "response_format.type", "use a grammar"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag", "use a grammar"),
        ({"structural_tag": "{}"}, "structural_tag", "use a grammar"),
        ({"guided_json": "{"}, "guided_json", "must be JSON"),
        ({"json_schema": "[]"}, "json_schema", "must be an object"),
        ({"grammar": "start ::= 'a'"}, "grammar", "not GBNF"),
        ({"grammar": 'start ::= "a"'}, "grammar", "no rule 'root'"),
        ({"ebnf": "root ::= x"}, "ebnf", "there is no rule 'x'"),
        ({"guided_grammar": "start: b"}, "guided_grammar", ""),
        ({"grammar": 'root ::= "a"', "regex": "b"}, "grammar", "send only one"),
        ({"response_format": {"type": "text", "schema": NUMBER}}, "response_format.schema", "does not go with"),
        ({"response_format": {"type": "json_object", "pattern": "a"}}, "response_format.pattern", "does not go with"),
        ({"response_format": {"type": "json_schema", "schema": {}, "json_schema": {"schema": {}}}}, None, "second"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing"),
        ({"response_format": {"type": "grammar"}}, "response_format.grammar", "missing"),
        ({"structured_outputs": {"json": {}, "json_object": True}}, "structured_outputs", "both"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, None, "send only one"),
    ],
)
def test_an_unsupported_constraint_is_refused_by_name(
    shared: lab.Lab, path: str, fields: dict[str, Any], param: str | None, says: str
) -> None:
    answer = post(shared, path, fields)
    error = lab.error_of(answer)
    assert answer.status_code == 400 and says in error["message"], error
    assert param is None or error["param"] == param
    assert not shared.backend.submitted


@pytest.mark.parametrize(
    ("grammar", "texts", "others"),
    [
        ('root ::= [a-z]+ "x"', ["abx", "xx"], ["x", "ab"]),
        ('root ::= ("a" | "abc!" | [a-z])+ "."', ["ab.", "abc!.", "abd."], ["abc!"]),
        ('root ::= "\\u00e9" [\\u4e00-\\u9fff] "\\U0001F600"', ["\u00e9\u4e00\U0001f600"], ["e"]),
        ('root ::= [^"\\\\\\x00-\\x1f/-]', ["a", "'"], ['"', "/", "-", "\n"]),
        ("root ::=\n  a-B\n  | A_b {2,3}\na-B ::= [\\]\\-^]\nA_b ::= .", ["]", "^", "\n\n", "abc"], ["a", "abcd"]),
        ('root ::= "(" root ")" | ""', ["", "(())"], ["(", ")"]),
        ("root ::= <[0]>", [], ["a", "<|begin|>x"]),
        ('root ::= "}" # }\n', ["}"], ["{"]),
    ],
)
def test_a_grammar_means_the_same_as_in_llama_cpp(
    shared: lab.Lab, grammar: str, texts: list[str], others: list[str]
) -> None:
    assert post(shared, "/v1/completions", {"grammar": grammar}).status_code == 200
    for text in [*texts, *others]:
        assert follows(shared, grammar, text) == (text in texts), text


def follows(of: lab.Lab, grammar: str, text: str) -> bool:
    """Whether a generation that is held to the grammar may write just this text."""
    ids = [*of.tokenizer.encode(text, add_special_tokens=False), lab.EOS]
    of.backend.prefer = ids
    answer = post(of, "/v1/completions", {"grammar": grammar, "max_tokens": len(ids), "skip_special_tokens": False})
    of.backend.prefer = []
    return answer.json()["choices"][0]["text"] == text


@pytest.mark.parametrize("grammar", ["root ::= " + "(" * 2000, 'root ::= "' + "a" * 40_000 + '"', "::=" * 5000])
def test_a_hostile_grammar_is_refused(shared: lab.Lab, grammar: str) -> None:
    answer = post(shared, "/v1/completions", {"grammar": grammar})
    assert answer.status_code == 400 and lab.error_of(answer)["param"] == "grammar"


def test_names_of_rules_do_not_matter() -> None:
    assert gbnf_to_lark('root ::= fooBar\nfooBar ::= "1"') == gbnf_to_lark('root ::= Foo-bar\nFoo-bar ::= "1"')


def strict_format(strict: bool | None, schema: dict[str, Any]) -> dict[str, Any]:
    named = {"name": "x", "schema": schema} | ({} if strict is None else {"strict": strict})
    return {"response_format": {"type": "json_schema", "json_schema": named}}


OPEN = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize("strict", [True, False, None])
def test_strict_closes_objects_of_a_response_format(shared: lab.Lab, strict: bool | None) -> None:
    shared.backend.prefer = shared.tokenizer.encode('{"b": 1}', add_special_tokens=False)
    answer = post(shared, "/v1/completions", strict_format(strict, OPEN) | {"max_tokens": 5})
    text = answer.json()["choices"][0]["text"]
    assert text.startswith('{"b"') == (strict is not True), text


@pytest.mark.parametrize("strict", [True, False, None])
def test_strict_closes_objects_of_a_function(hermes: lab.Lab, strict: bool | None) -> None:
    function: dict[str, Any] = {"name": "f", "parameters": OPEN} | ({} if strict is None else {"strict": strict})
    begin = '<tool_call>\n{"name": "f", "arguments": '
    hermes.backend.prefer = hermes.tokenizer.encode(begin + '{"b": 1}}\n</tool_call>', add_special_tokens=False)
    asked = {"tools": [{"type": "function", "function": function}], "tool_choice": "required", "max_tokens": 300}
    message = post(hermes, "/v1/chat/completions", asked).json()["choices"][0]["message"]
    arguments = message["tool_calls"][0]["function"]["arguments"]
    assert ('"b"' in arguments) == (strict is not True), arguments


def test_objects_are_closed_at_every_level() -> None:
    leaf = {"type": "object", "properties": {"x": {}}}
    schema = {
        "type": "object",
        "properties": {"list": {"type": "array", "items": leaf}, "either": {"anyOf": [leaf, {"type": "null"}]}},
        "$defs": {"named": leaf},
        "prefixItems": [leaf],
    }
    closed = leaf | {"additionalProperties": False}
    found = close_objects(schema)
    assert found["properties"]["list"]["items"] == closed and found["prefixItems"] == [closed]
    assert found["properties"]["either"]["anyOf"] == [closed, {"type": "null"}]
    assert found["$defs"]["named"] == closed and found["additionalProperties"] is False
    assert "additionalProperties" not in schema and "additionalProperties" not in leaf, "the client's own is kept"


def test_object_declared_open_stays_open_with_closed_parts() -> None:
    inner = {"type": "object"}
    found = close_objects({"type": "object", "properties": {"x": inner}, "additionalProperties": True})
    assert found["additionalProperties"] is True and found["properties"]["x"]["additionalProperties"] is False
    assert close_objects({"enum": [{"type": "object"}]}) == {"enum": [{"type": "object"}]}, "values are no schemas"


@pytest.mark.parametrize(
    ("schema", "texts", "others"),
    [
        (
            {"allOf": [{"$ref": "#/$defs/X"}, {"properties": {"z": {"const": 2}}}], "$defs": {"X": OPEN}},
            ['{"a": 1, "z": 2}', '{"z": 2}'],
            ['{"y": 1}'],
        ),
        (
            OPEN | {"anyOf": [{"required": ["a"]}, {"properties": {"b": {"const": 2}}, "required": ["b"]}]},
            ['{"a": 1}', '{"b": 2}'],
            ['{"c": 2}'],
        ),
    ],
)
def test_parts_of_one_schema_accept_each_others_properties(
    shared: lab.Lab, schema: dict[str, Any], texts: list[str], others: list[str]
) -> None:
    for text in [*texts, *others]:
        shared.backend.prefer = shared.tokenizer.encode(text, add_special_tokens=False)
        answer = post(shared, "/v1/completions", strict_format(True, schema))
        assert (answer.json()["choices"][0]["text"].startswith(text)) == (text in texts), text


@pytest.mark.parametrize("properties", [5, "ab", [[1]], [{"a": {}}]])
@pytest.mark.parametrize("key", ["properties", "patternProperties"])
@pytest.mark.parametrize("inside", [False, True])
def test_strict_leaves_invalid_schemas_to_the_compiler(
    shared: lab.Lab, key: str, properties: Any, inside: bool
) -> None:
    schema = {"type": "object", key: properties}
    answer = post(
        shared, "/v1/completions", strict_format(True, {"type": "object", "allOf": [schema]} if inside else schema)
    )
    assert answer.status_code == 400, answer.text
    assert lab.error_of(answer)["param"] == "response_format.json_schema.schema"


def test_properties_count_each_time_they_are_referenced() -> None:
    many = {"type": "object", "properties": dict.fromkeys(map(str, range(3000)), True)}
    assert close_objects(many)["additionalProperties"] is False
    with pytest.raises(ConfigError, match="strict reads at most"):
        close_objects({"$defs": {"many": many}, "type": "object", "allOf": [{"$ref": "#/$defs/many"}] * 15})


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "allOf": [{"$ref": "#"}, {"$ref": "#"}]},
        {"$defs": {f"n{i}": {"type": "object", "anyOf": [{"$ref": f"#/$defs/n{i + 1}"}] * 2} for i in range(60)}},
    ],
)
def test_references_that_multiply_are_refused(shared: lab.Lab, schema: dict[str, Any]) -> None:
    answer = post(shared, "/v1/completions", strict_format(True, schema))
    assert answer.status_code == 400, answer.text
    assert lab.error_of(answer)["param"] == "response_format.json_schema.schema"
