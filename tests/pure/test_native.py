"""The compiled library is opened, or it is said in one clause why not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from narrows.native import library, why_absent

MODULE = sys.modules["narrows.native.library"]
open_anew = MODULE._open.__wrapped__  # type: ignore[attr-defined]


def test_either_a_library_or_a_reason():
    assert (library() is None) == bool(why_absent())


def test_switched_off(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NARROWS_NATIVE", "0")
    assert open_anew() == (None, "NARROWS_NATIVE=0")


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "was not built"), (b"not a library", "_narrows.so does not open")]
)
def test_missing_or_broken_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes | None, reason: str):
    monkeypatch.delenv("NARROWS_NATIVE", raising=False)
    monkeypatch.setattr(MODULE, "__file__", str(tmp_path / "library.py"))
    if content is not None:
        (tmp_path / "_narrows.so").write_bytes(content)
    opened, why = open_anew()
    assert opened is None and reason in why


def test_a_library_of_other_sources_is_refused(monkeypatch: pytest.MonkeyPatch):
    """One that an older checkout has left would be called with arguments that it does not have."""
    if library() is None:
        pytest.skip(f"no compiled library: {why_absent()}")
    monkeypatch.setattr(MODULE, "sources_digest", lambda: "0" * 64)
    opened, why = open_anew()
    assert opened is None and "was built from other sources" in why


def test_a_library_for_another_cpu_is_refused_with_what_lacks(monkeypatch: pytest.MonkeyPatch):
    if library() is None or not library().narrows_compiled_for():
        pytest.skip(f"no compiled library with features to lack: {why_absent()}")
    features = set(library().narrows_compiled_for().decode().split())
    lacking = min(features)
    monkeypatch.setattr(MODULE, "_cpu_flags", lambda: features - {lacking})
    opened, why = open_anew()
    assert opened is None and f"built for a CPU with {lacking}, which this one lacks" in why
