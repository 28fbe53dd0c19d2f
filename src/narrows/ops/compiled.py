"""The compiled kernels that ops call, and torch's own product that some of them may use.

Calls take addresses, sizes and strides as plain integers: a call costs about a microsecond, which at decode is what a
stage can afford.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch

from narrows.native import kernels

__all__ = ["Pair", "brgemm", "has_amx", "has_avx512", "kernels", "torch_brgemm"]

Pair = ctypes.Array[ctypes.c_void_p]


@cache
def brgemm() -> Pair | None:
    """The product that the compiled ones leave many rows to: torch's, on CPUs with AMX; else None.

    It uses AMX's tiles (several times the rate of AVX-512) and takes weights packed as ours are. Its bits depend on the
    number of rows, so ``batch_invariant`` does without.
    """
    found = kernels()
    return torch_brgemm() if has_amx() and found is not None and found.target == "avx512bf16" else None


@cache
def has_amx() -> bool:
    """Whether this CPU multiplies bf16 matrices in tiles."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


@cache
def has_avx512() -> bool:
    """Whether torch and its libraries compute with AVX-512 (``ATEN_CPU_CAPABILITY`` and
    ``MKL_ENABLE_INSTRUCTIONS`` can hold them to less)."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


@cache
def torch_brgemm() -> Pair | None:
    """The addresses of torch's bf16 brgemm and of its release; None where this torch has them not."""
    opened = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    names = "_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb", "_ZN2at6native7cpublas14brgemm_releaseEb"
    try:
        return (ctypes.c_void_p * 2)(*(ctypes.cast(getattr(opened, name), ctypes.c_void_p).value for name in names))
    except AttributeError:
        return None
