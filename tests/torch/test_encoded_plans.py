"""Plans that encode rows, run: within a stated bound of one rank, and the same bits on every rank that holds a row.

`verify` holds both: a tolerance against one rank, and after every encoded gather and every stage the copies of all
ranks against each other. Its steps leave groups without rows, and ranks with 0 rows beside ranks with 1.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from narrows.arch.stages import RowSet
from narrows.comm import Communicator
from narrows.engine import program
from narrows.engine.config import EngineConfig, resolve
from narrows.evaluate.recorder import Spot
from narrows.evaluate.verify import ENCODED_TOLERANCE, TOLERANCE, LayoutReport, verify
from narrows.layout import Encoding
from narrows.plan.named import applicable_layouts
from narrows.plan.plan import OpKind, Plan

GATHERING = ("attn-tp-input-scattered", "norm-before-gather", "sequence-parallel")
TinyModel = Callable[..., Path]


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 67, (length,), generator=generator).tolist() for length in lengths]


def config_for(
    folder: Path, dp: int, tp: int, encode_rows: str = "int8-always", dtype: str = "float32"
) -> EngineConfig:
    return EngineConfig(model=str(folder), dp=dp, tp=tp, dtype=dtype, encode_rows=encode_rows, checked=True)


def run(
    engine_config: EngineConfig, *layouts: str, lengths: Iterable[int] = (23, 1, 5), **more: object
) -> list[LayoutReport]:
    names = layouts or [name for name in GATHERING if name in applicable(engine_config)]
    return list(verify(engine_config, prompts(*lengths), num_decode=2, layouts=names, **more).layouts)  # type: ignore[arg-type]


def applicable(engine_config: EngineConfig) -> tuple[str, ...]:
    resolved = resolve(engine_config)
    return applicable_layouts(resolved.config, resolved.mesh)


@pytest.mark.parametrize(
    ("kind", "dp", "tp"),
    [
        pytest.param("v3", 1, 2, marks=pytest.mark.full),
        ("v3", 1, 3),
        ("v3", 2, 1),
        pytest.param("v3", 2, 2, marks=pytest.mark.full),
        pytest.param("v3", 4, 2, marks=pytest.mark.full),
        ("v2-lite", 2, 2),
    ],
)
def test_encoded_rows_are_near_one_rank_and_equal_on_all(tiny_model: TinyModel, kind: str, dp: int, tp: int) -> None:
    reports = run(config_for(tiny_model(kind), dp, tp))
    assert reports
    for report in reports:
        assert report.ok, f"{report.layout}: {report.failure}"
        assert report.encodings == {Encoding.INT8} and report.tolerance == ENCODED_TOLERANCE[Encoding.INT8]
        assert 10 * TOLERANCE[torch.float32] < report.worst, "that rows are rounded must be seen"


@pytest.mark.parametrize("kind", ["llama-9", pytest.param("qwen2", marks=pytest.mark.full), "qwen3-moe"])
def test_families_without_a_latent(tiny_model: TinyModel, kind: str) -> None:
    for report in run(config_for(tiny_model(kind), 2, 2)):
        assert report.ok and report.encodings and report.worst > 1e-3, f"{report.layout}: {report.failure}"


@pytest.mark.parametrize(
    ("encode_rows", "dtype"),
    [
        ("int8-always", "bfloat16"),
        ("fp8-always", "bfloat16"),
        pytest.param("fp8-always", "float32", marks=pytest.mark.full),
    ],
)
def test_fp8_rows_and_bf16_models(tiny_model: TinyModel, encode_rows: str, dtype: str) -> None:
    encoding = Encoding(encode_rows.removesuffix("-always"))
    for report in run(config_for(tiny_model("v3"), 2, 2, encode_rows, dtype)):
        assert report.ok, f"{report.layout}: {report.failure}"
        assert report.encodings == {encoding} and report.worst > 1e-3


def test_plans_for_a_gpu_run_here(tiny_model: TinyModel) -> None:
    """Plans as the prices of another device make them: reduce-scatters, the router on slices, packed gathers."""
    seen: set[tuple[str, ...]] = set()

    def look(plan: Plan) -> Plan:
        seen.update(op.reads for _, op in plan.ops() if op.encoded)
        return plan

    engine_config = replace(config_for(tiny_model("v3"), 2, 2), device="h20")
    for layout in ("auto", "sequence-parallel"):
        (report,) = run(engine_config, layout, lengths=(60, 1, 5), tamper=look)
        assert report.ok, report.failure
    assert seen >= {("hidden",)}


def test_a_packed_gather_encodes_one_field_and_not_the_choice_of_experts(tiny_model: TinyModel) -> None:
    """The router where rows are scattered, its choice packed with encoded rows; no price here would choose it."""
    engine_config = config_for(tiny_model("v3"), 2, 2)
    packed = 0

    def pack(plan: Plan) -> Plan:
        nonlocal packed
        segments = []
        for segment in plan.segments:
            ops = list(segment.ops)
            at = [i for i, op in enumerate(ops) if op.name == "all_gather" and op.boundary == "router"]
            for i in at:
                gather, router = ops[i], ops[i + 1]
                here, names = gather.reads_at[0], ("hidden", "topk_ids", "topk_weights")
                ops[i] = replace(router, reads_at=(here,), writes_at=(here, here))
                ops[i + 1] = replace(
                    gather,
                    boundary="experts",
                    reads=names,
                    reads_at=(here,) * 3,
                    writes=names,
                    writes_at=(gather.leaves,) * 3,
                    encodings=(Encoding.INT8, Encoding.PLAIN, Encoding.PLAIN),
                )
                packed += 1
            segments.append(replace(segment, ops=tuple(ops)))
        return replace(plan, segments=tuple(segments))

    (report,) = run(engine_config, "sequence-parallel", tamper=pack)
    assert packed and report.ok, report.failure


def test_a_plan_that_encodes_nothing_has_the_narrow_tolerance(tiny_model: TinyModel) -> None:
    (report,) = run(config_for(tiny_model("v3"), 2, 2), "all-reduce")
    assert report.ok and not report.encodings and report.tolerance == TOLERANCE[torch.float32]


# -- faults ------------------------------------------------------------------------------------------------------------


def test_unencoded_own_rows_are_detected(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that keeps its own rows unrounded is nearer the truth, and disagrees with all others."""
    encode, decode = program.encode_rows, program.decode_rows
    own: dict[str, Tensor] = {}

    def encoding(x: Tensor, codes: torch.dtype, **more: Tensor) -> tuple[Tensor, Tensor]:
        own[threading.current_thread().name] = x
        return encode(x, codes, **more)

    def decoding(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        out, rank = decode(codes, scales, dtype), threading.current_thread().name
        if rank == "narrows rank 1":
            out[len(out) - len(own[rank]) :] = own[rank]  # of two ranks the second has the last rows
        return out

    monkeypatch.setattr(program, "encode_rows", encoding)
    monkeypatch.setattr(program, "decode_rows", decoding)
    (report,) = run(config_for(tiny_model("v3"), 1, 2), "attn-tp-input-scattered")
    first = report.first_difference
    assert first is not None and first.between_ranks and first.rank == 1, report.failure
    assert first.spot == Spot(0, "all_gather before latent_norm", "qkv_latent")
    assert "differs between ranks by" in report.failure


def test_scales_of_other_rows_are_a_difference(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = program.decode_rows
    monkeypatch.setattr(program, "decode_rows", lambda codes, scales, dtype: decode(codes, scales.roll(1, 0), dtype))
    reports = run(config_for(tiny_model("v3"), 2, 2))
    assert [report.layout for report in reports if report.ok] == []


def test_a_fault_behind_the_wide_tolerance_is_still_named(tiny_model: TinyModel) -> None:
    """Where every rank does the same wrong thing, an error of the size of a stage is found in an encoded plan too."""

    def without_norm_sum(plan: Plan) -> Plan:
        segments = [
            replace(
                segment,
                ops=tuple(
                    op
                    for op in segment.ops
                    if not (op.name == "all_reduce" and op.boundary == "post_attn_norm" and segment.layers == (0,))
                ),
            )
            for segment in plan.segments
        ]
        return replace(plan, segments=tuple(segments))

    engine_config = config_for(tiny_model("v3"), 2, 2)
    (report,) = run(engine_config, "norm-before-gather", tamper=without_norm_sum, validate=False)
    assert report.first_difference is not None
    assert report.first_difference.spot.stage == "post_attn_norm" and report.first_difference.spot.layer == 0


def test_an_encoded_op_is_labelled(tiny_model: TinyModel) -> None:
    """In checked mode the label reveals ranks that disagree on whether rows are encoded."""
    labels: set[str] = set()
    gather = Communicator.all_gather

    def watching(
        comm: Communicator, xs: list[Tensor], ranks: tuple, counts: tuple, label: str, **options: Any
    ) -> list[Tensor]:
        labels.add(label)
        return gather(comm, xs, ranks, counts, label, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Communicator, "all_gather", watching)
        run(config_for(tiny_model("v3"), 1, 2), "attn-tp-input-scattered")
    assert "layer 1 latent_norm: all_gather qkv_latent as int8" in labels


def test_selected_rows_before_the_head_may_be_encoded(tiny_model: TinyModel) -> None:
    found: list[tuple[str, RowSet]] = []

    def look(plan: Plan) -> Plan:
        found.extend((op.boundary, op.row_set) for _, op in plan.ops() if op.kind is OpKind.MOVE and op.encoded)
        return plan

    (report,) = run(config_for(tiny_model("v3"), 2, 2), "sequence-parallel", tamper=look)
    assert report.ok and ("lm_head", RowSet.LOGITS) in found
