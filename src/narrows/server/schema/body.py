"""The base of all bodies: values are not converted, unknown fields are ignored, and checking ends at a first error.

Pydantic checks every item of a list or mapping and keeps an error for each wrong one: gigabytes for a body of some
megabytes. So lists stop at their first wrong item here, and mappings are checked member by member, once their length is
known to be in bounds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticKnownError, core_schema

__all__ = ["Body"]

_MARK = "narrows_member_by_member"


def _stopping(node: Any) -> Any:
    """A part of a schema, and all within it, rewritten so that it stops at its first error."""
    if isinstance(node, list):
        return [_stopping(each) for each in node]
    if isinstance(node, tuple):
        return tuple(_stopping(each) for each in node)
    if not isinstance(node, dict) or _MARK in node.get("metadata", {}):
        return node
    new = {key: value if key == "metadata" else _stopping(value) for key, value in node.items()}
    if node.get("type") == "list":
        new["fail_fast"] = True
    if node.get("type") == "dict" and new.get("values_schema", {}).get("type", "any") != "any":
        check = partial(_member_by_member, most=node.get("max_length"))
        return core_schema.no_info_wrap_validator_function(check, new, metadata={_MARK: True})
    return new


def _member_by_member(value: Any, check: Callable[[Any], Any], *, most: int | None) -> Any:
    if not isinstance(value, dict) or not value:
        return check(value)
    if most is not None and len(value) > most:
        told = {"field_type": "Dictionary", "max_length": most, "actual_length": len(value)}
        raise PydanticKnownError("too_long", told)
    out: dict[Any, Any] = {}
    for key, item in value.items():
        out |= check({key: item})
    return out


class Body(BaseModel):
    """A body, or part of one."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, protected_namespaces=())

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """The model's own schema, in which everything stops at the first error."""
        return _stopping(handler(source))  # type: ignore[no-any-return]
