"""The compiled library is opened, or one clause gives the reason why not."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from array import array
from pathlib import Path

import pytest

from narrows.errors import ConfigError
from narrows.native import Target, kernels, library, targets, why_absent

MODULE = sys.modules["narrows.native.library"]
open_again = MODULE._open.__wrapped__  # type: ignore[attr-defined]


def test_either_a_library_or_a_reason():
    assert (library() is None) == bool(why_absent())


def test_switched_off(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NARROWS_NATIVE", "0")
    assert open_again() == (None, "NARROWS_NATIVE=0")


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "was not built"), (b"not a library", "_narrows.so does not open")]
)
def test_missing_or_broken_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes | None, reason: str):
    monkeypatch.delenv("NARROWS_NATIVE", raising=False)
    monkeypatch.setattr(MODULE, "__file__", str(tmp_path / "library.py"))
    if content is not None:
        (tmp_path / "_narrows.so").write_bytes(content)
    opened, why = open_again()
    assert opened is None and reason in why


def test_a_library_of_other_sources_is_refused(monkeypatch: pytest.MonkeyPatch):
    """One that an older checkout has left would be called with arguments that it does not have."""
    if library() is None:
        pytest.skip(f"no compiled library: {why_absent()}")
    monkeypatch.setattr(MODULE, "sources_digest", lambda: "0" * 64)
    opened, why = open_again()
    assert opened is None and "was built from other sources" in why


def test_a_file_that_an_older_build_has_left_is_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    if library() is None:
        pytest.skip(f"no compiled library: {why_absent()}")
    digest, built = MODULE.sources_digest(), Path(library()._name)
    monkeypatch.setattr(MODULE, "__file__", str(tmp_path / "library.py"))
    monkeypatch.setattr(MODULE, "sources_digest", lambda: digest)
    (tmp_path / "_narrows.cpython-311-x86_64-linux-gnu.so").write_bytes(b"not a library")
    assert "does not open" in open_again()[1]
    (tmp_path / "_narrows.so").symlink_to(built)
    opened, why = open_again()
    assert opened is not None and why == ""


there = pytest.mark.skipif(library() is None, reason=f"no compiled library: {why_absent()}")


@there
def test_the_best_target_of_this_cpu_is_the_default():
    can = [target.name for target in targets() if not target.missing]
    assert can[-1] == "baseline"
    # In a process of its own for each: one library has one target.
    for name in ["", *can]:
        code = "from narrows.native import kernels; print(kernels().target)"
        environment = {**os.environ, "NARROWS_TARGET": name}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == (name or can[0])


@there
def test_a_target_that_cannot_run_here_is_an_error_listing_the_others(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NARROWS_TARGET", "sse9")
    with pytest.raises(ConfigError, match=r"^NARROWS_TARGET=sse9: there is no such target; here it may be .*baseline$"):
        open_again()
    lacking = [Target("avx1024", ("avx1024f", "amx_fp64")), Target("baseline", ())]
    monkeypatch.setattr(MODULE, "_targets", lambda opened: lacking)
    monkeypatch.setenv("NARROWS_TARGET", "avx1024")
    with pytest.raises(ConfigError, match=r"this CPU lacks avx1024f, amx_fp64; here it may be baseline$"):
        open_again()


@there
def test_every_kernel_can_be_called_by_its_name():
    compiled = kernels()
    assert compiled is not None and {"linear", "rms_norm", "mla_decode"} <= set(compiled.names)
    assert len(compiled.linear.argtypes) == 14
    with pytest.raises(AttributeError, match="no kernel is called 'lineal'"):
        _ = compiled.lineal


@there
def test_row_wise_kernels_leave_the_same_bits_on_every_target():
    """But baseline, which has no fused multiply-add on x86."""
    before, left = kernels().target, {}
    for target in targets():
        if target.missing or target.name == "baseline":
            continue
        assert library().narrows_use(target.name.encode())
        left[target.name] = row_wise()
    library().narrows_use(before.encode())
    assert len(set(left.values())) <= 1, sorted(left)


def row_wise() -> bytes:
    """Results of some kernels for the same numbers, float32 and bf16, in widths with a remainder."""
    compiled, made, rng = kernels(), b"", random.Random(1)
    rows, width, experts = 3, 53, 24

    def numbers(count: int, wide: int) -> array:
        if wide:
            return array("f", [rng.uniform(-4, 4) for _ in range(count)])
        return array("H", [rng.randrange(0x3C00, 0x4100) | rng.randrange(2) << 15 for _ in range(count)])

    for wide in (1, 0):
        x, y, weight, out, total = (
            numbers(count, wide) for count in (rows * width,) * 2 + (width,) + (rows * width,) * 2
        )
        at = {name: value.buffer_info()[0] for name, value in zip("xywot", (x, y, weight, out, total), strict=True)}
        compiled.rms_norm(at["o"], width, 0, at["x"], width, 0, at["w"], rows, 1, width, 1e-6, wide, 1)
        made += out.tobytes()
        compiled.add_rms_norm(at["o"], at["t"], at["x"], at["y"], at["w"], rows, width, 1e-6, wide, 1)
        made += out.tobytes() + total.tobytes()
        gate, bias = array("f", [rng.uniform(-1, 1) for _ in range(experts * width)]), array("f", [0.0] * experts)
        ids, weights = array("i", [0] * 4 * rows), array("f", [0.0] * 4 * rows)
        routed = (ids, weights, gate, bias)
        ids_at, weights_at, gate_at, bias_at = (value.buffer_info()[0] for value in routed)
        for softmax in (0, 1):
            compiled.router(
                *(ids_at, weights_at, at["x"], width, gate_at, bias_at, rows, experts, width),
                *(4, 4, 2, softmax, 1, 1, 2.5, wide, 1),
            )
            made += ids.tobytes() + weights.tobytes()
        codes, scales = array("b", [0] * rows * width), array("f", [0.0] * rows)
        compiled.encode_rows(codes.buffer_info()[0], scales.buffer_info()[0], at["x"], width, rows, width, wide, 1)
        made += codes.tobytes() + scales.tobytes()
        compiled.decode_rows(at["o"], codes.buffer_info()[0], scales.buffer_info()[0], rows, width, wide, 1)
        made += out.tobytes()
        cos, sin = numbers(rows * 26, wide), numbers(rows * 26, wide)
        compiled.rope_rows(
            *(at["o"], width, 52, at["x"], width, 52, cos.buffer_info()[0], sin.buffer_info()[0]),
            *(rows, 1, 26, 1, wide, wide, 1),
        )
        made += out.tobytes()
    return made
