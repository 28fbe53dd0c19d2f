"""JSON in and out: clients' text is measured before it is parsed, and answers are written compactly.

``json.loads`` builds every value before anything can be refused, holds the interpreter's lock meanwhile, and recurses
into nested values. So brackets, keys and values are counted in the bytes first, and the parser gets only text that it
can read in a fraction of a second.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.responses import Response

from narrows.server.http.errors import ApiError, error_body, invalid, validation_error

__all__ = [
    "MAX_NESTING",
    "JsonAnswer",
    "JsonLimits",
    "check_json",
    "error_answer",
    "parse_json",
    "read_body",
    "read_json",
    "to_json",
    "to_json_in_turns",
]

BodyT = TypeVar("BodyT", bound=BaseModel)

MAX_NESTING = 100
"""Lists and objects within each other, in a body or in JSON text that a body holds."""

_PIECE = 256 * 1024
_ALL_BUT_BRACKETS = bytes(sorted(set(range(256)) - set(b"[]{}")))


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonLimits:
    """The most that a body may hold of each. ``values`` counts items of lists and members of objects."""

    nesting: int = MAX_NESTING
    containers: int = 50_000
    keys: int = 200_000  # a bias for every token of a large vocabulary
    values: int = 1_048_576  # 512 prompts of 2,048 token ids


def parse_json(data: bytes, limits: JsonLimits, what: str = "the body") -> Any:
    """The value of JSON text in UTF-8, UTF-16 or UTF-32.

    Raises:
        ApiError: 400, it is not JSON, or exceeds ``limits``; the message names ``what``.
    """
    try:
        return read_json(data.decode(json.detect_encoding(data), "surrogatepass"), limits, what)
    except json.JSONDecodeError as error:
        raise invalid(f"{what} is not JSON: {error}") from None
    except UnicodeDecodeError as error:
        raise invalid(f"{what} cannot be read as JSON: it is no {error.encoding} text at byte {error.start}") from None
    except ValueError as error:  # a number of more digits than int() takes
        raise invalid(f"{what} cannot be read as JSON: {' '.join(str(error).split(';')[0].split())}") from None


def read_body(data: bytes, model: type[BodyT], limits: JsonLimits) -> BodyT:
    """The body as ``model``.

    Raises:
        ApiError: 400, naming the first field that is wrong.
    """
    value = parse_json(data, limits)
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise validation_error(error.errors(include_url=False, include_input=False), value) from None


def read_json(text: str, limits: JsonLimits, what: str) -> Any:
    """The value of JSON text that a client wrote.

    Raises:
        ApiError: 400, it exceeds ``limits``; the message names ``what``.
        ValueError: it is not JSON.
    """
    check_json(text.encode("utf-8", "surrogatepass"), limits, what)
    return json.loads(text)


def check_json(data: bytes, limits: JsonLimits, what: str) -> None:
    """Count the values of JSON text in UTF-8, without parsing it.

    Raises:
        ApiError: 400, it exceeds ``limits``.
    """
    containers = keys = values = depth = 0
    for piece in _outside_strings(data):
        opened = piece.count(b"[") + piece.count(b"{")
        containers += opened
        keys += piece.count(b":")
        values += piece.count(b",") + opened
        for bracket in piece.translate(None, _ALL_BUT_BRACKETS):
            depth += 1 if bracket in b"[{" else -1
            if depth > limits.nesting:
                raise invalid(f"{what} nests lists and objects more than {limits.nesting} deep; send something flatter")
        for count, most, name in (
            (containers, limits.containers, "lists and objects"),
            (keys, limits.keys, "keys of objects"),
            (values, limits.values, "values"),
        ):
            if count > most:
                raise invalid(f"{what} holds more than {most:,} {name}; send less in one request")


def _outside_strings(data: bytes) -> Iterator[bytes]:
    """The parts of JSON text in UTF-8 outside of its strings."""
    inside, carried = 0, b""
    for start in range(0, len(data), _PIECE):
        piece = carried + data[start : start + _PIECE]
        carried = b""
        if (len(piece) - len(piece.rstrip(b"\\"))) % 2:  # a backslash belongs to the next character
            piece, carried = piece[:-1], b"\\"
        parts = piece.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')
        yield b"".join(parts[inside::2])
        inside = (inside + len(parts) - 1) % 2


def to_json(value: Any) -> bytes:
    """Compact UTF-8. Half a surrogate pair, which UTF-8 cannot hold, is escaped as JSON escapes it."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace")


def to_json_in_turns(value: Any) -> bytes:
    """The same of a large value: it takes longer, and lets other threads run meanwhile."""
    pieces = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).iterencode(value)
    return "".join(pieces).encode("utf-8", "backslashreplace")


class JsonAnswer(Response):
    """A JSON body; bytes are one already."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The body's bytes."""
        return content if isinstance(content, bytes) else to_json(content)


def error_answer(error: ApiError, path: str = "") -> JsonAnswer:
    """The error as an answer, as the API at ``path`` spells errors."""
    return JsonAnswer(error_body(error, path), status_code=error.status, headers=error.headers)
