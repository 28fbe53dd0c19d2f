"""The command line takes each `narrows` command that a page shows."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from narrows.cli.main import COMMANDS, parse
from narrows.errors import ConfigError

ROOT = Path(__file__).parents[2]
PAGES = sorted(path.relative_to(ROOT) for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")))
NAMES = {name for name, _, _ in COMMANDS}
INCOMPLETE = ("the following arguments are required", "expected one argument")
"""Errors that a command in running text may have: it may leave out irrelevant options."""


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """The arguments of the commands in a page's code blocks (``block``) and sentences (``span``).

    Commands with ``...``, brackets or pipes are left out, and single capitals stand for a number.
    """
    text = (ROOT / page).read_text(encoding="utf-8")
    lines = [("block", line) for line in re.findall(r"^(?: {4}|\$ )narrows ((?:.*\\\n)*.+)$", text, re.MULTILINE)]
    spans = re.findall(r"`narrows ([^`]+)`", text.replace("\n", " "))
    found = []
    for kind, line in lines + [("span", span) for span in spans if " --" in span]:
        words = shlex.split(line.replace("\\\n", " "), comments=True)
        if words[0] in NAMES and not any(re.search(r"[|\[\]]|^\.\.\.$", word) for word in words):
            found.append((kind, ["2" if re.fullmatch("[A-Z]", word) else word for word in words]))
    return found


SHOWN = [(str(page), kind, words) for page in PAGES for kind, words in commands(page)]


def test_pages_show_commands() -> None:
    assert len(SHOWN) > 50 and {words[0] for _, _, words in SHOWN} >= NAMES - {"convert"}


@pytest.mark.parametrize(
    ("page", "kind", "words"), SHOWN, ids=[f"{page}: {shlex.join(words)}" for page, _, words in SHOWN]
)
def test_each_is_taken(page: str, kind: str, words: list[str]) -> None:
    try:
        parse(words)
    except ConfigError as error:
        if kind == "block" or not any(incomplete in str(error) for incomplete in INCOMPLETE):
            raise
