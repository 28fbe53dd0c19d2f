"""docs/formats.md lists the fields of every family: the list equals the schemas.

``python tests/pure/test_config_docs.py`` rewrites it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from pathlib import Path

from narrows.arch.config import CONFIG_SCHEMAS
from narrows.arch.configs.harmless import HARMLESS
from narrows.arch.configs.rope import ROPE_TYPES
from narrows.arch.configs.schema import ELSEWHERE, EVERYWHERE, Schema
from narrows.arch.configs.shown import shown

PAGE = Path(__file__).parents[2] / "docs" / "formats.md"
BEGIN, END = "<!-- fields of config.json: begin -->", "<!-- fields of config.json: end -->"


def item(words: str, names: Iterable[str]) -> str:
    text = f"{words}: {', '.join(names)}"
    return textwrap.fill(
        text, 118, initial_indent="- ", subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def family(schema: type[Schema]) -> list[str]:
    fields = schema.model_fields
    lines = [f"**{', '.join(f'`{name}`' for name in schema.model_types)}**", ""]
    lines.append(item("needed", (f"`{name}`" for name, info in fields.items() if info.is_required())))
    lines.append(item("read", (f"`{name}` ({shown(value)})" for name, value in schema.defaults().items())))
    if schema.aliases:
        lines.append(item("other names", (f"`{other}` for `{name}`" for other, name in schema.aliases.items())))
    if schema.only:
        lines.append(item("one value", (f"`{name}` {shown(only.value)}" for name, only in schema.only.items())))
    if schema.harmless:
        lines.append(item("not used", (f"`{name}` ({why})" for name, why in schema.harmless.items())))
    return [*lines, ""]


def listed() -> str:
    lines = ["**All families**", "", item("read", (f"`{name}`" for name in ELSEWHERE))]
    lines.append(item("rope types", (f"`{name}`" for name in ("default", *ROPE_TYPES))))
    lines.append(item("one value", (f"`{name}` {shown(only.value)}" for name, only in EVERYWHERE.items())))
    for why in dict.fromkeys(HARMLESS.values()):
        lines.append(item(f"not used ({why})", (f"`{name}`" for name, reason in HARMLESS.items() if reason == why)))
    lines.append("")
    for schema in dict.fromkeys(CONFIG_SCHEMAS.values()):
        lines += family(schema)
    return "\n".join(lines)


def with_list(page: str) -> str:
    """``page`` with the current list of the schemas."""
    return f"{page[: page.index(BEGIN)]}{BEGIN}\n\n{listed().strip()}\n\n{page[page.index(END) :]}"


def test_the_page_lists_the_fields_of_the_schemas() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_list(page)


if __name__ == "__main__":
    PAGE.write_text(with_list(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
