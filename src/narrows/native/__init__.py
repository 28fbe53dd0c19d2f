"""Compiled code in plain C++ (csrc/), called by ctypes: kernels of ops, sums and waits of comm.

Lowest room but errors: knows addresses, sizes and strides; not tensors, layouts or ranks. Who calls it (ops/, comm/)
declares the functions it uses, and has a path in torch for where the library is not there.
"""

from narrows.native.captured_calls import CapturedCalls
from narrows.native.library import Library, library, why_absent

__all__ = ["CapturedCalls", "Library", "library", "why_absent"]
