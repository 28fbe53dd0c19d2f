"""Models against transformers with the kernels of each lesser target that this CPU can run.

The tests of this folder run on the best target that the CPU has; here some of them run again, in a process of its own
for each target. Kernels alone are tested for all targets in tests/native.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from narrows.native import kernels, targets

HERE = Path(__file__).parent
RUNNING = kernels()
OTHERS = [target.name for target in targets() if not target.missing and RUNNING and target.name != RUNNING.target]
AGAIN = (
    "test_features_against_transformers.py::test_bfloat16_stays_close",
    "test_ops_packed.py",
    "test_ops_int8.py",
    "test_ops_blocks.py",
    "test_batch_invariance_ops.py",
)
LESSER = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
"""Holds torch's libraries to AVX2 too."""


@pytest.mark.skipif(not OTHERS, reason="no other target runs here")
@pytest.mark.parametrize(
    "target", [pytest.param(name, marks=() if name == "avx2" else pytest.mark.full) for name in OTHERS]
)
def test_models_stay_close_to_transformers_on_every_target(target: str) -> None:
    command = [sys.executable, "-m", "pytest", "-x", "-n", "0", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *(str(HERE / test) for test in AGAIN)],
        env={**os.environ, "NARROWS_TARGET": target, **({} if target == "avx512" else LESSER)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]


@pytest.mark.skipif(not Path("/proc/self/maps").is_file() or kernels() is None, reason="no /proc, or nothing compiled")
def test_there_is_one_openmp_runtime_whichever_is_opened_first() -> None:
    """Two would have a team of threads each, which take each other's cores."""
    code = "import re; print(*sorted(set(re.findall(r'/.*libgomp.*', open('/proc/self/maps').read()))))"
    found = []
    for imports in (
        "narrows.native; narrows.native.library(); import torch",
        "torch, narrows.native as n; n.library()",
    ):
        line = [sys.executable, "-c", f"import {imports}; {code}"]
        found.append(subprocess.run(line, capture_output=True, text=True, check=True).stdout.split())
    assert found[0] == found[1] and len(found[0]) == 1
