"""Shows a value of a config in an error."""

from __future__ import annotations

import json

__all__ = ["shown"]

_MOST_SHOWN = 60


def shown(value: object) -> str:
    """``value`` as JSON on one line, cut where it is long."""
    try:
        text = json.dumps(value).replace("\x7f", "\\u007f")  # the one control character that JSON does not escape
    except (TypeError, ValueError, RecursionError):
        text = f"a {type(value).__name__}"  # from Python, not from a file: or a number of thousands of digits
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."
