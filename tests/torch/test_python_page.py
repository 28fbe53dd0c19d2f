"""The Python code of docs/python.md runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "python.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_planning(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(BLOCKS[0], "docs/python.md", "exec"), {})
    out = capsys.readouterr().out
    assert "all-reduce 0.9" in out and "auto\n  all-reduce costs" in out


def test_generating(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(BLOCKS[1], "docs/python.md", "exec"), {})
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "85 stop" and {line[0] for line in out[1:-1]} >= {"0", "1"} and out[-1].startswith("[-")


def test_no_block_is_left_out() -> None:
    assert len(BLOCKS) == 2
