"""step_block: arrays side by side in one block, and back."""

import numpy as np
import pytest
import torch

from narrows.ops.step_block import StepBlock, packed, unpacked
from narrows.ops.wide_product import wide_bmm, wide_mm


def test_arrays_of_all_types_and_shapes_come_back():
    arrays = [
        np.arange(5),
        np.zeros((0, 3), dtype=np.int64),
        np.array([0.1, -2.5, np.inf]),
        np.array([True, False, True]),
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.zeros(0, dtype=np.bool_),
        np.arange(-4, 0),
    ]
    block = packed(arrays)
    assert block.dtype == torch.uint8 and block.dim() == 1
    got = unpacked(block, arrays)
    for tensor, array in zip(got, arrays, strict=True):
        assert torch.equal(tensor, torch.from_numpy(array)) and tensor.dtype == torch.from_numpy(array).dtype
        assert tensor.untyped_storage().data_ptr() == block.untyped_storage().data_ptr()
        assert (tensor.data_ptr() - block.data_ptr()) % 16 == 0 or not tensor.numel()


def test_on_cpu_each_part_is_there_at_once():
    block = StepBlock(torch.device("cpu"))
    ids, shares = block.put([3, 1, 2]), block.put([0.5], np.float64)
    assert not block.is_remote and ids.tensor.tolist() == [3, 1, 2] and ids.tensor.dtype == torch.int64
    assert shares.tensor.dtype == torch.float64
    block.send()
    with pytest.raises(AssertionError, match="has been sent"):
        block.put([1])


def test_a_part_of_a_device_is_there_once_it_is_sent():
    part = StepBlock(torch.device("meta")).put([1, 2])
    with pytest.raises(AssertionError, match="has not been sent"):
        _ = part.tensor


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@torch.inference_mode()
def test_wide_products_keep_their_sums_wide(dtype):
    """Equal to products of widened factors, which is what they stand for; a product rounded to 16 bits is not."""
    generator = torch.Generator().manual_seed(0)
    x, y = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in ((4, 6, 64), (4, 64, 5))
    )
    got, exact = wide_bmm(x, y), torch.bmm(x.double(), y.double())
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(wide_mm(x[0], y[0]).double(), exact[0], rtol=1e-5, atol=1e-5)
