"""Weights in blocks: what their bytes mean, and the compiled products, against the gguf package's own numbers.

Kernels round rows by groups of 32 before they multiply, so what they compute is known nearly to the bit: the product,
in float64, of rows rounded here and of the gguf package's numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from block_lab import random_blocks, reference
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from narrows import native
from narrows.arch.block_formats import BLOCK_FORMATS, BlockFormat
from narrows.ops.blocks import BlockLinear, block_kind, block_linear, block_values, round_groups
from narrows.ops.compiled import kernels
from narrows.ops.embedding import embedding, embedding_reference
from narrows.ops.experts import experts_mlp, experts_mlp_reference
from narrows.ops.int8 import Quantization
from narrows.ops.linear import linear
from narrows.ops.mlp import mlp
from narrows.ops.packed import (
    Held,
    LinearParts,
    LinearWeight,
    PackedLinear,
    empty_experts,
    empty_gate_up,
    empty_linear,
    fill,
    plain,
)

BF16, CPU = torch.bfloat16, torch.device("cpu")
Q4_0, Q8_0, Q4_K, Q5_K, Q6_K = BLOCK_FORMATS
compiled = pytest.mark.skipif(kernels() is None, reason="products with blocks are not compiled for this CPU")
every_format = pytest.mark.parametrize("blocks", BLOCK_FORMATS, ids=str)
CLOSE = 2**-8
"""Of a result rounded to bf16 once."""


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    with torch.inference_mode():
        yield
    torch.set_num_threads(num_threads)


def rows(num_rows: int, width: int, *, seed: int = 1, size: float = 1.0) -> Tensor:
    return (torch.randn((num_rows, width), generator=torch.Generator().manual_seed(seed)) * size).to(BF16)


def filled(ready: LinearWeight, bytes_ON: Tensor, first: int = 0) -> LinearWeight:
    """In two pieces, as a checkpoint's tensors come."""
    cut = bytes_ON.shape[0] // 3
    fill(ready, first, bytes_ON[:cut])
    fill(ready, first + cut, bytes_ON[cut:])
    return ready


def held(bytes_ON: Tensor, blocks: BlockFormat) -> LinearWeight:
    num_inputs = bytes_ON.shape[1] // blocks.nbytes * blocks.columns
    return filled(empty_linear(bytes_ON.shape[0], num_inputs, BF16, CPU, blocks), bytes_ON)


