"""The forms that a body asks its text to have: ``response_format`` and the fields other servers have for it.

Knows fields; not how a form is kept.
"""

from __future__ import annotations

from typing import Any

from narrows.errors import ConfigError
from narrows.server.errors import invalid
from narrows.server.guides import Form, GrammarGuide, choice_form, json_form, regex_form
from narrows.server.schema.common import GenerationFields, StructuredOutputs
from narrows.server.state import ServerState

__all__ = ["asked_form", "make_guide"]


def asked_form(body: GenerationFields) -> tuple[Form, str] | None:
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


def _of_response_format(body: GenerationFields) -> list[tuple[Form, str]]:
    asked = body.response_format
    if asked is None or asked.type == "text":
        return []
    if asked.type == "json_object":
        return [(json_form({"type": "object"}), "response_format")]
    if asked.type == "json_schema":
        if asked.json_schema is None:
            raise invalid("response_format.json_schema is missing", "response_format.json_schema")
        return [(json_form(asked.json_schema.schema_), "response_format.json_schema.schema")]
    if asked.pattern is None:
        raise invalid("response_format.pattern is missing: the regex", "response_format.pattern")
    return [(regex_form(asked.pattern), "response_format.pattern")]


def _of_others(body: GenerationFields) -> list[tuple[Form, str]]:
    out = body.structured_outputs or StructuredOutputs()
    asked: list[tuple[str | None, dict[str, Any] | None, list[str] | None, str]] = [
        (body.guided_regex, body.guided_json, body.guided_choice, "guided_"),
        (out.regex, out.json_, out.choice, "structured_outputs."),
    ]
    found: list[tuple[Form, str]] = []
    for regex, schema, texts, where in asked:
        if regex is not None:
            found.append((regex_form(regex), f"{where}regex"))
        if schema is not None:
            found.append((json_form(schema), f"{where}json"))
        if texts is not None:
            found.append((choice_form(texts), f"{where}choice"))
    return found
