"""Pydantic's errors to one sentence about one field. Knows places in bodies, not what they mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from narrows.server.errors import ApiError, invalid

__all__ = ["of_validation"]

_Path = tuple[str | int, ...]


def of_validation(errors: Sequence[Mapping[str, Any]], body: Any) -> ApiError:
    """Status 400, naming the first field that is wrong.

    A field that may be of several types has an error for each of them. The one that tells what was meant is that of the
    type which fitted furthest into the value: of a list of 33 stops, that they are too many, not that it is no text.
    """
    places = [_path(error, body) for error in errors]
    first = places[0]
    tries = [at for at, place in enumerate(places) if place[: len(first)] == first]

    def fit(at: int) -> tuple[tuple[int, ...], int, bool]:
        return _reached(errors[at], places[at]), len(places[at]), not _is_type_error(errors[at])

    best = max(tries, key=fit)
    error, param = errors[best], ".".join(map(str, places[best])) or None
    what = _said(error)
    if param is None:
        return invalid(f"the body must be a JSON object with this endpoint's fields: {what}")
    return invalid(f"{param}: {what}", param)


def _path(error: Mapping[str, Any], body: Any) -> _Path:
    """Where in the body the error is. Pydantic's place holds names of types too, which lead nowhere in the body."""
    path: list[str | int] = []
    here = body
    for step in error["loc"]:
        if isinstance(here, Mapping) and isinstance(step, str):
            if step not in here and error["type"] != "missing":
                continue
            here = here.get(step)
        elif isinstance(here, list) and isinstance(step, int) and step < len(here):
            here = here[step]
        else:
            continue
        path.append(step)
    return tuple(path)


def _reached(error: Mapping[str, Any], place: _Path) -> tuple[int, ...]:
    """How many items of the lists on the way were as they should be."""
    items = tuple(step for step in place if isinstance(step, int))
    return (*items, error["ctx"]["max_length"]) if error["type"] == "too_long" else items


def _is_type_error(error: Mapping[str, Any]) -> bool:
    return str(error["type"]).endswith("_type")


def _said(error: Mapping[str, Any]) -> str:
    limits = error.get("ctx", {})
    if error["type"] == "missing":
        return "is missing"
    if error["type"] == "too_long":
        told = f"at most {limits['max_length']:,} are taken"
        return told if limits["actual_length"] is None else f"{told}, {limits['actual_length']:,} were sent"
    if error["type"] == "string_too_long":
        return f"at most {limits['max_length']:,} characters are taken"
    return str(error["msg"])
