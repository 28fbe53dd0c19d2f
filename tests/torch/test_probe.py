"""The rate of products that a machine is said to reach is that of the faster product it has."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from narrows.calibrate import probe
from narrows.calibrate.probe import Probe
from narrows.comm.communicator import Communicator
from narrows.ops.compiled import kernels
from narrows.ops.packed import PackedLinear


@pytest.mark.skipif(kernels() is None, reason="without compiled code there is one product")
@pytest.mark.parametrize(("plain_s", "packed_s"), [(5.0, 1.0), (1.0, 5.0)])
def test_the_faster_product_counts(plain_s: float, packed_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    now, rows = [0.0], []

    def timed(x: torch.Tensor, weight: Any) -> None:
        now[0] += packed_s if isinstance(weight, PackedLinear) else plain_s
        rows.append(x.shape[0])

    monkeypatch.setattr(probe, "linear", timed)
    monkeypatch.setattr(probe, "perf_counter", lambda: now[0])
    monkeypatch.setattr(probe, "GEMM_SHAPE", (512, 64, 32))
    comm = SimpleNamespace(mesh=SimpleNamespace(size=1), device=torch.device("cpu"), barrier=lambda *args: None)
    found = Probe(cast(Communicator, comm))
    assert found.gemm(torch.bfloat16) == 1.0
    assert rows.count(512) == 3 and max(rows[:2]) < 512  # the slower one is tried on few rows, and never on all
    assert found.gemm(torch.bfloat16) == 1.0
    assert rows.count(512) == 6 and len(rows) == 8  # it is chosen once
