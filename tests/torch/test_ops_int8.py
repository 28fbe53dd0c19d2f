"""int8 weights: rounding, the compiled products against plain torch, and whole models.

Sums of int8 rows are exact integers, so compiled and plain ones differ by the last rounding at most (the compiler may
fuse the scale with the bias).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from narrows.engine.config import EngineConfig, resolve
from narrows.engine.llm import LLM
from narrows.engine.program import Wrap
from narrows.engine.worker import Worker
from narrows.errors import ConfigError
from narrows.evaluate.verify import verify
from narrows.ops.compiled import kernels
from narrows.ops.experts import experts_mlp
from narrows.ops.int8 import Int8Linear, Int8Stack, Quantization, empty_int8, int8_linear, quantize_rows
from narrows.ops.linear import linear
from narrows.ops.mlp import mlp
from narrows.ops.packed import LinearWeight, PackedLinear, empty_experts, empty_gate_up, empty_linear, fill, plain

BF16, CPU = torch.bfloat16, torch.device("cpu")
INT8, WEIGHT_ONLY = Quantization.INT8, Quantization.INT8_WEIGHT_ONLY
BOTH = pytest.mark.parametrize("quantization", [INT8, WEIGHT_ONLY], ids=lambda q: q.value)
compiled = pytest.mark.skipif(kernels() is None, reason="int8 products are not compiled for this CPU")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


def packed(weight_OI: Tensor, quantization: Quantization) -> LinearWeight:
    """Filled in two pieces, as a checkpoint's tensors come."""
    ready = empty_linear(*weight_OI.shape, BF16, CPU, quantization)
    cut = weight_OI.shape[0] // 3
    fill(ready, 0, weight_OI[:cut])
    fill(ready, cut, weight_OI[cut:])
    return ready


def twin(weight_OI: Tensor, quantization: Quantization) -> Int8Linear:
    ready = empty_int8(1, *weight_OI.shape, CPU, quantization)[0]
    ready.fill(0, weight_OI)
    return ready


def assert_rounded_alike(got: Tensor, want: Tensor) -> None:
    size = float(want.float().abs().max()) if want.numel() else 0.0
    torch.testing.assert_close(got, want, rtol=2**-7, atol=1e-4 * size)


