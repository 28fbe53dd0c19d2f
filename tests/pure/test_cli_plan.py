"""`narrows plan` as it is used: JSON and tables, the published switches, wrong input, no torch, under a second."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from patience import PATIENCE_S

from narrows.cli.main import main

FP8 = "the checkpoint's weights are fp8 in blocks of 128 x 128, "
DEQUANTISED = "which are dequantised when they are loaded"
PUBLISHED = "plan deepseek-v3 --device h20 --dp 1 --tp 8 --rows 32768 --dtype fp8"
SMALL = "plan deepseek-v2-lite --device h100 --dp 2 --tp 2 --rows 1024"


def run(capsys: pytest.CaptureFixture[str], line: str) -> str:
    """Output of the command, which must succeed and write nothing to stderr."""
    code = main(line.split())
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return out


def document(capsys: pytest.CaptureFixture[str], line: str) -> dict[str, Any]:
    found = json.loads(run(capsys, f"{line} --json"))
    assert isinstance(found, dict)
    return found


# -- JSON --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_six_published_figures(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, f"{PUBLISHED} --layout all-reduce --layout attn-tp-input-scattered")
    before, after = found["layouts"]
    assert (before["name"], after["name"]) == ("all-reduce", "attn-tp-input-scattered")
    published = {"qkv_a_proj": (205.1, 26.14), "communication": (267.1, 249.63), "norm": (82.303, 43.398)}
    for price_class, (was, became) in published.items():
        assert before["totals_ms"][price_class] == pytest.approx(was, rel=0.05)
        assert after["totals_ms"][price_class] == pytest.approx(became, rel=0.05)
    for layout in (before, after):
        parts = {name: ms for name, ms in layout["totals_ms"].items() if name != "total"}
        assert layout["total_ms"] == layout["totals_ms"]["total"] == pytest.approx(sum(parts.values()), rel=1e-6)


@pytest.mark.slow
def test_the_document_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, SMALL)
    assert set(found) == {
        *("model", "mesh", "nodes", "network", "device", "dtype", "graph", "encode_rows", "expert_skew"),
        *("kv_dtype", "engine", "shape"),
        *("layouts", "inapplicable", "warning", "why", "evidence", "crossovers", "flips", "notes"),
    }
    assert (found["model"], found["mesh"], found["device"]) == ("deepseek-v2-lite", {"dp": 2, "tp": 2}, "h100")
    assert found["shape"] == {
        "phase": "prefill",
        "rows": 1024,
        "group_rows": [512, 512],
        "logit_rows": 2,
        "context": 4096,
    }
    names = [layout["name"] for layout in found["layouts"]]
    assert names == ["all-reduce", "norm-before-gather", "sequence-parallel", "auto"]
    assert found["inapplicable"] == {"attn-tp-input-scattered": found["inapplicable"]["attn-tp-input-scattered"]}
    assert "q_lora_rank is null" in found["inapplicable"]["attn-tp-input-scattered"]
    for layout in found["layouts"]:
        ops = layout["ops"]
        assert sum(op["us"] * op["times"] for op in ops) / 1e3 == pytest.approx(layout["total_ms"], rel=1e-6)
        assert {op["source"] for op in ops} <= {"measured", "interpolated", "scaled", "roofline"}
        assert all(0 < op["band"] < 1.2 for op in ops if op["us"]) and 0.03 < layout["band"] < 0.5
        assert sum(len(op["layers"]) for op in ops if op["name"] == "attention") == 27
        assert layout["memory"]["fits"] and layout["memory"]["weights_gb"] > 5
        assert set(layout["weight_sharding"]) == {"embed", "qkv_a_proj", "shared_expert", "experts"}
    assert {"experts": "split", "embed": "vocab"}.items() <= found["layouts"][0]["weight_sharding"].items()
    assert found["flips"]["found"] and "all legal plans" in found["flips"]["compared"]
    for flip in found["flips"]["found"]:
        assert 0.5 <= flip["factor"] <= 2 and flip["factor"] != 1 and flip["cost"] > 0 and flip["words"]
    for ranges in found["crossovers"].values():
        assert ranges[0]["first"] == 1 and ranges[-1]["last"] == 65536
        assert all(a["last"] + 1 == b["first"] for a, b in itertools.pairwise(ranges))
    assert all(" costs " in text or " is " in text for text in found["why"])


@pytest.mark.slow
def test_layouts_are_the_requested_ones_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    def names(line: str) -> list[str]:
        return [layout["name"] for layout in document(capsys, line)["layouts"]]

    assert names(f"{SMALL} --layout sequence-parallel --layout all-reduce") == ["sequence-parallel", "all-reduce"]
    assert names(f"{SMALL} --layout auto --layout all-reduce") == ["auto", "all-reduce"]
    assert names(f"{SMALL} --layout auto --layout auto") == ["auto"]


@pytest.mark.slow
@pytest.mark.parametrize(("dp", "tp"), [(8, 1), (2, 4)])
def test_publication_b(capsys: pytest.CaptureFixture[str], dp: int, tp: int) -> None:
    line = f"plan deepseek-v3 --device h20 --dp {dp} --tp {tp} --rows 16384"
    layouts = document(capsys, f"{line} --layout all-reduce --layout norm-before-gather")["layouts"]

    def norm_and_gather(layout: dict[str, Any]) -> tuple[int, bool]:
        ops = [op for op in layout["ops"] if op["times"] > 50]
        (norm,) = [i for i, op in enumerate(ops) if op["name"] == "post_attn_norm"]
        (gather,) = [i for i, op in enumerate(ops) if op["name"] == "all_gather"]
        assert ops[gather]["rows"] == 16384
        return ops[norm]["rows"], norm < gather

    assert [norm_and_gather(layout) for layout in layouts] == [(16384, False), (16384 // dp, True)]
    assert layouts[1]["totals_ms"]["norm"] < layouts[0]["totals_ms"]["norm"]


@pytest.mark.slow
def test_flags_reach_the_step(capsys: pytest.CaptureFixture[str]) -> None:
    line = "plan qwen3-30b-a3b --device a100 --dp 2 --tp 2 --rows 100 --layout auto"
    found = document(capsys, f"{line} --phase decode --context 777 --group-rows 70,30 --logit-rows 10")
    assert found["shape"] == {"phase": "decode", "rows": 100, "group_rows": [70, 30], "logit_rows": 10, "context": 777}
    assert found["dtype"] == "bf16" and found["notes"] == ["dtype bf16: the checkpoint's weights are bfloat16"]
    uneven = document(capsys, f"{line[:-14]} --rows 101")
    assert uneven["shape"]["group_rows"] == [51, 50]
    eager, graph = (document(capsys, f"{line} --phase decode{flag}") for flag in (" --eager", ""))
    assert (eager["graph"], graph["graph"]) == (False, True)
    assert eager["layouts"][0]["total_ms"] > graph["layouts"][0]["total_ms"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "dtype", "because"),
    [
        ("plan deepseek-v3 --device h200 --tp 8 --rows 8", "fp8", FP8 + "which h200 multiplies as they are"),
        ("plan deepseek-v3 --device a100 --tp 8 --rows 8", "bf16", FP8 + DEQUANTISED + ": a100 has no fp8"),
        ("plan llama-3.1-8b --device h200 --rows 8", "bf16", "the checkpoint's weights are bfloat16"),
    ],
)
def test_the_chosen_dtype_is_printed(capsys: pytest.CaptureFixture[str], line: str, dtype: str, because: str) -> None:
    found = document(capsys, line)
    assert found["dtype"] == dtype and f"dtype {dtype}: {because}" in found["notes"]
    assert not any(note.startswith("dtype") for note in document(capsys, f"{line} --dtype bf16")["notes"])


# -- the published switches --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_dp_attention_counts_all_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(
        capsys, "plan deepseek-v3 --device h20 --tp 8 --dp 2 --enable-dp-attention --rows 64 --layout auto"
    )
    assert found["mesh"] == {"dp": 2, "tp": 4}
    assert "--enable-dp-attention: --tp 8 counts all ranks, so --dp 2 makes this the mesh dp 2 x tp 4" in found["notes"]


@pytest.mark.slow
def test_input_scattered_is_a_layout(capsys: pytest.CaptureFixture[str]) -> None:
    switch = "--enable-attn-tp-input-scattered"
    found = document(capsys, f"{PUBLISHED} {switch} --layout all-reduce")
    assert [layout["name"] for layout in found["layouts"]] == ["all-reduce", "attn-tp-input-scattered"]
    found = document(capsys, f"{PUBLISHED} {switch}")
    assert "attn-tp-input-scattered" in [layout["name"] for layout in found["layouts"]]
    assert "norm-before-gather" in found["inapplicable"]
    assert any(note.startswith(f"{switch} is the layout attn-tp-input-scattered here") for note in found["notes"])


# -- tables ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "plan deepseek-v3 --device h100 --dp 2 --tp 4 --rows 16384 --dtype fp8")
    lines = [line.rstrip() for line in out.splitlines()]
    assert max(map(len, lines)) <= 120
    assert "\x1b" not in out and "\u2026" not in out and out.isascii()
    warning = "WARNING: does not fit: 86.7 GB of fp8 weights per rank on dp 2 x tp 4, where a rank of h100 has "
    assert lines[0].startswith(warning)  # errors of impossible options come before prices
    del lines[: next(i for i, line in enumerate(lines) if line.startswith("deepseek-v3"))]
    assert lines[0] == "deepseek-v3 on dp 2 x tp 4: 8 x NVIDIA H100 SXM 80 GB, fp8"
    assert lines[1].startswith("one prefill step of 16384 rows (8192 + 8192), context 4096, logits of 4")
    for title in (
        "ms per step         all-reduce  attn-tp-input-scattered  norm-before-gather  sequence-parallel          auto",
        "Why auto (rows are those of the rank that has most)",
        "Cheapest of the named layouts, by rows of the step",
        "What auto does in most layers, by rows of the step",
        "Memory per rank",
        "Notes",
    ):
        assert title in lines, title
    rows = {line.split()[0]: line.split()[1:] for line in lines if line}
    assert rows["against"][-2:] == ["x", "1.000"]
    assert rows["memory"].count("does") == 5
    assert "does not fit: needs 86.7 GB for weights, the device has 85.5 GB, " in out
    for name in ("input_norm", "qkv_a_proj", "attention", "router", "experts", "lm_head", "> all-gather dp x tp"):
        assert any(line.startswith(name) for line in lines), name
    assert "multi-token-prediction layer(s) of the checkpoint are skipped" in out


@pytest.mark.slow
def test_tables_name_inapplicable_layouts_and_the_chosen_sharding(capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "plan deepseek-v3 --device h200 --tp 8 --rows 4096 --layout all-reduce")
    assert "weight sharding of auto, chosen for this one step: " in out
    assert "weight sharding of the named layouts, as published: embed vocab, qkv_a_proj replicated" in out
    header = next(line for line in out.splitlines() if line.startswith("ms per step"))
    assert header.split() == ["ms", "per", "step", "all-reduce", "auto"]  # auto is shown beside the requested layouts
    assert "- norm-before-gather: dp is 1" in out
    assert "KV cache 70272 bytes per token" in out
    decode = run(capsys, "plan deepseek-v3 --device h20 --tp 8 --rows 128 --phase decode")
    assert "no weight sharding leaves room for the 524288 tokens" in " ".join(decode.split())
    assert "not the 524288 of this step" in " ".join(decode.split())


def test_help_imports_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    assert "plan" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "--enable-attn-tp-input-scattered SGLang's switch: add attn-tp-input-scattered to the layouts of" in said
    assert "Without --layout it is compared anyway" in said


# -- wrong input -------------------------------------------------------------------------------------------------------

V3 = "plan deepseek-v3 --device h20"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            "plan deepseek-v3 --device cuda --rows 8",
            "--device cuda is a kind of device; name the one that is priced: h20,",
        ),
        ("plan deepseek-v3 --device h21 --rows 8", "unknown device 'h21'; known devices: h20, h20-3e, h100"),
        (f"{V3} --rows 8 --json --code", "--code and --json each print the plan"),
        (f"{V3} --rows 8 --layout ring", "layout 'ring' is not known; layouts: all-reduce, attn-tp-input-scattered"),
        (f"{V3} --rows 8 --layout norm-before-gather", "layout norm-before-gather cannot apply to deepseek-v3 on dp 1"),
        (f"{V3} --rows 8 --enable-attn-tp-input-scattered", "tp is 1: attention has no ranks to scatter its input"),
        ("plan gpt-5 --device h20 --rows 8", "presets: deepseek-v2, deepseek-v2-lite, deepseek-v3"),
        ("plan no/such/model --device h20 --rows 8", "no such file; a model is a folder with config.json"),
        ("plan llama-3.1-8b --device h20 --tp 64 --rows 8", "on 64 ranks these work: dp 2 x tp 32, dp 4 x tp 16"),
        (f"{V3} --rows 0", "--rows 0: a step has at least 1 row"),
        (f"{V3} --rows -3", "--rows -3: a step has at least 1 row"),
        (f"{V3} --rows many", "argument --rows: invalid int value: 'many'"),
        (f"{V3} --dp 2 --rows 8 --group-rows 8", "--group-rows has 1 counts, but dp 2 x tp 1 has 2 attention groups"),
        (f"{V3} --dp 2 --rows 8 --group-rows 8,1", "--group-rows 8,1 adds up to 9, where counts >= 0 are needed"),
        (f"{V3} --dp 2 --rows 8 --group-rows 9,-1", "for example 4,4"),
        (f"{V3} --dp 2 --rows 8 --group-rows 4;4", "--group-rows '4;4': whole numbers with commas between are needed"),
        ("plan deepseek-v3 --device a100 --tp 8 --rows 8 --dtype fp8", "a100 (NVIDIA A100 SXM 80 GB) has no fp8"),
        (f"{V3} --rows 8 --dtype int4", "argument --dtype: invalid choice: 'int4'"),
        (f"{V3} --rows 8 --logit-rows 9", "logit rows 9 must be between 0 and the 8 rows of the step"),
        (f"{V3} --rows 8 --logit-rows -1", "logit rows -1 must be between 0 and the 8 rows"),
        (f"{V3} --rows 8 --context 0", "context 0 must be at least 1 token"),
        (f"{V3} --rows 8 --tp 0", "mesh axis tp has size 0; every axis needs at least 1 rank"),
        (f"{V3} --rows 8 --tp 8 --dp 3 --enable-dp-attention", "8 ranks do not divide into --dp 3 attention groups"),
        (f"{V3} --rows 8 --frobnicate", "unrecognized arguments: --frobnicate"),
        (f"{V3} --rows 8 --lay auto", "unrecognized arguments: --lay auto"),
        (V3, "the following arguments are required: --rows"),
        ("plan deepseek-v3 --rows 8", "there is no profile of this machine for 1 rank(s) in "),
        ("plot deepseek-v3", "invalid choice: 'plot'"),
        ("", "the following arguments are required: COMMAND"),
    ],
)
def test_wrong_input_is_a_one_line_error_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], line: str, words: str
) -> None:
    assert main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err.startswith("narrows: error: ") and err.count("\n") == 1


def test_a_broken_checkpoint_is_a_one_line_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    for content, words in (
        ("{", "not valid JSON"),
        ('{"model_type": "mamba"}', 'architecture "mamba" is not supported'),
    ):
        file.write_text(content, encoding="utf-8")
        assert main(["plan", str(tmp_path), "--device", "h20", "--rows", "8"]) == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1


def test_an_interrupt_ends_quietly(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("narrows.cli.plan_command.run", interrupt)
    assert main(SMALL.split()) == 130
    assert capsys.readouterr().err == "narrows: interrupted\n"


# -- processes ---------------------------------------------------------------------------------------------------------


def command(*args: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-c", "from narrows.cli.main import main; raise SystemExit(main())", *args]
    return subprocess.run(line, capture_output=True, text=True, timeout=PATIENCE_S, check=False, env=env)


def test_errors_of_the_process() -> None:
    done = command("plan", "deepseek-v3", "--device", "h21", "--rows", "8")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("narrows: error: unknown device 'h21'") and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_plan_never_imports_torch() -> None:
    code = (
        "import sys; import narrows.cli.plan_command; from narrows.cli.main import main; "
        f"code = main({SMALL.split()!r}); assert code == 0; "
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'transformers', 'safetensors'}), "
        "file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    assert done.stderr.strip() == "[]"


def test_help_is_instant() -> None:
    code = (
        "import sys\nfrom narrows.cli.main import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print(sorted(n for n in sys.modules if n.startswith('narrows.') or n in ('rich', 'torch')), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    assert done.stderr.strip() == "['narrows.cli', 'narrows.cli.lazy_parser', 'narrows.cli.main', 'narrows.errors']"


@pytest.mark.slow
def test_output_into_a_closed_pipe_is_no_error() -> None:
    line = [sys.executable, "-c", "from narrows.cli.main import main; raise SystemExit(main())", *SMALL.split()]
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(line, stdout=write, stderr=subprocess.PIPE, text=True, timeout=PATIENCE_S, check=False)
    finally:
        os.close(write)
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


@pytest.mark.slow
def test_how_sure_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """The band of the total, and the error of a price that would change the choice, in the words of the issue."""
    out = " ".join(run(capsys, PUBLISHED).split())
    assert "How sure that is" in out and "give or take" in out
    assert re.search(r"another plan is best if all-reduce over tp cost \d+ % less: then attn-tp-input-scattered", out)
