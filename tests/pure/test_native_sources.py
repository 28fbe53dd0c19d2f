"""Rules of the compiled code: every kernel has a C++ test, and algorithms contain no intrinsic or #if."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import narrows.native
from narrows.native import library, targets

SOURCES = Path(narrows.native.__file__).parent / "csrc"
KERNEL = re.compile(r"^KERNEL\((\w+), (CAPTURED|NOT_CAPTURED),", re.M)
EXPORTED = re.compile(r"^NARROWS_EXPORT [^;{]*?(narrows_\w+)\(", re.M)
TESTS = Path(__file__).parents[1] / "native"


def test_every_kernel_and_every_exported_function_is_called_by_a_test_under_sanitizers() -> None:
    tests = "".join(file.read_text() for file in TESTS.iterdir() if file.suffix in (".cpp", ".h"))
    kernels = {name for name, _ in KERNEL.findall((SOURCES / "kernels.def").read_text())}
    exported = {name for file in SOURCES.rglob("*.cpp") for name in EXPORTED.findall(file.read_text())}
    assert {"linear", "experts", "mla_decode", "sum"} <= kernels
    assert {"narrows_capture_run", "narrows_shm_gather", "narrows_use"} <= exported
    assert kernels - set(re.findall(r"\bcall::(\w+)\(", tests)) == set()
    assert exported - set(re.findall(r"\b(narrows_\w+)[(,]", tests)) == set()


def test_algorithms_have_no_intrinsic_and_no_condition_on_the_cpu() -> None:
    for file in (SOURCES / "kernels").iterdir():
        text = file.read_text()
        assert not re.search(r"\b_mm|\b__m\d|immintrin|__AVX|arm_neon", text), file.name
        assert set(re.findall(r"^# *if.*", text, re.M)) <= {"#ifndef NARROWS_TARGET"}, file.name


@pytest.mark.skipif(shutil.which("objdump") is None or library() is None, reason="no objdump, or nothing compiled")
def test_no_target_calls_a_function_of_a_better_one() -> None:
    """What several targets have in common, such as functions of the standard library, is linked once: it has to be the
    one that all of its callers' CPUs can run. Registers of 256 bits come with AVX2, those of 512 bits with AVX-512."""
    if "avx512bf16" not in {target.name for target in targets()}:
        pytest.skip("no AVX-512 targets on this kind of CPU")
    file = next(Path(narrows.native.__file__).parent.glob("_narrows*.so"))
    listing = subprocess.run(["objdump", "-d", str(file)], capture_output=True, text=True, check=True).stdout
    bodies = dict(re.findall(r"^[0-9a-f]+ <([^>]+)>:\n(.*?)\n\n", listing, re.S | re.M))
    calls = {name: set(re.findall(r"(?:call|jmp) .*<([^+>]+)>", body)) for name, body in bodies.items()}

    def reached(mark: str) -> set[str]:
        found, ahead = set(), [name for name in bodies if mark in name]
        assert ahead, mark
        while ahead:
            name = ahead.pop()
            if name in bodies and name not in found:
                found.add(name)
                ahead += calls[name]
        return found

    for mark, register in (("8baseline", "%[yz]mm"), ("narrows_", "%[yz]mm"), ("4avx2", "%zmm")):
        assert {name for name in reached(mark) if re.search(register, bodies[name])} == set(), mark
    for mark, register in (
        ("4avx2", "%ymm"),
        ("6avx512", "%zmm"),
        ("10avx512bf16", "vdpbf16ps"),
        ("10avx512bf16", "vpdpbusd"),
    ):
        assert any(register in bodies[name] for name in reached(mark)), (mark, register)


def test_native_tests_that_cannot_run_print_one_line(tmp_path: Path) -> None:
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
