"""For all tests: plans are priced by the catalogue, whatever profiles the user of this machine has."""

from __future__ import annotations

import os
import tempfile

collect_ignore = ["clients"]
"""Run by `make test-clients`, in a venv of its own."""


def pytest_configure() -> None:
    """Before anything is imported, and inherited by every process that tests start."""
    os.environ["NARROWS_PROFILES"] = os.path.join(tempfile.gettempdir(), "narrows-tests-have-no-profiles")
