"""The forms that a body asks its text to have: ``response_format`` and the fields other servers have for it.

Knows fields; not how a form is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from narrows.errors import ConfigError
from narrows.server.errors import invalid
from narrows.server.gbnf import gbnf_to_lark
from narrows.server.guides import Form, GrammarGuide, choice_form, regex_form
from narrows.server.json_rule import COMPACT, WHITE_SPACE, json_rule
from narrows.server.schema.common import GenerationFields, ResponseFormat, StructuredOutputs
from narrows.server.state import ServerState
from narrows.server.strict import close_objects

__all__ = ["asked_form", "closed", "make_guide"]

Asked = tuple[Form, str]
"""A form, and the field that asks for it."""


def asked_form(body: GenerationFields) -> Asked | None:
    """The form of the text and the field that asks for it; None: any text.

    Raises:
        ApiError: 400, two fields ask for a form, or one is incomplete.
    """
    found = [*_of_response_format(body), *_of_others(body)]
    if len(found) > 1:
        names = " and ".join(param for _, param in found)
        raise invalid(f"{names} both say what the text looks like; leave one out", found[1][1])
    if found and body.min_tokens:
        raise invalid(f"min_tokens does not go with {found[0][1]}: the form decides where the text ends", "min_tokens")
    if found and body.allowed_token_ids is not None:
        message = f"allowed_token_ids and {found[0][1]} both say which tokens may come; leave one out"
        raise invalid(message, "allowed_token_ids")
    return found[0] if found else None


def make_guide(
    state: ServerState, forms: list[Form], param: str, *, reasoning: bool = False, inside: bool = False
) -> GrammarGuide:
    """A new guide for one generation.

    Raises:
        ApiError: 400, naming ``param``: the form cannot be kept.
    """
    if state.guides is None:
        raise invalid(f"{state.model.names[0]} has no tokenizer.json, so {param} cannot be kept", param)
    try:
        return state.guides.guide(forms, reasoning=reasoning, inside=inside)
    except ConfigError as error:
        raise invalid(f"{param}: {error}", param) from error


def closed(schema: Mapping[str, Any], param: str) -> dict[str, Any]:
    """The schema as ``strict`` asks for it.

    Raises:
        ApiError: 400, naming ``param``: it is nested too deep.
    """
    try:
        return close_objects(schema)
    except ConfigError as error:
        raise invalid(f"{param}: {error}", param) from error


def _grammar(text: str, param: str) -> Form:
    """A grammar of the client: GBNF or EBNF by its ``::=``, else Lark."""
    try:
        rules = gbnf_to_lark(text) if "::=" in text else text
    except ConfigError as error:
        raise invalid(f"{param}: {error}", param) from error
    return Form("grammar", f"grammar: %lark {{\n{rules}\n}}")


def _json(schema: Mapping[str, Any], white_space: str = WHITE_SPACE) -> Form:
    return Form("json_text", f"json_text: {json_rule(schema, white_space=white_space)}")


_USED = {
    "text": (),
    "json_object": ("schema",),
    "json_schema": ("json_schema", "schema"),
    "regex": ("pattern",),
    "grammar": ("grammar",),
}
"""By type of ``response_format``, the fields that say what the text looks like: one of them, if there are any."""


def _of_response_format(body: GenerationFields) -> list[Asked]:
    asked = body.response_format
    if asked is None:
        return []
    given = [name for name in ("json_schema", "schema", "pattern", "grammar") if _of_format(asked, name) is not None]
    used = _USED[asked.type]
    if stray := next((name for name in given if name not in used or name != given[0]), None):
        where = f"response_format.{stray}"
        raise invalid(f"{where} does not go with type {asked.type!r} or a second field; leave it out", where)
    if not given and asked.type not in ("text", "json_object"):
        where = f"response_format.{used[0]}"
        raise invalid(f"{where} is missing", where)
    if asked.pattern is not None:
        return [(regex_form(asked.pattern), "response_format.pattern")]
    if asked.grammar is not None:
        return [(_grammar(asked.grammar, "response_format.grammar"), "response_format.grammar")]
    if asked.json_schema is not None:
        where = "response_format.json_schema.schema"
        schema = asked.json_schema.schema_
        return [(_json(closed(schema, where) if asked.json_schema.strict else schema), where)]
    if asked.schema_ is not None:
        return [(_json(asked.schema_), "response_format.schema")]
    return [(_json({"type": "object"}), "response_format")] if asked.type == "json_object" else []


def _of_format(asked: ResponseFormat, name: str) -> Any:
    return getattr(asked, "schema_" if name == "schema" else name)


def _of_others(body: GenerationFields) -> list[Asked]:
    out = body.structured_outputs or StructuredOutputs()
    found: list[Asked] = []
    for name in ("guided_regex", "regex"):
        if (pattern := getattr(body, name)) is not None:
            found.append((regex_form(pattern), name))
    white_space = body.guided_whitespace_pattern
    for name in ("guided_json", "json_schema"):
        if (schema := getattr(body, name)) is not None:
            found.append((_json(schema, WHITE_SPACE if white_space is None else white_space), name))
    if body.guided_choice is not None:
        found.append((choice_form(body.guided_choice), "guided_choice"))
    for name in ("guided_grammar", "grammar", "ebnf"):
        if text := getattr(body, name):  # an empty one is no grammar, as in llama.cpp
            found.append((_grammar(text, name), name))
    return [*found, *_of_structured_outputs(out)]


def _of_structured_outputs(out: StructuredOutputs) -> list[Asked]:
    found: list[Asked] = []
    if out.regex is not None:
        found.append((regex_form(out.regex), "structured_outputs.regex"))
    if out.json_ is not None or out.json_object:
        where = "structured_outputs.json" if out.json_ is not None else "structured_outputs.json_object"
        schema: dict[str, Any] = {"type": "object"} if out.json_ is None else out.json_
        if out.json_ is not None and out.disable_additional_properties:
            schema = closed(schema, where)
        white_space = COMPACT if out.disable_any_whitespace else WHITE_SPACE
        found.append((_json(schema, white_space if out.whitespace_pattern is None else out.whitespace_pattern), where))
    if out.json_ is not None and out.json_object:
        raise invalid(
            "structured_outputs: json and json_object both say what the text looks like", "structured_outputs"
        )
    if out.choice is not None:
        found.append((choice_form(out.choice), "structured_outputs.choice"))
    if out.grammar:
        found.append((_grammar(out.grammar, "structured_outputs.grammar"), "structured_outputs.grammar"))
    return found
