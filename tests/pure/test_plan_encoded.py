"""Encoded rows in plans: their price, their use where it pays, and their words in every report.

`test_plan_search.py` tests that the search stays exact with them, and where they are allowed.
"""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import pytest

from narrows.arch.presets import preset
from narrows.arch.weight_sharding import WeightSharding
from narrows.cli.plan_html import report_page
from narrows.cost.collectives import collective_price
from narrows.cost.devices import device
from narrows.cost.kernels import stream_price
from narrows.cost.price import Source
from narrows.cost.pricer import StepShape
from narrows.errors import ConfigError, PlanError
from narrows.layout import Encoding, Mesh, Move, MoveKind
from narrows.plan.plan import Op, OpKind, Plan
from narrows.plan.planner import Deployment, Planner
from narrows.plan.report.code import plan_code
from narrows.plan.report.explain import describe
from narrows.plan.report.plan_report import make_report
from narrows.plan.report.saved import read_plan, write_plan

TP8, DP2 = Mesh.of(dp=1, tp=8), Mesh.of(dp=2, tp=4)


def planner(encode_rows: str, mesh: Mesh = TP8, on: str = "h20", dtype: str = "fp8") -> Planner:
    deployment = Deployment(
        config=preset("deepseek-v3"), mesh=mesh, device=device(on), dtype=dtype, encode_rows=encode_rows
    )
    return Planner(deployment, WeightSharding())


