"""JSON schemas: objects closed for ``strict``, and schemas as terms of a Lark grammar."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from narrows.errors import ConfigError

__all__ = ["COMPACT", "WHITE_SPACE", "close_objects", "json_rule"]

Schema = Mapping[str, Any]

_OF_OTHERS = ("items", "additionalItems", "unevaluatedItems", "contains", "additionalProperties")
"""Keywords whose value is a schema of another value."""
_LISTS_OF_OTHERS = ("items", "prefixItems")
_MAPS_OF_OTHERS = ("properties", "patternProperties", "$defs", "definitions")
_SAME_VALUE = ("allOf", "anyOf", "oneOf")
"""Keywords whose schemas describe the same value as the schema that contains them."""
_SAYS_IT = ("additionalProperties", "unevaluatedProperties")
_MOST_REFS = 64
_MOST_NESTED = 200
_MOST_READ = 40_000
"""References to references could make a small schema endlessly large."""


def close_objects(schema: Schema) -> dict[str, Any]:
    """The schema with ``additionalProperties: false`` on every object without it, at every level.

    Schemas about one value (``allOf``, ``anyOf``, ``oneOf`` beside ``properties``) accept each other's properties, so
    that what they allow together stays allowed. ``not``, ``if`` and schemas of names are not changed.

    Raises:
        ConfigError: it is nested too deep, or its references multiply without end.

    >>> close_objects({"type": "object", "properties": {"a": {"type": "object"}}})["additionalProperties"]
    False
    """
    return _Closer(schema).closed(schema, {})


class _Closer:
    def __init__(self, root: Schema) -> None:
        self._root = root
        self._num_read = 0
        self._depth = 0

    def closed(self, schema: Schema, beside: Schema) -> dict[str, Any]:
        """``schema`` closed; ``beside``: properties and patterns that other schemas of the same value have."""
        self._count()
        self._depth += 1
        if self._depth > _MOST_NESTED:
            raise ConfigError(f"strict reads at most {_MOST_NESTED} nested schemas")
        out = self._close_value(schema, self._close_others(schema), beside)
        self._depth -= 1
        return out

    def _count(self, more: int = 1) -> None:
        self._num_read += more
        if self._num_read > _MOST_READ:
            raise ConfigError(f"strict reads at most {_MOST_READ} schemas and properties, counting each reference")

    def _close_others(self, schema: Schema) -> dict[str, Any]:
        """A copy whose schemas of other values are closed."""
        out = dict(schema)
        for key in _OF_OTHERS:
            if isinstance(out.get(key), Mapping):
                out[key] = self.closed(out[key], {})
        for key in _LISTS_OF_OTHERS:
            if isinstance(out.get(key), list):
                out[key] = [self._any(item, {}) for item in out[key]]
        for key in _MAPS_OF_OTHERS:
            if isinstance(out.get(key), Mapping):
                out[key] = {name: self._any(item, {}) for name, item in out[key].items()}
        return out

    def _any(self, schema: Any, beside: Schema) -> Any:
        return self.closed(schema, beside) if isinstance(schema, Mapping) else schema

    def _close_value(self, schema: Schema, out: dict[str, Any], beside: Schema) -> dict[str, Any]:
        parts = [part for key in _SAME_VALUE for part in _list(schema, key)]
        together = _is_object(schema) or bool(beside) or len(_list(schema, "allOf")) > 1
        if not together:  # each part alone defines the value
            for key in _SAME_VALUE:
                if key in out:
                    out[key] = [self._any(part, {}) for part in _list(schema, key)]
            return out
        if any(key in each for each in self._about(schema) for key in _SAYS_IT):
            for key in _SAME_VALUE:
                if key in out:
                    out[key] = [self._close_others(p) if isinstance(p, Mapping) else p for p in _list(schema, key)]
            return out
        shared = self._properties(schema)
        for kind in ("properties", "patternProperties"):
            shared[kind] |= beside.get(kind, {})
        for key in _SAME_VALUE:
            if key in out:
                out[key] = [self._any(self._resolved(part), shared) for part in _list(schema, key)]
        if (parts or beside) and not _is_object(schema):
            return out
        for kind in ("properties", "patternProperties"):
            if isinstance(out.get(kind, {}), Mapping) and (merged := {**shared[kind], **_map(out, kind)}):
                out[kind] = merged
        return {**out, "additionalProperties": False}

    def _properties(self, schema: Schema) -> dict[str, dict[str, Any]]:
        """The property names of all schemas about this value, without constraints."""
        found: dict[str, dict[str, Any]] = {"properties": {}, "patternProperties": {}}
        for each in self._about(schema):
            for kind, names in found.items():
                named = _map(each, kind)
                self._count(len(named))
                names.update(dict.fromkeys(named, True))
        return found

    def _about(self, schema: Schema, depth: int = 0) -> Iterator[Schema]:
        """The schema, and all that it holds about the same value."""
        self._count()
        if depth > _MOST_NESTED:
            raise ConfigError(f"strict reads at most {_MOST_NESTED} nested schemas")
        yield schema
        for key in _SAME_VALUE:
            for part in _list(schema, key):
                if isinstance(part, Mapping):
                    yield from self._about(self._resolved(part), depth + 1)

    def _resolved(self, part: Any) -> Any:
        """The target of a reference within the document; other schemas unchanged."""
        for _ in range(_MOST_REFS):
            if not isinstance(part, Mapping) or not isinstance(part.get("$ref"), str):
                return part
            target = self._at(part["$ref"])
            if target is None:
                return part
            self._count(len(target))
            part = {**target, **{key: value for key, value in part.items() if key != "$ref"}}
        return part

    def _at(self, reference: str) -> Schema | None:
        here: Any = self._root
        if not reference.startswith("#"):
            return None
        for step in reference[1:].split("/")[1:]:
            here = here.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(here, Mapping) else None
        return here if isinstance(here, Mapping) else None


def _list(schema: Schema, key: str) -> list[Any]:
    found = schema.get(key)
    return found if isinstance(found, list) else []


def _map(schema: Schema, key: str) -> Schema:
    found = schema.get(key)
    return found if isinstance(found, Mapping) else {}


def _is_object(schema: Schema) -> bool:
    kind = schema.get("type")
    if kind is None:
        return "properties" in schema
    return kind == "object" or (isinstance(kind, list) and "object" in kind)


WHITE_SPACE = r"( |\n[ \t]{0,32})?"
"""Between the parts of JSON text: a space, or a new line with its indentation; not white space without an end."""
COMPACT = ""
"""No white space between the parts, but one space after each comma and colon."""


def json_rule(schema: Mapping[str, Any], *, white_space: str = WHITE_SPACE) -> str:
    """The term, independent of the rest of the rule. ``white_space``: a regex of the white space between the parts."""
    options: dict[str, Any] = {"whitespace_flexible": True, "whitespace_pattern": white_space}
    if white_space == COMPACT:
        options = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    return f"%json {json.dumps({**schema, 'x-guidance': options})}"
