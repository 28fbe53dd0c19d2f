"""Compiles the tests of the compiled code once for each sanitizer, runs them, fails on any report: make test-native.

Says in one line what this machine cannot run. A sanitizer counts as there only if it reports the mistake that
``planted.cpp`` has for it. Names of builds may be given: run.py address.
"""

from __future__ import annotations

import os
import platform
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

FLAGS = ("-std=c++20", "-O0", "-g1", "-Wall", "-Wno-tsan", "-fno-sanitize-recover=all", "-D_GLIBCXX_ASSERTIONS")
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=1:allocator_may_return_null=1:detect_stack_use_after_return=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:allocator_may_return_null=1",
}


@dataclass(frozen=True)
class Build:
    """One build of all tests. ``march``: the CPU it is for; on lesser ones than this, the tests of what is left run."""

    name: str
    sanitizer: str
    planted: tuple[str, ...]
    march: str = "native"
    needs: frozenset[str] = frozenset()

    @property
    def flags(self) -> tuple[str, ...]:
        return (*FLAGS, f"-fsanitize={self.sanitizer}", f"-march={self.march}")


BUILDS = [
    Build("address", "address", ("address", "leak")),
    Build("undefined", "undefined", ("undefined",)),
    Build("thread", "thread", ("thread",)),
]
if platform.machine() == "x86_64":  # what is compiled for lesser CPUs, which a newer one runs too
    AVX2 = frozenset({"avx2", "fma", "f16c", "bmi2"})
    AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
    BUILDS += [
        Build("undefined-avx512", "undefined", ("undefined",), "x86-64-v4", AVX512),
        Build("undefined-avx2", "undefined", ("undefined",), "x86-64-v3", AVX2),
        Build("undefined-plain", "undefined", ("undefined",), "x86-64"),
    ]


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
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    if missing := sorted(build.needs - set(flags)):
        return f"this CPU lacks {', '.join(missing)}"
    program = str(BUILD / f"{build.name}-planted")
    made = run([COMPILER, *build.flags, str(HERE / "planted.cpp"), "-o", program, "-pthread"])
    if made.returncode:
        return f"{COMPILER} cannot build with -fsanitize={build.sanitizer} ({made.stdout.strip().splitlines()[-1]})"
    if (clean := run([program])).returncode:
        return f"its runtime does not work here ({clean.stdout.strip().splitlines()[0]})"
    for mistake in build.planted:
        if not run([program, mistake]).returncode:
            return f"it does not report a planted mistake ({mistake})"
    return ""


def compile_one(build: Build, source: Path) -> str:
    """The object file of a source. A thread build has threads of its own (team.cpp)."""
    made = BUILD / build.name / f"{source.stem}.o"
    given = ("-fopenmp", f"-I{SOURCES}", '-DNARROWS_SOURCES="tests"', "-c", str(source), "-o", str(made))
    done = run([COMPILER, *build.flags, *given])
    print(done.stdout, end="", file=sys.stderr)
    if done.returncode:
        raise SystemExit(f"{build.name}: {source.name} does not compile")
    return str(made)


def sources(build: Build) -> list[Path]:
    """The largest first, so that no core waits for it at the end."""
    found = [HERE / "main.cpp", *HERE.glob("*_test.cpp"), *([HERE / "team.cpp"] if build.name == "thread" else [])]
    return sorted(found, key=lambda file: (file.name not in {"experts_test.cpp", "gemm_test.cpp"}, file.name))


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
    skipped = [line for line in lines if line.startswith("skipped: ")] if build.march == "native" else []
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
