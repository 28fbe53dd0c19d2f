"""Every compiled function says whether it can be replayed, and has a C++ test."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import narrows.native

SOURCES = Path(narrows.native.__file__).parent / "csrc"
FUNCTION = re.compile(r"^NARROWS_EXPORT (?:void|int) (narrows_\w+)\((.*?)\) \{\n(.*?)^\}", re.S | re.M)
EXPORTED = re.compile(r"^NARROWS_EXPORT [^;{]*?(narrows_\w+)\(", re.M)
TESTS = Path(__file__).parents[1] / "native"
NOT_WORK = {"narrows_shm_layout", "narrows_tape_end", "narrows_tape_free", "narrows_tape_run"}


def test_functions_that_take_arguments_are_taped_or_say_that_they_are_not() -> None:
    seen = set()
    for file in SOURCES.glob("*.cpp"):
        for name, arguments, body in FUNCTION.findall(file.read_text()):
            if not arguments.strip() or name in NOT_WORK:
                continue
            seen.add(name)
            given = ", ".join(argument.split()[-1].lstrip("*&") for argument in arguments.split(","))
            call = re.search(r"NARROWS_TAPED\((\w+)\((.*?)\)\);", body, re.S)
            if call:
                assert call[1] == name and " ".join(call[2].split()) == given, name
            else:
                assert body.lstrip().startswith("NARROWS_NOT_TAPED") or f"tape({name}, wire, call," in body, name
    assert {"narrows_linear", "narrows_experts", "narrows_mla_decode", "narrows_shm_reduce"} <= seen


def test_every_exported_function_is_called_by_a_test_under_sanitizers() -> None:
    sources, tests = (
        {file.name: file.read_text() for file in folder.iterdir() if file.is_file()} for folder in (SOURCES, TESTS)
    )
    exported = {name for text in sources.values() for name in EXPORTED.findall(text)}
    called = {name for text in tests.values() for name in re.findall(r"\b(narrows_\w+)[(,]", text)}
    included = {name for text in tests.values() for name in re.findall(r'#include "(\w+\.cpp)"', text)}
    assert {"narrows_linear", "narrows_tape_run", "narrows_shm_gather"} <= exported
    assert exported - called == set()
    assert included == {name for name in sources if name.endswith(".cpp")}


def test_tests_of_compiled_code_that_cannot_run_say_so_in_one_line(tmp_path: Path) -> None:
    """Without a compiler, and with one that has no sanitizers."""
    poor = tmp_path / "poor"
    poor.write_text("#!/bin/sh\necho cannot find -lasan\nexit 1\n")
    poor.chmod(0o755)
    for compiler in (tmp_path / "absent", poor):
        command = [sys.executable, str(TESTS / "run.py"), "address"]
        done = subprocess.run(
            command, env={**os.environ, "CXX": str(compiler)}, capture_output=True, text=True, check=True
        )
        assert done.stdout.count("\n") == 1 and done.stdout.startswith("skipped: ") and str(compiler) in done.stdout
