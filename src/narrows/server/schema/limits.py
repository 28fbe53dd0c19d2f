"""How much a body may hold, said in plain words, and fields that are of one JSON type or another. Knows no field."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, GetCoreSchemaHandler, GetJsonSchemaHandler, WithJsonSchema
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from narrows.server.errors import ApiError
from narrows.server.json_body import JsonLimits, read_json

__all__ = ["MAX_ENTRIES", "MAX_TEXT", "AtMost", "JsonObject", "JsonSchema", "OneOf", "Text", "kind_of"]

MAX_TEXT = 16 * 1024 * 1024
"""Characters of one text; a body is bounded by --max-body-mb, a prompt by the context."""
MAX_ENTRIES = 10_000


@dataclass(frozen=True, slots=True)
class AtMost:
    """A list, mapping or text of at most ``count`` of what ``noun`` says; ``least`` 1: it must not be empty.

    Looked at before any item is read, and a list's items are read up to the first that is wrong.
    """

    count: int
    noun: str
    least: int = 0

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """The type's own validation, after the count."""
        inner: Any = dict(handler(source))
        if inner["type"] in ("list", "dict"):  # of a text, the length is not known to pydantic if it is not Unicode
            inner["max_length"] = self.count
            if self.least:
                inner["min_length"] = self.least
        if inner["type"] == "list":
            inner["fail_fast"] = True
        return core_schema.no_info_before_validator_function(self._checked, inner)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The type's own schema; a text's says its length too."""
        found = handler(schema)
        if found.get("type") == "string":
            found |= {"maxLength": self.count} | ({"minLength": self.least} if self.least else {})
        return found

    def _checked(self, value: Any) -> Any:
        if not isinstance(value, str | list | dict):
            return value
        assert isinstance(value, Sized), "all of them are"
        values = {"most": self.count, "noun": self.noun, "given": len(value)}
        if len(value) > self.count:
            raise PydanticCustomError("too_many", "at most {most} {noun}, but there are {given}", values)
        if len(value) < self.least:
            raise PydanticCustomError("too_few", "must not be empty", values)
        return value


def kind_of(value: Any) -> str:
    """The JSON type of a value that was read from JSON, or of a model in an object's place.

    >>> kind_of("a"), kind_of([]), kind_of(True), kind_of(None)
    ('a text', 'a list', 'a boolean', 'null')
    """
    if value is None:
        return "null"
    kinds: tuple[tuple[type, str], ...] = (
        (str, "a text"),
        (bool, "a boolean"),
        (int, "a number"),
        (float, "a number"),
        (list, "a list"),
    )
    return next((name for kind, name in kinds if isinstance(value, kind)), "an object")


class OneOf:
    """Metadata for a field that is of one of several JSON types: the error of a wrong item is that type's own.

    ``kinds`` leads from what :func:`kind_of` says to the type that is then meant.
    """

    def __init__(self, kinds: Mapping[str, Any]) -> None:
        self._kinds = dict(kinds)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """A union that the value's own JSON type decides."""
        choices = {name: handler.generate_schema(kind) for name, kind in self._kinds.items()}
        return core_schema.tagged_union_schema(
            choices,
            discriminator=kind_of,
            custom_error_type="wrong_type",
            custom_error_message=f"must be {' or '.join(self._kinds)}",
        )


Text = Annotated[str, AtMost(MAX_TEXT, "characters")]
JsonObject = Annotated[dict[str, Any], AtMost(MAX_ENTRIES, "entries")]


def _schema_of(value: Any) -> Any:
    """The schema, read if it comes as JSON text, which may hold no more than a body."""
    if not isinstance(value, str):
        return value
    try:
        found = read_json(value, JsonLimits(), "a JSON schema as text")
    except ApiError as error:
        raise PydanticCustomError("json_schema", "{said}", {"said": error.message}) from None
    except ValueError:
        raise PydanticCustomError("json_schema", "a JSON schema as text must be JSON, and this is not") from None
    if not isinstance(found, dict):
        raise PydanticCustomError("json_schema", "a JSON schema must be an object")
    return found


JsonSchema = Annotated[
    JsonObject,
    BeforeValidator(_schema_of),
    WithJsonSchema({"anyOf": [{"type": "object"}, {"type": "string", "maxLength": MAX_TEXT}]}),
]
"""A JSON schema, as an object or as JSON text."""
