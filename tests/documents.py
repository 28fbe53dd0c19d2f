"""Runs a command for its tables and for its JSON document at once."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from narrows.cli.main import main


def run_for_both(
    capsys: pytest.CaptureFixture[str], command: Sequence[str], code: int = 0
) -> tuple[str, dict[str, Any]]:
    """The printed tables, and the JSON document that ``--out`` wrote."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "document.json"
        assert main([*command, "--out", str(file)]) == code
        document: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    out = capsys.readouterr().out
    assert "--json" in command or '{"' not in out, "tables, and no JSON"
    return out, document
