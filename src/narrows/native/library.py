"""Finds and opens the compiled library once, or says why it cannot be used. Knows what it says of itself, no more."""

from __future__ import annotations

import ctypes
import hashlib
import os
from functools import cache
from pathlib import Path

__all__ = ["Library", "library", "why_absent"]

Library = ctypes.CDLL

_SWITCH = "NARROWS_NATIVE"


def library() -> Library | None:
    """The compiled library, or None where it is not to be used (see :func:`why_absent`)."""
    return _open()[0]


def why_absent() -> str:
    """Why there is no compiled code here, in one clause; empty where there is."""
    return _open()[1]


@cache
def _open() -> tuple[Library | None, str]:
    if os.environ.get(_SWITCH, "1") == "0":
        return None, f"{_SWITCH}=0"
    files = sorted(Path(__file__).parent.glob("_narrows*.so"))
    if not files:
        return None, "it was not built when narrows was installed (a C++ compiler is needed then)"
    try:
        opened = ctypes.CDLL(str(files[0]))
    except OSError as error:
        return None, f"{files[0].name} does not open ({error})"
    try:
        sources, compiled_for = opened.narrows_sources, opened.narrows_compiled_for
    except AttributeError:
        return None, f"{files[0].name} is none of this version's; install narrows anew"
    sources.restype = ctypes.c_char_p
    if sources().decode() != sources_digest():
        return None, f"{files[0].name} was built from other sources than those beside it; install narrows anew"
    compiled_for.restype = ctypes.c_char_p
    missing = sorted(set(compiled_for().decode().split()) - _cpu_flags())
    if missing:
        return (
            None,
            f"it was built for a CPU with {', '.join(missing)}, which this one lacks; install narrows anew here",
        )
    return opened, ""


def sources_digest() -> str:
    """Of the C++ sources beside this file: equal to what a library says that was built from them."""
    digest = hashlib.sha256()
    for file in sorted((Path(__file__).parent / "csrc").iterdir()):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _cpu_flags() -> set[str]:
    """The CPU's features by their names in /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())
