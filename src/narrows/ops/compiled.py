"""The compiled functions that ops call, their argument types declared once.

Knows names and types of ``native/csrc``; not tensors. Calls take addresses, sizes and strides as plain integers: a call
costs about a microsecond, which at decode is what a stage can afford.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch

from narrows.native import Library, library

__all__ = [
    "Pair",
    "attention_library",
    "brgemm",
    "gemm_library",
    "has_amx",
    "int8_library",
    "rope_library",
    "rows_library",
    "torch_brgemm",
]

Pair = ctypes.Array[ctypes.c_void_p]

_P, _L, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float

_DECLARING = threading.Lock()
"""Rank threads come to their first step together, and ctypes would give each a function object of its own."""

_GEMM = {
    "narrows_gemm_pack": (_P, _P, _L, _L, _L, _L, _L),
    "narrows_gemm_pack_int8": (_P, _P, _L, _L, _L, _L, _L),
    "narrows_linear": (_P, _L, _P, _L, _I, _P, _P, _P, _L, _L, _L, _I, _I, _P),
    "narrows_linear_few": (_P, _L, _P, _L, _P, _P, _L, _L, _L, _I),
    "narrows_gate_up": (_P, _L, _P, _L, _I, _P, _P, _P, _L, _L, _L, _I, _P),
    "narrows_experts": (_P, _L, _I, _P, _L, _P, _I, _P, _L, _L, _I, _P, _P, _L, _L, _L, _L, _P, _P, _L, _I, _P),
}
_ROWS = {
    "narrows_rms_norm": (_P, _L, _L, _P, _L, _L, _P, _L, _L, _L, _F, _I, _I),
    "narrows_add_rms_norm": (_P, _P, _P, _P, _P, _L, _L, _F, _I, _I),
    "narrows_add_rows": (_P, _P, _P, _L, _L, _I, _I),
    "narrows_latent_norm": (_P, _P, _L, _P, _L, _P, _L, _L, _L, _F, _I, _I),
    "narrows_router": (_P, _P, _P, _L, _P, _P, _L, _L, _L, _L, _L, _L, _I, _I, _I, _F, _I, _I),
    "narrows_embedding": (_P, _L, _P, _L, _P, _L, _L, _L),
    "narrows_pick": (_P, _P, _L, _L, _L),
    "narrows_argmax": (_P, _P, _L, _L, _L, _L, _I, _I),
    "narrows_encode_rows": (_P, _P, _P, _L, _L, _L, _I, _I),
    "narrows_decode_rows": (_P, _P, _P, _L, _L, _I, _I),
}
_ATTENTION = {
    "narrows_mla_prefill": (_P, _L, *(_P, _L, _L) * 2, _P, _L, _P, _L, _L, _P, _P, *(_L,) * 5, _F, _I, _P),
    "narrows_gqa_prefill": (*(_P, _L, _L) * 4, _P, _L, _L, _P, _L, _L, _L, _F, _I, _P),
    "narrows_per_head": (_P, _L, _L, _P, _L, _L, _P, _L, _L, _L, _L, _I),
    "narrows_mla_decode": (_P, _L, *(_P, _L, _L) * 2, _P, _L, _P, _L, _P, _P, _L, _P, _P, *(_L,) * 5, _F, _I),
    "narrows_gqa_decode": (*(_P, _L, _L) * 4, _P, _L, _P, _P, _L, _P, _L, _L, _L, _F, _I),
}
_ROPE = {
    "narrows_rope_rows": (_P, _L, _L, _P, _L, _L, _P, _P, _L, _L, _L, _I, _I, _I, _I),
    "narrows_rope_latents": (_P, _L, _L, _P, _L, _P, _P, _P, _L, _P, _L, _L, _L, _L, _I, _I, _I),
    "narrows_rope_heads": (_P, _L, _P, _P, _F, _P, _P, _P, _P, _P, _L, _L, _L, _L, _I, _I, _I),
}


@cache
def gemm_library() -> Library | None:
    """The library, where its products with packed weights run on this CPU (AVX-512 with bf16 products), or None."""
    return _declared("narrows_gemm", _GEMM)


@cache
def int8_library() -> Library | None:
    """:func:`gemm_library`, where its products with int8 weights run on this CPU too (AVX-512 VNNI), or None."""
    found = gemm_library()
    return found if found is not None and found.narrows_int8() else None


@cache
def rows_library() -> Library | None:
    """The library, where its row-wise functions run on this CPU (AVX-512), or None."""
    return _declared("narrows_rows", _ROWS)


@cache
def attention_library() -> Library | None:
    """The library, where its attention runs on this CPU (AVX-512 with bf16 products), or None."""
    return _declared("narrows_gemm", _ATTENTION)


@cache
def rope_library() -> Library | None:
    """The library, where its rotary embedding runs on this CPU (AVX-512), or None."""
    return _declared("narrows_rope", _ROPE)


@cache
def brgemm() -> Pair | None:
    """The product that the compiled ones leave many rows to: torch's, on CPUs with AMX; else None.

    It uses AMX's tiles (several times the rate of AVX-512) and takes weights packed as ours are. Its bits are oneDNN's
    affair, so who promises them (``batch_invariant``) does without.
    """
    return torch_brgemm() if has_amx() else None


@cache
def has_amx() -> bool:
    """Whether this CPU multiplies bf16 matrices in tiles."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


@cache
def torch_brgemm() -> Pair | None:
    """The addresses of torch's bf16 brgemm and of its release; None where this torch has them not."""
    opened = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    names = "_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb", "_ZN2at6native7cpublas14brgemm_releaseEb"
    try:
        return (_P * 2)(*(ctypes.cast(getattr(opened, name), _P).value for name in names))
    except AttributeError:
        return None


def _declared(there: str, signatures: Mapping[str, tuple[type, ...]]) -> Library | None:
    with _DECLARING:
        found = library()
        if found is None or not getattr(found, there)():
            return None
        for name, types in signatures.items():
            function = getattr(found, name)
            function.argtypes, function.restype = types, None
        return found
