"""Finds and opens the compiled library once, or says why it cannot be used; says which targets it has, and which runs.

A target is an instruction set that all kernels are compiled for (csrc/targets.def). The best one that this CPU can run
is taken when the library is opened; ``NARROWS_TARGET`` names another.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from narrows.errors import ConfigError

__all__ = [
    "Kernels",
    "Library",
    "Status",
    "Target",
    "kernels",
    "library",
    "sources_digest",
    "status",
    "targets",
    "why_absent",
]

Library = ctypes.CDLL

_SWITCH = "NARROWS_NATIVE"
_TARGET = "NARROWS_TARGET"
_TYPES = {"P": ctypes.c_void_p, "L": ctypes.c_int64, "I": ctypes.c_int, "F": ctypes.c_float}


@dataclass(frozen=True, slots=True)
class Target:
    """An instruction set that the library has kernels for. ``missing``: what this CPU lacks to run them."""

    name: str
    missing: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """What of the compiled code is here.

    ``known``: the targets of the sources for this CPU's family, the best first; ``compiled``: those that the library
    has, none if it cannot be used. ``running``: the one that runs; empty where none does, which is for ``why_none``.
    ``forced``: what ``NARROWS_TARGET`` says.
    """

    known: tuple[str, ...]
    compiled: tuple[Target, ...]
    running: str
    why_none: str
    forced: str


class Kernels:
    """The kernels of the target that runs, as functions by the names of csrc/kernels.def, with their argument types."""

    def __init__(self, opened: Library) -> None:
        opened.narrows_running.restype = ctypes.c_char_p
        self.target = opened.narrows_running().decode()
        self.names = []
        for name, letters, address in _bindings(opened):
            setattr(self, name, ctypes.CFUNCTYPE(None, *(_TYPES[letter] for letter in letters))(address))
            self.names.append(name)

    def __getattr__(self, name: str) -> Callable[..., None]:
        raise AttributeError(f"no kernel is called {name!r}")


class _Binding(ctypes.Structure):
    """``Binding`` of csrc/runtime/dispatch.cpp."""

    _fields_ = (("name", ctypes.c_char_p), ("letters", ctypes.c_char_p), ("function", ctypes.c_void_p))


def _bindings(opened: Library) -> Iterator[tuple[str, str, int]]:
    opened.narrows_kernels.restype = ctypes.POINTER(_Binding)
    for binding in opened.narrows_kernels():
        if binding.name is None:
            return
        yield binding.name.decode(), binding.letters.decode(), binding.function


def library() -> Library | None:
    """The compiled library, or None where it is not to be used (see :func:`why_absent`).

    Raises ConfigError where ``NARROWS_TARGET`` names a target that cannot run here.
    """
    return _open()[0]


def why_absent() -> str:
    """Why there is no compiled code here, in one clause; empty where there is."""
    return _open()[1]


@cache
def kernels() -> Kernels | None:
    """The kernels of the target that runs, or None where there is no compiled code."""
    opened = library()
    return None if opened is None else Kernels(opened)


def targets() -> tuple[Target, ...]:
    """What the library has kernels for, the best first; none where there is no compiled code."""
    opened = library()
    return () if opened is None else _targets(opened)


def _targets(opened: Library) -> tuple[Target, ...]:
    opened.narrows_targets.restype = ctypes.c_char_p
    lines = (line.split() for line in opened.narrows_targets().decode().splitlines())
    return tuple(Target(name, tuple(missing)) for name, *missing in lines)


def status() -> Status:
    """What there is, what runs, and why not more. Raises nothing, whatever the environment asks for."""
    found, why_none = _find()
    running = ""
    try:
        if (used := kernels()) is not None:
            running = used.target
        elif found is not None:
            why_none = why_absent()
    except ConfigError as error:  # NARROWS_TARGET names what cannot run
        why_none = str(error)
    return Status(
        known=_known(),
        compiled=() if found is None else _targets(found),
        running=running,
        why_none=why_none,
        forced=os.environ.get(_TARGET, ""),
    )


def _known() -> tuple[str, ...]:
    """The targets that csrc/targets.def has for this CPU's family: those that need features are for x86."""
    text = (Path(__file__).parent / "csrc" / "targets.def").read_text(encoding="utf-8")
    found = re.findall(r"^TARGET\((\w+),\s*([^)]*)", text, re.MULTILINE)
    return tuple(name for name, needs in found if not needs or platform.machine() in ("x86_64", "AMD64"))


@cache
def _open() -> tuple[Library | None, str]:
    if os.environ.get(_SWITCH, "1") == "0":
        return None, f"{_SWITCH}=0"
    opened, why = _find()
    if opened is not None and (forced := os.environ.get(_TARGET)):
        _use(opened, forced)
    return opened, why


def _find() -> tuple[Library | None, str]:
    """The library beside this file, whether or not it is to be used, or why it cannot be."""
    found, why = None, "it was not built when narrows was installed (a C++ compiler is needed then)"
    for file in sorted(Path(__file__).parent.glob("_narrows*.so")):  # older builds may have left theirs
        found, why = _check(file)
        if found is not None:
            break
    return found, why


def _check(file: Path) -> tuple[Library | None, str]:
    try:
        _load_openmp()
        opened = ctypes.CDLL(str(file))
    except OSError as error:
        from_where = "; it comes with torch, or with the system's compiler" if "libgomp" in str(error) else ""
        return None, f"{file.name} does not open ({error}{from_where})"
    try:
        sources = opened.narrows_sources
    except AttributeError:
        return None, f"{file.name} is none of this version's; install narrows again"
    sources.restype = ctypes.c_char_p
    if sources().decode() != sources_digest():
        return None, f"{file.name} was built from other sources than those beside it; install narrows again"
    return opened, ""


def _load_openmp() -> None:
    """Load torch's OpenMP runtime where torch is installed, so that both use one team of threads, and none is needed
    from the system."""
    spec = None if "torch" in sys.modules else find_spec("torch")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        for file in Path(folder, "lib").glob("libgomp*.so*"):
            ctypes.CDLL(str(file))


def _use(opened: Library, name: str) -> None:
    if opened.narrows_use(name.encode()):
        return
    there = {target.name: target.missing for target in _targets(opened)}
    why = f"this CPU lacks {', '.join(there[name])}" if name in there else "there is no such target"
    can = ", ".join(target for target, missing in there.items() if not missing)
    raise ConfigError(f"{_TARGET}={name}: {why}; here it may be {can}")


def sources_digest() -> str:
    """Of the C++ sources beside this file: equal to what a library says that was built from them."""
    digest = hashlib.sha256()
    for file in sorted(path for path in (Path(__file__).parent / "csrc").rglob("*") if path.is_file()):
        digest.update(file.read_bytes())
    return digest.hexdigest()