@given(st.integers(0, 5), st.integers(0, 40), st.floats(1e-30, 1e30), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_rows_are_within_half_a_step_of_themselves(num_rows: int, width: int, size: float, seed: int) -> None:
    x = drawn(num_rows, width, seed=seed).float() * size
    values, scales = quantize_rows(x)
    assert values.shape == x.shape and scales.shape == (num_rows,) and values.dtype == torch.int8
    assert (values.abs() <= 127).all()
    error = (values.float() * scales[:, None] - x).abs()
    assert (error <= 0.5001 * scales[:, None]).all()


def test_zeros_have_scale_zero_and_no_nan() -> None:
    values, scales = quantize_rows(torch.zeros(2, 8))
    assert not values.any() and not scales.any()
    assert not int8_linear(torch.zeros(2, 8, dtype=BF16), twin(torch.zeros(3, 8), INT8)).any()


def test_sums_equal_int64_arithmetic() -> None:
    """Against int64, with the largest numbers there can be and as many inputs as are allowed."""
    x, weight = torch.full((1, 1 << 16), -3.0, dtype=BF16), torch.full((1, 1 << 16), 5.0, dtype=BF16)
    want = -15.0 * (1 << 16)
    for held in (twin(weight, INT8), packed(weight, INT8)):
        assert float(linear(x, held)) == pytest.approx(want, rel=2**-7)


@compiled
@BOTH
@pytest.mark.parametrize(
    ("num_rows", "num_inputs", "num_outputs"),
    [
        *[(0, 8, 8), (1, 64, 32), (1, 1, 1), (2, 7, 33), (5, 4, 1), (12, 37, 70)],
        *[(13, 130, 31), (40, 1024, 96), (250, 384, 64)],
    ],
)
def test_a_product_equals_the_torch_version(
    num_rows: int, num_inputs: int, num_outputs: int, quantization: Quantization
) -> None:
    weight, x, bias = drawn(num_outputs, num_inputs), drawn(num_rows, num_inputs, seed=1), drawn(num_outputs, seed=2)
    if num_rows > 1:
        x[1] = 0
    ours, its = packed(weight, quantization), twin(weight, quantization)
    assert isinstance(ours, PackedLinear)
    assert torch.equal(plain(ours), plain(its))
    assert_rounded_alike(linear(x, ours, bias), int8_linear(x, its, bias))
    room = torch.full((num_rows, num_outputs + 5), 9.0, dtype=BF16)
    linear(x, ours, out=room[:, 2:-3])
    assert_rounded_alike(room[:, 2:-3], int8_linear(x, its))
    assert (room[:, :2] == 9).all() and (room[:, -3:] == 9).all()


@compiled
@BOTH
@pytest.mark.parametrize("column", [0, 5, 36])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_nan_stays_nan(wrong: float, column: int, quantization: Quantization) -> None:
    """In its own row: a NaN that became a number would hide its cause."""
    weight, x = drawn(33, 37), drawn(3, 37, seed=1)
    x[1, column] = wrong
    for held in (packed(weight, quantization), twin(weight, quantization)):
        assert linear(x, held).isfinite().all(dim=1).tolist() == [True, False, True]


@compiled
@BOTH
def test_a_rows_bits_do_not_depend_on_the_batch(quantization: Quantization) -> None:
    weight = packed(drawn(96, 200), quantization)
    x = drawn(300, 200, seed=1) * torch.logspace(-3, 3, 300).unsqueeze(1).to(BF16)
    whole = linear(x, weight)
    for rows in (slice(0, 1), slice(7, 10), slice(100, 125), slice(299, 300)):
        assert torch.equal(linear(x[rows], weight), whole[rows])


@compiled
@BOTH
@pytest.mark.parametrize("num_rows", [0, 1, 3, 40])
def test_experts_and_mlp_equal_the_torch_versions(num_rows: int, quantization: Quantization) -> None:
    num_experts, num_inner, hidden, top_k = 8, 24, 70, 3
    gate_up, down = drawn(num_experts, 2 * num_inner, hidden) / 8, drawn(num_experts, hidden, num_inner, seed=1) / 5
    ours = empty_experts(num_experts, num_inner, hidden, BF16, CPU, (quantization, quantization))
    its = tuple(empty_int8(*weight.shape, CPU, quantization) for weight in (gate_up, down))
    for e in range(num_experts):
        for held in (ours, its):
            fill(held[0][e], 0, gate_up[e, :num_inner])
            fill(held[0][e], num_inner, gate_up[e, num_inner:])
            fill(held[1][e], 0, down[e])
        assert torch.equal(plain(ours[0][e]), plain(its[0][e])) and torch.equal(plain(ours[1][e]), plain(its[1][e]))
    shared = empty_gate_up(num_inner, hidden, BF16, CPU, quantization)
    fill(shared, 0, gate_up[0, :num_inner])
    fill(shared, num_inner, gate_up[0, num_inner:])
    x = drawn(num_rows, hidden, seed=2)
    # Ids of experts held elsewhere too, and most experts without a row.
    ids = torch.rand((num_rows, num_experts + 4), generator=torch.Generator().manual_seed(3)).argsort(dim=1)[:, :top_k]
    weights = torch.rand((num_rows, top_k), generator=torch.Generator().manual_seed(4))
    of_shared = {"ours": (shared, ours[1][0]), "its": (its[0][0], its[1][0])}
    got = experts_mlp(x, ids, weights, *ours, first_expert=2, shared=of_shared["ours"])
    want = experts_mlp(x, ids, weights, *its, first_expert=2, shared=of_shared["its"])
    # The twin rounds gate and up before the activation; a row of the inner products may round to another int8 for it.
    size = float(want.float().abs().max()) if num_rows else 0.0
    assert got.shape == want.shape and ((got - want).float().abs() <= 0.03 * size).all()
    assert ((mlp(x, *of_shared["ours"]) - mlp(x, *of_shared["its"])).float().abs() <= 0.03 * size).all()


@BOTH
@pytest.mark.parametrize("kind", ["v3", "qwen3-moe", "llama-9"])
def test_a_sharded_int8_model_is_close_to_one_rank(
    kind: str, quantization: Quantization, tiny_model: Callable[..., Path]
) -> None:
    """Log-probabilities of a prompt: bf16 alone against int8 on one rank and on meshes. The median, since in a tiny
    random model a few rows choose other experts."""
    prompt = [(7 * i + 3) % 67 for i in range(60)]

    def scores(**options: object) -> Tensor:
        with LLM(tiny_model(kind), dtype="bfloat16", **options) as llm:
            (done,) = llm.score([prompt])
        return torch.tensor([score.logprob for score in done.prompt_logprobs])

    exact = scores()
    for mesh in ({}, {"tp": 2}, {"dp": 2, "tp": 2}, {"dp": 3}):
        found = scores(quantization=quantization.value, **mesh)
        error = float((found - exact).abs().median())
        assert 0 < error < 0.2, f"{mesh}: {error}"  # another token's would differ by 1 and more


def test_without_compiled_code_the_torch_versions_run(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def text() -> tuple[str, tuple[int, ...]]:
        with LLM(tiny_model("v3"), dtype="bfloat16", quantization="int8") as llm:
            (done,) = llm.generate([[5, 6, 7, 8]], max_tokens=6, ignore_eos=True)
            return " ".join(llm.resolved.notes), done.token_ids

    before, tokens = text()
    monkeypatch.setattr("narrows.ops.packed.kernels", lambda: None)
    monkeypatch.setattr("narrows.engine.config.kernels", lambda: None)
    after, same = text()
    assert "plain torch" in after and (kernels() is None or "plain torch" not in before)
    assert tokens[:2] == same[:2]


def test_only_supported_weights_are_quantised(tiny_model: Callable[..., Path]) -> None:
    folder = str(tiny_model("v3"))
    with pytest.raises(ConfigError, match="none, int8, int8-weight-only"):
        resolve(EngineConfig(model=folder, quantization="int4"))
    if kernels() is not None:  # else it runs, and is priced, as plain torch
        with pytest.raises(ConfigError, match="has no price for int8"):
            resolve(EngineConfig(model=folder, quantization="int8", dtype="bfloat16", device="h100"))
    workers: list[Worker] = []

    def watched(worker: Worker) -> Wrap:
        workers.append(worker)
        return lambda layer, op, reads, writes, operation: operation

    with LLM(folder, dtype="bfloat16", quantization="int8", wrap=watched):
        layer, model = workers[0].model.layers[1], workers[0].model
        quantised = (layer.qkv_a_CH, layer.q_proj, layer.o_proj, layer.experts_gate_up_EF2H, layer.shared_down_HF)
        assert all(isinstance(held, Int8Linear | Int8Stack) or held.int8 is not None for held in quantised)
        wide = (model.lm_head_VH, layer.w_uv_NVR)
        assert all(isinstance(held, Tensor) or held.int8 is None for held in wide)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_verify_allows_for_rounding_per_rank(dtype: str) -> None:
    engine_config = EngineConfig(model="narrows-demo", tp=2, dtype=dtype, quantization="int8-weight-only")
    report = verify(engine_config, [list(range(40, 70)), [5, 6, 7]], num_decode=2, layouts=("auto",))
    assert report.ok and report.tolerance == 0.1 and report.layouts[0].worst > 1e-4
