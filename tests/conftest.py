"""For all tests: plans are priced by the catalogue; the user's own profiles are ignored."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
"""Folder of the modules that all tests share."""

from patience import FACTOR  # noqa: E402 - found by the line above

collect_ignore = ["clients"]
"""Run by `make test-clients`, in a venv of its own."""


def pytest_configure() -> None:
    """Before anything is imported, and inherited by every process that tests start."""
    os.environ["NARROWS_PROFILES"] = os.path.join(tempfile.gettempdir(), "narrows-tests-have-no-profiles")
    os.environ.setdefault("PYTEST_TIMEOUT", f"{600 * FACTOR:.0f}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers on two cores, whose models are tiny