def exact(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """Of rows as kernels round them."""
    return round_groups(x_TI).double() @ weight_OI.double().t()


def assert_close(got: Tensor, want: Tensor, *, rtol: float = CLOSE) -> None:
    """To a rounding of each, and of sums to float32."""
    size = float(want.abs().max()) if want.numel() else 0.0
    torch.testing.assert_close(got.double(), want.double(), rtol=rtol, atol=2e-5 * size)


@every_format
def test_a_format_is_what_the_gguf_package_says(blocks: BlockFormat) -> None:
    encoding = GGMLQuantizationType(blocks.encoding)
    assert (blocks.name, (blocks.columns, blocks.nbytes)) == (encoding.name, GGML_QUANT_SIZES[encoding])
    covered = sorted(byte for start, size, _ in blocks.parts for byte in range(start, start + size))
    assert covered == list(range(blocks.nbytes))
    assert all(size % unit == 0 for _, size, unit in blocks.parts)


@every_format
def test_bytes_mean_what_the_gguf_package_says(blocks: BlockFormat) -> None:
    found = random_blocks(blocks, 40, 768)
    assert torch.equal(block_values(found, blocks), reference(found, blocks))


@compiled
@every_format
@pytest.mark.parametrize("num_outputs", [1, 31, 32, 33, 100])
def test_panels_hold_a_weights_own_bytes(blocks: BlockFormat, num_outputs: int) -> None:
    found = random_blocks(blocks, num_outputs, 512)
    ready = held(found, blocks)
    assert isinstance(ready, PackedLinear) and ready.shape == (num_outputs, 512)
    assert torch.equal(plain(ready), reference(found, blocks))
    assert ready.panels.nbytes == -(-num_outputs // 32) * 32 * found.shape[1]


@compiled
@every_format
@pytest.mark.parametrize("num_rows", [0, 1, 2, 3, 4, 5, 7, 8, 12, 13, 25, 97, 130])
def test_products_are_those_of_the_gguf_packages_numbers(blocks: BlockFormat, num_rows: int) -> None:
    for num_outputs, num_blocks in ((1, 1), (33, 3), (64, 9), (100, 2)):
        num_inputs = num_blocks * blocks.columns
        found = random_blocks(blocks, num_outputs, num_inputs, seed=num_outputs)
        x_TI, bias_O = rows(num_rows, num_inputs), rows(1, num_outputs, seed=2)[0]
        want = exact(x_TI, reference(found, blocks))
        assert_close(linear(x_TI, held(found, blocks)), want)
        assert_close(linear(x_TI, held(found, blocks), bias_O), want + bias_O.double())


def test_rows_are_rounded_by_groups_to_half_a_step() -> None:
    x_TI = rows(20, 320).float()
    x_TI[0] = 0
    groups = x_TI.unflatten(1, (-1, 32))
    steps = groups.abs().amax(dim=2, keepdim=True) / 127
    rounded = round_groups(x_TI).unflatten(1, (-1, 32))
    assert ((rounded - groups).abs() <= steps * 0.50001).all()
    assert torch.equal(round_groups(x_TI[:, 32:64]), round_groups(x_TI)[:, 32:64])


@compiled
@every_format
def test_sums_are_float32_and_the_twins(blocks: BlockFormat) -> None:
    """Before they are rounded, which hides what is smaller than a 256th."""
    found, x_TI = random_blocks(blocks, 64, 2048), rows(30, 2048)
    ready = held(found, blocks)
    assert isinstance(ready, PackedLinear)
    want = exact(x_TI, reference(found, blocks))
    size = float(want.abs().max())
    for num_rows in (1, 3, 8, 30):
        got = torch.empty((num_rows, 64), dtype=torch.float32)
        found_kernels = kernels()
        assert found_kernels is not None
        found_kernels.linear(
            got.data_ptr(), 64, x_TI.data_ptr(), 2048, *ready.given, None, num_rows, 64, 2048, 1, 1, None
        )
        torch.testing.assert_close(got.double(), want[:num_rows], rtol=0, atol=3e-6 * size)
    twin = block_linear(x_TI.float(), BlockLinear(found, blocks))
    torch.testing.assert_close(twin.double(), want, rtol=0, atol=3e-6 * size)


@compiled
@every_format
def test_blocks_of_zeros_and_of_extreme_scales(blocks: BlockFormat) -> None:
    num_inputs = 4 * blocks.columns
    x_TI = rows(5, num_inputs)
    x_TI[0] = 0
    x_TI[1, :32] = 0
    x_TI[2] *= 1e30
    x_TI[3] *= 1e-30
    for size in (0.0, 1e-6, 1.0, 4e4 * 0.02):
        found = random_blocks(blocks, 40, num_inputs, size=size / max(1.0, 40 * (blocks.columns == 256)))
        found[3] = 0
        want = exact(x_TI, reference(found, blocks))
        got = linear(x_TI, held(found, blocks))
        for row in range(5):
            assert_close(got[row], want[row])
        assert not got[0].any() and not got[:, 3].any()


@compiled
@every_format
def test_codes_at_both_ends_are_exact(blocks: BlockFormat) -> None:
    """All bits of a code, with the largest numbers of a row: what saturating instructions would get wrong."""
    for byte in (0x00, 0x7F, 0x80, 0xFF):
        found = random_blocks(blocks, 33, 2 * blocks.columns)
        for start, size, unit in blocks.parts:
            if unit == 4:
                found.unflatten(1, (-1, blocks.nbytes))[..., start : start + size] = byte
        for sign in (1.0, -1.0):
            x_TI = torch.full((9, 2 * blocks.columns), sign, dtype=BF16)
            assert_close(linear(x_TI, held(found, blocks)), exact(x_TI, reference(found, blocks)))


@compiled
@every_format
def test_rows_that_are_not_finite_give_nothing_finite(blocks: BlockFormat) -> None:
    x_TI = rows(3, 512)
    x_TI[0, 40], x_TI[1, 300] = float("nan"), float("inf")
    y_TO = linear(x_TI, held(random_blocks(blocks, 40, 512), blocks)).float()
    assert y_TO[0].isnan().all() and not y_TO[1].isfinite().any() and y_TO[2].isfinite().all()


@compiled
@every_format
def test_a_rows_bits_depend_on_nothing_but_the_row(blocks: BlockFormat) -> None:
    ready, x_TI = held(random_blocks(blocks, 200, 1024), blocks), rows(140, 1024)
    torch.set_num_threads(1)
    alone = torch.cat([linear(x_TI[t : t + 1], ready) for t in range(140)])
    for num_rows in (2, 4, 5, 12, 24, 100, 140):
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            assert torch.equal(linear(x_TI[:num_rows], ready), alone[:num_rows]), (num_rows, num_threads)


@compiled
@every_format
@pytest.mark.parametrize("inner", [1, 16, 21, 64])
def test_gates_beside_ups(blocks: BlockFormat, inner: int) -> None:
    gate, up = (random_blocks(blocks, inner, 512, seed=seed) for seed in (1, 2))
    ready = empty_gate_up(inner, 512, BF16, CPU, blocks)
    filled(filled(ready, gate), up, inner)
    assert torch.equal(plain(ready), torch.cat((reference(gate, blocks), reference(up, blocks))))
    down, x_TH = random_blocks(Q8_0, 96, 32, seed=3), rows(7, 512)
    down_HF = rows(96, inner, seed=4)
    inner_TF = torch.nn.functional.silu(exact(x_TH, reference(gate, blocks))) * exact(x_TH, reference(up, blocks))
    got = mlp(x_TH, ready, down_HF)
    torch.testing.assert_close(
        got.double(), inner_TF @ down_HF.double().t(), rtol=0.02, atol=0.01 * float(got.abs().max())
    )
    if inner == 64:
        down = random_blocks(Q8_0, 96, 64, seed=3)
        got = mlp(x_TH, ready, held(down, Q8_0))
        want = exact(inner_TF.to(BF16), reference(down, Q8_0))
        torch.testing.assert_close(got.double(), want, rtol=0.02, atol=0.01 * float(want.abs().max()))


def test_parts_that_are_not_held_alike_are_one_weight() -> None:
    """As q and k in 4 bits and v in 6, or a part that is not in blocks at all."""
    found = {blocks: random_blocks(blocks, num, 512, seed=num) for blocks, num in ((Q4_K, 48), (Q6_K, 17))}
    plain_part = rows(9, 512, seed=5)
    parts = LinearParts(
        (
            empty_linear(48, 512, BF16, CPU, Q4_K),
            empty_linear(17, 512, BF16, CPU, Q6_K),
            empty_linear(9, 512, BF16, CPU),
        )
    )
    fill(parts, 0, found[Q4_K][:20])
    fill(parts, 20, found[Q4_K][20:])
    fill(parts, 48, found[Q6_K])
    fill(parts, 65, plain_part)
    assert parts.shape == (74, 512)
    x_TI, bias_O = rows(6, 512), rows(1, 74)[0]
    want = torch.cat([*(exact(x_TI, reference(raw, blocks)) for blocks, raw in found.items())], dim=1)
    want = torch.cat((want, x_TI.double() @ plain_part.double().t()), dim=1)
    assert_close(linear(x_TI, parts), want, rtol=2**-7)
    out = torch.empty((6, 80), dtype=BF16)[:, 3:77]
    assert_close(linear(x_TI, parts, bias_O, out=out), want + bias_O.double(), rtol=2**-7)
    assert torch.equal(plain(parts)[:48], reference(found[Q4_K], Q4_K))


@every_format
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])
def test_an_embedding_in_blocks(blocks: BlockFormat, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not packed:
        monkeypatch.setattr("narrows.ops.packed.kernels", lambda: None)
    found = random_blocks(blocks, 75, 512)
    table = held(found, blocks)
    assert isinstance(table, PackedLinear | BlockLinear)
    ids_T = torch.tensor([100, 174, 131, 132, 99, 175, -1, 115, 115])
    want = reference(found, blocks).to(BF16)[(ids_T - 100).clamp(0, 74)]
    want[4:7] = 0
    got = embedding(ids_T, table, 100)
    torch.testing.assert_close(got, want, rtol=2**-7, atol=0)
    assert torch.equal(got, want) or blocks is Q6_K  # whose products of three numbers need 25 bits
    assert torch.equal(embedding(ids_T, table, 100, out=torch.empty((9, 600), dtype=BF16)[:, 2:514]), got)
    assert torch.equal(embedding_reference(ids_T, table, 100), want)
    assert embedding(ids_T[:0], table, 100).shape == (0, 512)


EXPERTS = {
    # of gate and up, of down, of the shared MLP's gate and up, and of its down
    "of one kind": (Q4_K, Q4_K, Q4_K, Q4_K),
    "of several": (Q4_K, Q6_K, Q8_0, Q5_K),
    "without a shared one": (Q5_K, Q8_0, None, None),
    "with a shared one in bf16": (Q6_K, Q4_0, Quantization.NONE, Quantization.NONE),
    "with a shared one in parts": (Q4_K, Q4_K, Q8_0, Quantization.NONE),
}


def of_kind(kind: Held, num_outputs: int, num_inputs: int, seed: int) -> Tensor:
    if isinstance(kind, BlockFormat):
        return random_blocks(kind, num_outputs, num_inputs, seed=seed)
    return rows(num_outputs, num_inputs, seed=seed, size=0.05)


@pytest.mark.parametrize("kinds", EXPERTS.values(), ids=EXPERTS)
@pytest.mark.parametrize("num_rows", [0, 1, 9, 40])
def test_experts(kinds: tuple[Held, Held, Held | None, Held | None], num_rows: int) -> None:
    num_experts, hidden, inner, top_k = 5, 512, 256, 2
    stacks = empty_experts(num_experts, inner, hidden, BF16, CPU, (kinds[0], kinds[1]))
    for e in range(num_experts):
        for first, seed in ((0, 10), (inner, 30)):
            fill(stacks[0][e], first, of_kind(kinds[0], inner, hidden, seed + e))
        fill(stacks[1][e], 0, of_kind(kinds[1], hidden, inner, 50 + e))
    shared = None
    if kinds[2] is not None and kinds[3] is not None:
        gate_up = empty_gate_up(inner, hidden, BF16, CPU, kinds[2])
        down = empty_linear(hidden, inner, BF16, CPU, kinds[3])
        fill(gate_up, 0, of_kind(kinds[2], inner, hidden, 70))
        fill(gate_up, inner, of_kind(kinds[2], inner, hidden, 71))
        fill(down, 0, of_kind(kinds[3], hidden, inner, 72))
        shared = (gate_up, down)
    x_TH = rows(num_rows, hidden)
    generator = torch.Generator().manual_seed(0)
    scores_TE = torch.rand((num_rows, num_experts + 2), generator=generator)
    weights_TK, ids_TK = scores_TE.topk(top_k)
    found = experts_mlp(x_TH, ids_TK, weights_TK, *stacks, first_expert=1, shared=shared)
    want = experts_mlp_reference(x_TH.float(), ids_TK, weights_TK, *stacks, first_expert=1, shared=shared)
    assert found.dtype == BF16
    size = float(want.abs().max()) if want.numel() else 0.0
    torch.testing.assert_close(found.float(), want, rtol=0.05, atol=0.02 * size)


def test_kinds_are_those_of_the_kernels() -> None:
    """The numbers that `kernels.h` gives them, in the order of its names."""
    header = Path(native.__file__).parent / "csrc/kernels.h"
    names = header.read_text(encoding="utf-8").partition("enum Kind : int {")[2].partition("}")[0].split(",")
    assert [names[block_kind(blocks)].strip() for blocks in BLOCK_FORMATS] == [blocks.name for blocks in BLOCK_FORMATS]
