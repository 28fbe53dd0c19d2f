"""Gives memory that is free back to the system.

The allocator keeps what was freed, for each thread apart: hundreds of megabytes after some large bodies or grammars.
"""

from __future__ import annotations

import ctypes

__all__ = ["give_back"]


def give_back() -> None:
    """Give free memory back now. Only glibc has a call for it; elsewhere nothing happens."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