def step_of(mesh: Mesh, rows: int) -> StepShape:
    return StepShape.of(mesh, (rows // mesh.num_groups,) * mesh.num_groups, phase="prefill", context=4096)


def encoded_ops(plan: Plan) -> list[Op]:
    return [op for _, op in plan.ops() if op.encoded]


def test_the_price_is_encoding_a_narrower_gather_and_decoding() -> None:
    plan = planner("int8").plan(step_of(TP8, 8000), "attn-tp-input-scattered")
    op = next(op for op in encoded_ops(plan) if op.reads == ("qkv_latent",))
    carried, both = 8000 * (2112 + 4), 2112 * 2 + 2112 + 4
    h20 = device("h20")
    parts = [
        collective_price(h20, "all_gather", 8, carried),
        stream_price(h20, 1000 * both),
        stream_price(h20, 8000 * both),
    ]
    assert op.nbytes == carried and op.rows == 8000
    assert op.ps == sum(part.ps for part in parts)
    assert op.source is Source.ROOFLINE and op.layout.title(TP8) == "SCATTERED"


def test_the_planner_encodes_where_that_pays() -> None:
    at = {rows: planner("int8").plan(step_of(TP8, rows)) for rows in (64, 512, 4096, 32768)}
    plain = {rows: planner("none").plan(step_of(TP8, rows)) for rows in at}
    assert [bool(plan.encodings) for plan in at.values()] == [False, False, True, True]
    assert at[64].signature() == plain[64].signature() and at[64].ps == plain[64].ps
    assert all(at[rows].ps < plain[rows].ps for rows in (4096, 32768))
    # Ranks of one host read each other's memory: fewer bytes there, more passes over rows here.
    for rows in at:
        assert not planner("int8", on="cpu-core", dtype="bf16").plan(step_of(TP8, rows)).encodings


def test_a_field_is_encoded_and_its_companions_are_not() -> None:
    ops = encoded_ops(planner("int8").plan(step_of(TP8, 16384)))
    packed = next(op for op in ops if len(op.reads) == 3)
    assert packed.reads == ("hidden", "topk_ids", "topk_weights")
    assert packed.encodings == (Encoding.INT8, Encoding.PLAIN, Encoding.PLAIN)
    assert packed.nbytes == 16384 * (7168 + 4 + 8 * 4 + 8 * 4)


# -- plans that must be refused ----------------------------------------------------------------------------------------


def tampered(plan: Plan, is_one: object, encodings: tuple[Encoding, ...]) -> Plan:
    found = 0
    segments = []
    for segment in plan.segments:
        ops = []
        for op in segment.ops:
            if is_one(op):  # type: ignore[operator]
                found += 1
                op = replace(op, encodings=encodings)
            ops.append(op)
        segments.append(replace(segment, ops=tuple(ops)))
    assert found
    return replace(plan, segments=tuple(segments))


def gather_before(boundary: str, *fields: str):
    return lambda step: step.name == "all_gather" and step.boundary == boundary and step.reads == fields


@pytest.mark.parametrize(
    ("layout", "is_one", "encodings", "says"),
    [
        (
            "all-reduce",
            gather_before("post_attn_norm", "hidden"),
            (Encoding.INT8,),
            "post_attn_norm would add hidden, whose rows came as int8, to the residual stream",
        ),
        (
            "all-reduce",
            lambda step: step.name == "all_reduce",
            (Encoding.INT8,),
            "encodes rows, but only an all_gather may",
        ),
        (
            "auto",
            gather_before("experts", "hidden", "topk_ids", "topk_weights"),
            (Encoding.PLAIN, Encoding.PLAIN, Encoding.FP8),
            "would send topk_weights as fp8; only hidden, qkv_latent may be encoded",
        ),
        ("auto", gather_before("mlp", "hidden"), (Encoding.INT8,) * 2, "has 2 encodings for 1 fields"),
        ("auto", lambda step: step.kind is OpKind.STAGE, (Encoding.INT8,), "only an all_gather may"),
    ],
)
def test_a_plan_that_encodes_a_forbidden_field_is_refused(layout: str, is_one, encodings, says: str) -> None:
    plan = planner("none", DP2).plan(step_of(DP2, 16384), layout)
    plan.validate()
    with pytest.raises(PlanError, match=says):
        tampered(plan, is_one, encodings).validate()


def test_an_encoding_that_is_not_known_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--encode-rows 'int4' is not known; it is one of none, int8, fp8"):
        planner("int4")


# -- what plans say ----------------------------------------------------------------------------------------------------


def test_a_saved_plan_keeps_its_encodings_and_one_without_them_still_reads(tmp_path: Path) -> None:
    config, file = preset("deepseek-v3"), tmp_path / "plan.json"
    plan = planner("int8").plan(step_of(TP8, 8192))
    write_plan(file, plan, config, WeightSharding())
    assert read_plan(file, config, TP8) == (plan, WeightSharding()) and plan.encodings == {Encoding.INT8}
    file.write_text(file.read_text().replace('"encodings"', '"as_older_files_have_none"'))
    older, _ = read_plan(file, config, TP8)
    assert not older.encodings and older.num_ops == plan.num_ops


@pytest.mark.slow
def test_words_code_tables_and_pages_name_the_encoding() -> None:
    by = planner("int8")
    plan = by.plan(step_of(TP8, 16384))
    assert "all-gather of hidden int8, topk into experts" in describe(plan)
    code = plan_code(plan)
    ast.parse(code)
    assert 'qkv_latent = all_gather(qkv_latent, over="tp", encode={"qkv_latent": "int8"})' in code
    report = make_report(by.deployment, step_of(TP8, 16384), ["auto"])
    document = report.document()
    assert document["encode_rows"] == "int8"
    travels = [op["encodings"] for op in document["layouts"][0]["ops"] if "int8" in op["encodings"]]
    assert ["int8", "plain", "plain"] in travels
    assert "all_gather of hidden int8, topk: SCATTERED to FULL" in report_page(report)
    (line,) = [line for line in report.why if line.startswith("auto with plain rows costs ")]
    assert "% more" in line and "int8" in line


def test_a_move_is_not_an_encoding() -> None:
    """The layouts of an encoded gather are those of the plain one: validity walks them alike."""
    for op in encoded_ops(planner("int8").plan(step_of(TP8, 16384))):
        assert isinstance(op.move, Move) and op.move.kind is MoveKind.ALL_GATHER
        assert op.reads_at == (op.move.src,) * len(op.reads) and op.writes_at == (op.move.dst,) * len(op.writes)
