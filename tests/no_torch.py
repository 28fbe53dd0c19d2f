"""A pytest plugin (``-p no_torch``): torch cannot be imported, as on a machine that has none. For `make quick`."""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec


class _NoTorch(MetaPathFinder):
    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] == "torch":
            raise ModuleNotFoundError(f"{fullname} is not there for tests that need no torch", name=fullname)
        return None


def pytest_configure() -> None:
    """Only as a plugin, because collecting doctests of all modules imports this one too."""
    sys.meta_path.insert(0, _NoTorch())
