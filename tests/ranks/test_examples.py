"""The examples that start ranks, run as a reader runs them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from patience import PATIENCE_S

ROOT = Path(__file__).parents[2]


def output(example: str) -> str:
    line = [sys.executable, f"examples/{example}"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False, timeout=10 * PATIENCE_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_text_is_generated_under_two_layouts_and_streamed() -> None:
    answers = output("generate_text.py").split("--- ")
    assert answers[1] == "What is 47 + 38?\n85\n"
    assert answers[2].endswith("#### 33\n") and answers[3].endswith("#### 33\n")


def test_a_served_chat_is_streamed_by_openais_client() -> None:
    assert output("serve_and_stream.py") == "85\n"
