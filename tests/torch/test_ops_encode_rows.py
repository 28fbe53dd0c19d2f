"""encode_rows and decode_rows: how far rows come back from where they were, and the same bits as the plain twin."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from narrows.ops.encode_rows import decode_rows, decode_rows_reference, encode_rows, encode_rows_reference

INT8, FP8 = torch.int8, torch.float8_e4m3fn
DTYPES = [torch.float32, torch.bfloat16]
TINY = torch.finfo(torch.float32).tiny
OPS = [(encode_rows, decode_rows), (encode_rows_reference, decode_rows_reference)]


def rows(seed: int, num: int, width: int, dtype: torch.dtype, spread: float = 12.0) -> Tensor:
    """Normal rows of very different magnitudes, some with one value that is far larger than the others."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((num, width), generator=generator)
    x[::3, :1] *= 300
    return (x * 10 ** (spread * (torch.rand((num, 1), generator=generator) * 2 - 1))).to(dtype)


shapes = st.tuples(st.integers(0, 10**6), st.integers(0, 9), st.integers(1, 70))


@pytest.mark.parametrize(("encode", "decode"), OPS, ids=["op", "twin"])
@settings(deadline=None, max_examples=60)
@given(shape=shapes, dtype=st.sampled_from(DTYPES))
@torch.inference_mode()
def test_int8_rows_come_back_within_half_a_scale(encode, decode, shape, dtype) -> None:
    x = rows(*shape, dtype)
    codes, scale = encode(x, INT8)
    assert (codes.dtype, codes.shape, scale.dtype, scale.shape) == (INT8, x.shape, torch.float32, (len(x), 1))
    # In float64; a quotient rounded in float32 may fall to the other side of a half by 127 x 2^-24 scales.
    off = (codes.double() * scale.double() - x.double()).abs()
    assert (off <= scale.double() * (0.5 + 2**-16)).all()
    assert torch.equal(scale, x.float().abs().amax(-1, keepdim=True) / 127)
    # The largest value keeps its place and its sign, and decoding rounds once, to the dtype.
    assert (codes.abs().amax(-1) == 127).all()
    assert torch.equal(decode(codes, scale, dtype), (codes.float() * scale).to(dtype))


@settings(deadline=None, max_examples=60)
@given(shape=shapes, dtype=st.sampled_from(DTYPES))
@torch.inference_mode()
def test_fp8_rows_come_back_within_a_sixteenth(shape, dtype) -> None:
    x = rows(*shape, dtype)
    codes, scale = encode_rows(x, FP8)
    assert codes.dtype == FP8 and torch.equal(scale, x.float().abs().amax(-1, keepdim=True) / 448)
    back = decode_rows(codes, scale, torch.float32).double()
    bound = torch.maximum(x.double().abs() / 16, scale.double() / 1024) * (1 + 2**-16)
    assert ((back - x.double()).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 15, 16, 17, 31, 32, 67, 512])
@pytest.mark.parametrize("num_rows", [0, 1, 12])
@torch.inference_mode()
def test_the_compiled_op_has_the_bits_of_the_torch_version(num_rows: int, width: int, dtype: torch.dtype) -> None:
    x = rows(width, num_rows, width, dtype, spread=37)  # beyond the normal numbers below, to infinity above
    if num_rows > 4:
        x[2] = 0
        x[3, width // 2] = float("nan")
        x[4, width - 1] = float("-inf")
    wider = torch.empty((num_rows, width + 5), dtype=dtype)
    wider[:, :width] = x
    (codes, scale), (twin_codes, twin_scale) = encode_rows(wider[:, :width], INT8), encode_rows_reference(x, INT8)
    assert torch.equal(codes, twin_codes) and torch.equal(scale.view(torch.int32), twin_scale.view(torch.int32))
    back, twin = decode_rows(codes, scale, dtype), decode_rows_reference(codes, scale, dtype)
    assert torch.equal(back.isnan(), twin.isnan()) and torch.equal(back.nan_to_num(), twin.nan_to_num())
    out = torch.full((num_rows + 2, width), 99, dtype=INT8)
    assert encode_rows(x, INT8, out=out[1:-1])[0].data_ptr() == out[1:-1].data_ptr()
    assert torch.equal(out[1:-1], codes) and (out[[0, -1]] == 99).all()


@pytest.mark.parametrize(("encode", "decode"), OPS, ids=["op", "twin"])
@pytest.mark.parametrize("code", [INT8, FP8], ids=str)
@torch.inference_mode()
def test_rows_that_have_no_scale(encode, decode, code: torch.dtype) -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[0.0, -0.0], [TINY, -TINY], [1.0, inf], [-inf, 2.0], [nan, 3.0], [4.0, -5.0], [3.4e38, -1.0]])
    codes, scale = encode(x, code)
    back = decode(codes, scale, torch.float32)
    assert torch.equal(back[:2], torch.zeros(2, 2)) and not scale[:2].any()
    assert back[2:5].isnan().all(), "a row that is not finite must not look finite"
    assert back[5:].isfinite().all() and back[5, 1] == -5 and back[6, 0] == pytest.approx(3.4e38, rel=1e-6)


@torch.inference_mode()
def test_a_row_does_not_depend_on_the_others() -> None:
    x = rows(3, 8, 40, torch.bfloat16)
    codes, scale = encode_rows(x, INT8)
    for t in range(8):
        alone, its = encode_rows(x[t : t + 1], INT8)
        assert torch.equal(alone[0], codes[t]) and torch.equal(its[0], scale[t])
