"""JSON text that fulfils a schema, as a term of a Lark rule. Knows schemas as plain data; no requests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

__all__ = ["COMPACT", "WHITE_SPACE", "json_rule"]

WHITE_SPACE = r"( |\n[ \t]{0,32})?"
"""Between the parts of JSON text: a space, or a new line with its indentation; not white space without an end."""
COMPACT = ""
"""No white space between the parts, but one space after each comma and colon."""


def json_rule(schema: Mapping[str, Any], *, white_space: str = WHITE_SPACE) -> str:
    """The term; whatever may follow it in the rule. ``white_space``: a regex of what may stand between the parts."""
    options: dict[str, Any] = {"whitespace_flexible": True, "whitespace_pattern": white_space}
    if white_space == COMPACT:
        options = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    return f"%json {json.dumps({**schema, 'x-guidance': options})}"
