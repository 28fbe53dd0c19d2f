"""Around the imports of a process that is narrows' own: a command, or one of its ranks."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["quick_imports"]


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import without collections of garbage, since there is none yet; what is imported stays exempt from them."""
    # numpy comes with a BLAS that would start a thread for each core. Nothing here uses it, and the process that forks
    # ranks can be a fork of this one only while it has a single thread.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()
