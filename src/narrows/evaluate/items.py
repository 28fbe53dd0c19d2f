"""The files of tasks: one JSON object per line, read and checked; or a text.

An error names the file, the line and the missing field.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from narrows.errors import ConfigError
from narrows.evaluate.answers import hellaswag_text

__all__ = ["Choices", "Question", "read_choices", "read_questions", "read_text"]


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its answer as text. ``kind`` groups questions in the table; empty if the file has none."""

    question: str
    answer: str
    kind: str
    line: int


@dataclass(frozen=True, slots=True)
class Choices:
    """A context, the endings it may have, and which is the right one."""

    ctx: str
    endings: tuple[str, ...]
    label: int
    line: int


def read_questions(path: Path) -> list[Question]:
    """Lines with ``question`` and ``answer`` (numbers are taken as text), and optionally ``kind``.

    Raises:
        ConfigError: the file cannot be read, has no lines, or a line lacks a field.
    """
    items = []
    for line, item in _objects(path):
        answer = item.get("answer")
        if isinstance(answer, (int, float)) and not isinstance(answer, bool):
            item["answer"] = str(answer)
        question, answer = _text(path, line, item, "question"), _text(path, line, item, "answer")
        items.append(Question(question, answer, str(item.get("kind", "")), line))
    return items


def read_choices(path: Path) -> list[Choices]:
    """Lines with ``ctx``, ``endings`` and ``label`` (a number, or the number as text), optionally ``activity_label``.

    As is usual with HellaSwag: ``ctx_a`` and ``ctx_b``, where both exist, in place of ``ctx``, the second
    capitalised; the activity and a colon before the context; bracketed marks taken out.

    Raises:
        ConfigError: the file cannot be read, has no lines, or a line lacks a field or has a label outside its endings.
    """
    items = []
    for line, item in _objects(path):
        first, second = item.get("ctx_a"), item.get("ctx_b")
        if isinstance(first, str) and isinstance(second, str):
            item["ctx"] = f"{first} {second.capitalize()}"
        endings = item.get("endings")
        if not isinstance(endings, list) or len(endings) < 2 or not all(isinstance(e, str) and e for e in endings):
            raise ConfigError(f"{path}, line {line}: 'endings' must be a list of at least 2 texts, not {endings!r}")
        label = item.get("label")
        if isinstance(label, bool) or not str(label).isdecimal() or not 0 <= int(str(label)) < len(endings):
            raise ConfigError(f"{path}, line {line}: 'label' must be 0 to {len(endings) - 1}, not {label!r}")
        activity, ctx = item.get("activity_label"), _text(path, line, item, "ctx")
        ctx = hellaswag_text(f"{activity}: {ctx}" if activity else ctx)
        items.append(Choices(ctx, tuple(hellaswag_text(e) or e for e in endings), int(str(label)), line))
    return items


def read_text(path: Path) -> str:
    """A whole text file.

    Raises:
        ConfigError: it cannot be read, is not UTF-8, or is empty.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not text.strip():
        raise ConfigError(f"{path} is empty; a task needs at least one item")
    return text


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, text in enumerate(read_text(path).split("\n"), start=1):
        if not text.strip():
            continue
        try:
            item = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}, line {line}: not JSON ({error})") from None
        if not isinstance(item, dict):
            raise ConfigError(f"{path}, line {line}: must be a JSON object, not {type(item).__name__}")
        yield line, item


def _text(path: Path, line: int, item: dict[str, Any], name: str) -> str:
    value = item.get(name)
    if not isinstance(value, str) or not value.strip():
        has = ", ".join(item) or "nothing"
        raise ConfigError(f"{path}, line {line}: needs the text {name!r} (it has: {has})")
    return value
