"""The forms that a body asks its text to have: ``response_format`` and the fields other servers have for it.

Knows fields; not how a form is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from narrows.errors import ConfigError, NarrowsError
from narrows.server.errors import invalid, refused
from narrows.server.grammar.compiled import GrammarGuide
from narrows.server.guides import Form, choice_form, json_form, regex_form
from narrows.server.schema.common import GenerationFields, StructuredOutputs
from narrows.server.state import ServerState

__all__ = ["Constraint", "asked_form", "make_guides"]


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraint:
    """What the texts of a request have to be: one of ``forms``, as the field ``param`` asks.

    ``reasoning``: a thought may come first; ``inside``: it has begun already.
    """

    forms: tuple[Form, ...]
    param: str
    reasoning: bool = False
    inside: bool = False


async def make_guides(state: ServerState, asked: Constraint, count: int) -> list[GrammarGuide]:
    """New guides, one for each of so many generations.

    Raises:
        ApiError: 400, naming the field: the form cannot be kept; 429: too many others wait.
    """
    param = asked.param
    if state.guides is None:
        raise invalid(f"{state.model.names[0]} has no tokenizer.json, so {param} cannot be kept", param)
    try:
        return await state.guides.guides(asked.forms, count, reasoning=asked.reasoning, inside=asked.inside)
    except ConfigError as error:
        raise invalid(f"{param}: {error}", param) from error
    except NarrowsError as error:
        raise refused(error, param) from error


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
