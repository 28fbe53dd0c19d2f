"""How much random tests try: a share of it in `make test`, all of it in `make test-full`."""

from __future__ import annotations

import os

__all__ = ["examples"]


def examples(all_of_them: int) -> int:
    """A third, at least one, unless ``NARROWS_TESTS=full`` is in the environment. Each run draws others."""
    return all_of_them if os.environ.get("NARROWS_TESTS") == "full" else max(all_of_them // 3, 1)
