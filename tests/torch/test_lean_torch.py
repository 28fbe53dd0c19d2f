"""The import of torch without its registrations: what is put off, and when it comes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from narrows.lean_torch import PUT_OFF

CODE = """
import sys
from narrows.lean_torch import PUT_OFF, put_off_registrations
put_off_registrations()
import torch

def loaded():
    return sorted(name for name in PUT_OFF if type(sys.modules[name]).__name__ == "module")
"""


def said(code: str) -> str:
    line = [sys.executable, "-c", CODE + code]
    return subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip()


def test_the_modules_are_put_off_and_cpu_tensors_need_none() -> None:
    steps = """
from narrows.engine.llm import LLM
with LLM("narrows-demo", dtype="bfloat16", threads=1) as llm:
    text = llm.generate([[{"role": "user", "content": "What is 47 + 38?"}]], max_tokens=8)[0].text
print(loaded(), text)
"""
    assert said(steps) == "[] 85"


@pytest.mark.parametrize("name", sorted(PUT_OFF))
def test_each_comes_when_an_attribute_is_asked_for(name: str) -> None:
    assert f"'{name}'" in said(f"sys.modules[{name!r}].__file__; print(loaded())")


def test_nothing_changes_for_a_process_that_has_torch() -> None:
    code = "import torch, sys; before = list(sys.meta_path)\n"
    code += "from narrows.lean_torch import put_off_registrations as p; p(); sys.exit(sys.meta_path != before)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
