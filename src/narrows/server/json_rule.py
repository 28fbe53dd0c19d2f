"""JSON text that fulfils a schema, as a term of a Lark rule. Knows schemas as plain data; no requests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

__all__ = ["json_rule"]

_WHITE_SPACE = r"( |\n[ \t]{0,32})?"
"""Between the parts of JSON text: a space, or a new line with its indentation; not white space without an end."""


def json_rule(schema: Mapping[str, Any]) -> str:
    """The term; whatever may follow it in the rule."""
    options = {"whitespace_flexible": True, "whitespace_pattern": _WHITE_SPACE}
    return f"%json {json.dumps({**schema, 'x-guidance': options})}"
