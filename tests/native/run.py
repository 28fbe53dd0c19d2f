"""Compiles the tests of the compiled code once for each sanitizer, runs them, fails on any report: make test-native.

Prints one line for each sanitizer that this machine cannot run. A sanitizer is used only if it reports the mistake
that ``planted.cpp`` has for it. Names of builds may be given: run.py address.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "src/narrows/native/csrc"
BUILD = HERE.parents[1] / "build/native-tests"
COMPILER = os.environ.get("CXX", "g++")
TIMEOUT_S = 900
"""A safety net: nothing here takes as long."""

FLAGS = (
    *("-std=c++20", "-O0", "-g1", "-Wall", "-Wno-tsan", "-ffp-contract=off"),
    *("-fno-sanitize-recover=all", "-D_GLIBCXX_ASSERTIONS"),
)
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=1:allocator_may_return_null=1:detect_stack_use_after_return=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:allocator_may_return_null=1",
}


def targets() -> dict[str, list[str]]:
    """The compiler's options for each target that kernels are compiled for on this kind of machine."""
    found = re.findall(
        r"^TARGET\((\w+),((?:\s*FEATURE\(\"\w+\"\))*)\s*\)$", (SOURCES / "targets.def").read_text(), re.M
    )
    options = {name: [f"-m{feature}" for feature in re.findall(r'"([^"]+)"', features)] for name, features in found}
    return {name: given for name, given in options.items() if not given or platform.machine() in ("x86_64", "AMD64")}


@dataclass(frozen=True)
class Build:
    """One build of all tests, with the kernels of every target."""

    name: str
    planted: tuple[str, ...]

    @property
    def flags(self) -> tuple[str, ...]:
        return (*FLAGS, f"-fsanitize={self.name}")


BUILDS = [
    Build("address", ("address", "leak")),
    Build("undefined", ("undefined",)),
    Build("thread", ("thread",)),
]


@dataclass(frozen=True)
class Source:
    """A file to be compiled; a kernel, for one target."""

    path: Path
    target: str = ""
    flags: tuple[str, ...] = ()

    @property
    def made(self) -> str:
        return f"{self.target}{self.path.stem}.o"


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    try:
        return subprocess.run(
            command, env={**os.environ, **OPTIONS}, text=True, timeout=TIMEOUT_S, check=False, **output
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, f"still at it after {TIMEOUT_S} s")


def why_not(build: Build) -> str:
    """Why a build cannot be made or trusted here, in one clause; empty where it can."""
    program = str(BUILD / f"{build.name}-planted")
    made = run([COMPILER, *build.flags, str(HERE / "planted.cpp"), "-o", program, "-pthread"])
    if made.returncode:
        return f"{COMPILER} cannot build with -fsanitize={build.name} ({made.stdout.strip().splitlines()[-1]})"
    if (clean := run([program])).returncode:
        return f"its runtime does not work here ({clean.stdout.strip().splitlines()[0]})"
    for mistake in build.planted:
        if not run([program, mistake]).returncode:
            return f"it does not report a planted mistake ({mistake})"
    return ""


def compile_one(build: Build, source: Source) -> str:
    """The object file of a source."""
    made = BUILD / build.name / source.made
    given = ("-fopenmp", f"-I{SOURCES}", '-DNARROWS_SOURCES="tests"', "-c", str(source.path), "-o", str(made))
    target = (f"-DNARROWS_TARGET={source.target}", *source.flags) if source.target else ()
    done = run([COMPILER, *build.flags, *given, *target])
    print(done.stdout, end="", file=sys.stderr)
    if done.returncode:
        raise SystemExit(f"{build.name}: {source.path.name} {source.target} does not compile")
    return str(made)


def sources(build: Build) -> list[Source]:
    """All of a build; a thread build has threads of its own (team.cpp). shm_test.cpp includes what it tests.

    In this order: where several targets have the same function of the standard library, the linker takes the first one.
    """
    tests = [HERE / "main.cpp", *HERE.glob("*_test.cpp"), *([HERE / "team.cpp"] if build.name == "thread" else [])]
    runtime = [path for path in (SOURCES / "runtime").glob("*.cpp") if path.name != "collectives.cpp"]
    kernels = sorted((SOURCES / "kernels").glob("*.cpp"))
    return [
        *(Source(path) for path in sorted([*tests, *runtime])),
        *(Source(path, name, tuple(flags)) for name, flags in reversed(targets().items()) for path in kernels),
    ]


def test(build: Build, objects: list[str]) -> bool:
    """Links and runs one build; prints one line, or all that it says if it fails."""
    program = str(BUILD / build.name / "tests")
    threads = ("-pthread",) if build.name == "thread" else ("-fopenmp",)
    linked = run([COMPILER, *build.flags, *objects, "-o", program, *threads])
    done = linked if linked.returncode else run([program])
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines or not lines[-1].endswith(" tests"):
        print(f"{build.name}: FAILED\n{done.stdout}", flush=True)
        return False
    skipped = [line for line in lines if line.startswith("skipped: ")]
    print("\n".join([*(f"{build.name}: {line}" for line in skipped), f"{build.name}: {lines[-1]}"]), flush=True)
    return True


def main(names: list[str]) -> int:
    if unknown := set(names) - {build.name for build in BUILDS}:
        raise SystemExit(f"no such build: {', '.join(sorted(unknown))}; there are {', '.join(b.name for b in BUILDS)}")
    if shutil.which(COMPILER) is None:
        print(f"skipped: all native tests: no C++ compiler ({COMPILER})")
        return 0
    there = []
    for build in BUILDS:
        if names and build.name not in names:
            continue
        (BUILD / build.name).mkdir(parents=True, exist_ok=True)
        if why := why_not(build):
            print(f"skipped: {build.name}: {why}", flush=True)
        else:
            there.append(build)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        work = {build: [pool.submit(compile_one, build, source) for source in sources(build)] for build in there}
        passed = [test(build, [made.result() for made in objects]) for build, objects in work.items()]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
