"""Each file that the pages for readers of the code name is in the tree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = (ROOT, ROOT / "src", ROOT / "src" / "narrows", ROOT / "docs")
"""Where a name may begin."""

NAME = re.compile(r"(?<![\w./<>*-])(?:[\w-]+/)*[\w-]+(?:/|\.(?:py|md|cpp|h|txt|toml|json|yml))(?![\w/<>*])")
"""A path that ends with a slash or with a suffix of ours; names with placeholders (``<family>.py``) are none."""


def named(page: str) -> set[str]:
    """Names in a page's code spans, code blocks and links."""
    text = (ROOT / page).read_text(encoding="utf-8").partition("\n## Earlier names")[0]
    spans = re.findall(r"`([^`]+)`|\]\(([^)#:]+)[^)]*\)|^ {4}(.+)$", text, re.MULTILINE)
    return {name for parts in spans for part in parts for name in NAME.findall(part)}


@pytest.mark.parametrize(("page", "least"), [("docs/dive.md", 30), ("CONTRIBUTING.md", 10), ("docs/words.md", 0)])
def test_named_files_exist(page: str, least: int) -> None:
    names = named(page)
    assert len(names) >= least, names
    absent = {name for name in names if not any((folder / name).exists() for folder in FOLDERS)}
    assert not absent


def test_names_are_found_in_spans_blocks_and_links() -> None:
    found = NAME.findall("read plan/search.py, then `comm/`, models/<family>.py and docs/*.md; x.y, 1/2")
    assert found == ["plan/search.py", "comm/"]


PAGES = sorted(path for folder in (".", "docs", ".github") for path in (ROOT / folder).glob("*.md"))


def anchors(page: Path) -> set[str]:
    """The anchors of a page: GitHub's form of each heading."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
