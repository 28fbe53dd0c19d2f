"""Prints docs/request-fields.md, from the schemas and the tables of refused and ignored fields.

python benchmarks/request_fields_page.py > docs/request-fields.md
"""

from __future__ import annotations

import json

from narrows.server.openai.completions import CompletionRequest
from narrows.server.schema.chat import ChatRequest
from narrows.server.schema.common import GenerationFields
from narrows.server.schema.fields import IGNORED, REFUSED

__all__ = ["fields_page"]

_HEAD = """\
# Fields of requests

What the routes of chats and completions do with the fields of OpenAI's API, vLLM, SGLang and llama.cpp.
Printed by `python benchmarks/request_fields_page.py`. `tests/server/test_field_table.py` holds it to the code, and
the code to the servers' own lists (`tests/server/request_fields.json`).

A field that decides the text works, or is a 400 that names it; one that cannot change the text may be ignored. So are
fields that no server knows.
"""


def fields_page() -> str:
    """The page, in Markdown."""
    both = set(GenerationFields.model_fields)
    chat, completion = set(ChatRequest.model_fields) - both, set(CompletionRequest.model_fields) - both
    parts = [
        _HEAD,
        "## Works\n",
        f"In both: {_names(both)}.\n",
        f"In chats: {_names(chat)}.\n",
        f"In completions: {_names(completion)}.\n",
        "## Refused\n",
        "Null is accepted for each, and so are the values in the second column, which have no effect.\n",
        "| field | accepted | why, and what to do |\n|---|---|---|",
        *(f"| `{name}` | {_values(each.harmless)} | {each.reason} |" for name, each in sorted(REFUSED.items())),
        "\n## Ignored\n",
        "| fields | each |\n|---|---|",
        *(f"| {_names({name for name in IGNORED if IGNORED[name] == why})} | {why} |" for why in _reasons()),
    ]
    return "\n".join(parts) + "\n"


def _reasons() -> list[str]:
    return sorted(set(IGNORED.values()))


def _names(names: set[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


def _values(values: tuple[object, ...]) -> str:
    return ", ".join(f"`{json.dumps(value)}`" for value in values)


if __name__ == "__main__":
    print(fields_page(), end="")
