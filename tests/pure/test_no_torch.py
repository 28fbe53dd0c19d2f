"""The plugin of `make quick`: it blocks torch when configured, and not otherwise."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def imported(code: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-c", f"{code}\nimport torch.version"]
    return subprocess.run(line, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)


def test_the_plugin_blocks_torch_only_when_configured() -> None:
    """Imported alone it once kept torch from every later test of its process."""
    kept_out = imported("import no_torch; no_torch.pytest_configure()")
    assert kept_out.returncode == 1 and "torch is not there for tests that need no torch" in kept_out.stderr
    finders = "[type(each).__name__ for each in sys.meta_path]"
    assert imported(f"import no_torch, sys; sys.exit('_NoTorch' in {finders})").returncode == 0
