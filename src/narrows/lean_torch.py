"""Imports torch in less time, in processes that are narrows' own: commands and their ranks.

A third of torch's import goes into modules that register what CPU ranks never call: results' shapes for tensors without
data (meta, fake), decompositions for compilers, and kernels of GPU languages. They are put off until somebody asks for
one of their attributes. Another third goes into collections of garbage that there is none of.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import LazyLoader
from types import ModuleType

__all__ = ["PUT_OFF", "importing", "put_off_registrations"]

PUT_OFF = frozenset(("torch._meta_registrations", "torch.distributed._meta_registrations", "torch._native"))
"""A torch that has no module of such a name imports whatever it has instead."""


class _PutOff:
    """A finder of modules, in front of the usual ones."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in PUT_OFF:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = LazyLoader(spec.loader)
        return spec


def put_off_registrations() -> None:
    """For processes of narrows' own, before torch is imported; not for GPUs, and not where others' models run, which
    may use tensors without data. Does nothing if torch is there already."""
    if "torch" not in sys.modules and not any(isinstance(finder, _PutOff) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PutOff())


@contextmanager
def importing(*, only_cpu: bool) -> Iterator[None]:
    """Around the imports of a process of narrows' own. ``only_cpu``: as for :func:`put_off_registrations`."""
    # numpy comes with a BLAS that would start a thread for each core. Nothing here uses it, and rank processes can be
    # copies of this one only while it has a single thread.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if only_cpu:
        put_off_registrations()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()
