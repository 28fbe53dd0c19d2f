"""Compiled code in plain C++ (csrc/), called by ctypes: kernels of ops, collectives among processes, captured steps.

It takes addresses, sizes and strides. Whoever calls it (ops/, comm/) has a path in torch for where it is not there.
"""

from narrows.native.captured_calls import CapturedCalls
from narrows.native.library import Kernels, Library, Status, Target, kernels, library, status, targets, why_absent

__all__ = [
    "CapturedCalls",
    "Kernels",
    "Library",
    "Status",
    "Target",
    "kernels",
    "library",
    "status",
    "targets",
    "why_absent",
]
