"""`narrows simulate` as it is used: tables and JSON, searches, what does not fit, wrong input, no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from documents import run_for_both
from patience import PATIENCE_S

from narrows.cli.main import main

LOAD = "--num-requests 12 --input-length 200 --output-length 20 --spread 0.5"
MINI = f"simulate dsv3-mini --device cpu-core --tp 2 {LOAD}"
V3 = f"simulate deepseek-v3 --device h200 {LOAD}"


def run(capsys: pytest.CaptureFixture[str], line: str, code: int = 0) -> tuple[str, dict[str, Any]]:
    """Output of the command, and its JSON document."""
    return run_for_both(capsys, line.split(), code)


@pytest.mark.slow
def test_figures_shares_and_sources(capsys: pytest.CaptureFixture[str]) -> None:
    out, found = run(capsys, f"{MINI} --rate 4 --kv-tokens 4096")
    assert "12 requests, 200 in / 20 out, 4 per second; dp 1 x tp 2, auto" in " ".join(out.split())
    for words in ("TTFT, ms", "TPOT, ms", "ITL, ms", "E2E, ms", "output tokens per second", "prices rest on"):
        assert words in out
    assert (
        "roofline 100.0%" in out
        and "0 preemptions" in out
        and "all-reduce and norm in one into experts" in " ".join(out.split())
    )
    (one,) = found["candidates"]
    assert one["mesh"] == {"dp": 1, "tp": 2} and one["layout"] == "auto" and one["dtype"] == "bf16"
    assert one["figures"]["completed"] == 12 and one["figures"]["ttft_ms"]["mean"] > 0
    assert one["kv_tokens_per_group"] == 4096
    assert sum(one["seconds"].values()) == pytest.approx(one["busy_s"]) == pytest.approx(sum(one["sources_s"].values()))
    assert {"experts", "attention", "communication"} <= set(one["seconds"])
    assert sum(use["steps"] for use in one["plans"]) == one["scheduler"]["steps"]
    assert (found["simulate"], found["load"]["rate"], found["load"]["requests"]) == ("dsv3-mini", 4.0, 12)


@pytest.mark.slow
def test_json_alone_and_the_same_each_time(capsys: pytest.CaptureFixture[str]) -> None:
    out, found = run(capsys, f"{MINI} --concurrency 3 --json")
    assert json.loads(out) == found and out.count("\n") == 1
    again, _ = run(capsys, f"{MINI} --concurrency 3 --json")
    assert again == out
    other, _ = run(capsys, f"{MINI} --concurrency 3 --json --seed 1")
    assert json.loads(other)["candidates"] != found["candidates"]


@pytest.mark.slow
def test_layouts_beside_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    out, found = run(capsys, f"{V3} --tp 8 --layout sequence-parallel --layout auto")
    assert [one["layout"] for one in found["candidates"]] == ["sequence-parallel", "auto"]
    slow, fast = (one["figures"]["output_throughput"] for one in found["candidates"])
    assert slow < fast
    assert f"x {slow / fast:.3f} of the best" in out
    titles = " ".join(out.split())
    assert titles.index("dp 1 x tp 8, sequence-parallel") < titles.index("dp 1 x tp 8, auto")  # in the requested order
    assert titles.rindex("dp 1 x tp 8 auto") < titles.rindex("dp 1 x tp 8 sequence-parallel")  # the best first


@pytest.mark.slow
def test_a_search_ranks_deployments_and_gives_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    out, found = run(capsys, f"{V3} --search --num-gpus 4,8 --layout auto --layout norm-before-gather --max-tpot 18.25")
    ranks = [(tuple(one["mesh"].values()), one["layout"]) for one in found["candidates"]]
    assert len(ranks) == 2 * (3 + 4) and {one for one, _ in ranks} == {
        *((1, 4), (2, 2), (4, 1), (1, 8), (2, 4), (4, 2), (8, 1))
    }
    best = found["candidates"][0]
    assert best["mesh"]["dp"] * best["mesh"]["tp"] == 8 and not best["misses"]
    refused = [one["refusal"] for one in found["candidates"] if one["refusal"]]
    first = out.splitlines()[0]
    assert first.startswith("WARNING: 5 of ") and "do not fit memory; the first does not fit: " in first
    assert sum("does not fit: " in text and "GB usable on h200" in text for text in refused) == 5
    assert sum("cannot apply: dp is 1" in text for text in refused) == 2
    assert all(one["refusal"] for one in found["candidates"][-len(refused) :])
    goodputs = [one["goodput"] for one in found["candidates"] if not one["refusal"] and not one["misses"]]
    assert goodputs == sorted(goodputs, reverse=True)
    assert 0 < len(goodputs) < len(ranks) - len(refused)
    assert "misses TPOT by" in out and "goodput" in out and "target for 99 % of the requests: TPOT 1" in out
    _, missed = run(capsys, f"{V3} --search --num-gpus 8 --layout auto --max-tpot 0.001", code=1)
    assert all(one["misses"] and one["goodput"] == 0 for one in missed["candidates"])


@pytest.mark.slow
def test_sampled_texts_and_overhead_cost_more(capsys: pytest.CaptureFixture[str]) -> None:
    def busy(more: str) -> float:
        _, found = run(capsys, f"{MINI} --json {more}")
        return float(found["candidates"][0]["busy_s"])

    assert busy("--temperature 1") > busy("")
    _, found = run(capsys, f"{MINI} --json --step-overhead 1000")
    (one,) = found["candidates"]
    assert one["seconds"]["host"] == pytest.approx(1e-3 * one["scheduler"]["steps"])


@pytest.mark.slow
def test_traces_steps_and_requests_in_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trace, steps, requests = tmp_path / "trace", tmp_path / "steps", tmp_path / "requests"
    rows = [{"timestamp": 1000 * i, "input_length": 600, "output_length": 5, "hash_ids": [1, 2 + i]} for i in range(4)]
    trace.write_text("\n".join(map(json.dumps, rows)))
    steps.write_text(
        '{"phase": "prefill", "rows": 600, "seconds": 0.5}\n{"phase": "decode", "rows": 1, "seconds": 0.01}'
    )
    line = f"simulate dsv3-mini --device cpu-core --tp 2 --trace {trace} --step-times {steps}"
    _, found = run(capsys, f"{line} --save-requests {requests}")
    figures = found["candidates"][0]["figures"]
    assert figures["cached_tokens"] == 3 * 512  # the first block is the same in all
    assert figures["ttft_ms"]["mean"] == pytest.approx(500)
    saved = [json.loads(text) for text in requests.read_text().splitlines()]
    assert [row["sent_s"] for row in saved] == [0, 1, 2, 3] and len(saved[0]["pieces_s"]) == 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "words"),
    [
        (f"{V3} --tp 4", "does not fit: 169.4 GB of fp8 weights per rank on dp 1 x tp 4, of "),
        (f"{V3} --tp 8 --kv-tokens 900000", "lower --kv-tokens to 8"),
        (f"{V3} --search --num-gpus 2", "does not fit: "),
        (f"{V3} --tp 8 --layout ring", "layout 'ring' is not known"),
        (f"{V3} --tp 8 --layout norm-before-gather", "cannot apply to deepseek-v3 on dp 1 x tp 8"),
        ("simulate deepseek-v3 --device cpu", "--device cpu is a kind of device; name the one that is priced: h20,"),
        ("simulate deepseek-v3 --device h201", "unknown device 'h201'"),
        ("simulate gpt-5 --device h200", "presets: deepseek-v2"),
        (f"{MINI} --rate 0", "--rate is 0; it must be more than 0"),
        (f"{MINI} --num-requests 0", "--num-requests is 0; it must be at least 1"),
        (f"{MINI} --trace nowhere.csv", "the trace nowhere.csv cannot be read"),
        (f"{MINI} --trace nowhere.csv --rate 3", "--trace has its own arrivals"),
        (f"{MINI} --max-context 100", "a request has up to"),
        (f"{MINI} --max-context 99999", "--max-context 99999 must be between 2 and the model's 16384 positions"),
        (f"{MINI} --max-rows 0", "--max-rows is 0; it must be at least 1"),
        (f"{MINI} --kv-tokens 0", "--kv-tokens is 0; it must be at least 1"),
        (f"{MINI} --prompt-rows -1", "--prompt-rows is -1; it must be at least 0"),
        (f"{MINI} --requests-per-group 0", "--requests-per-group is 0; it must be at least 1"),
        (f"{MINI} --num-gpus 8", "--num-gpus needs --search; or give --dp and --tp instead"),
        (f"{MINI} --tp 1 --search --num-gpus two", "--num-gpus 'two': whole numbers"),
        (f"{MINI} --tp 1 --search --num-gpus 0", "--num-gpus 0: at least 1 rank is needed"),
        (f"{MINI} --search --num-gpus 4 --dp 2", "leave --dp and --tp out"),
        (f"{MINI} --temperature -1", "--temperature is -1; it must be at least 0"),
        (f"{MINI} --temperature nan", "--temperature is nan; a finite number is needed"),
        (f"{MINI} --scale-lengths inf", "--scale-lengths is inf; a finite number is needed"),
        (f"{MINI} --max-ttft -1", "--max-ttft is -1; it must be more than 0"),
        (f"{MINI} --percentile 101", "--percentile is 101; it must be"),
        (f"{MINI} --step-overhead -1", "--step-overhead is -1; it must be"),
        (f"{MINI} --recv-interval 0", "--recv-interval is 0; it must be at least 1"),
        (f"{MINI} --batch-wait 20", "--batch-wait 20: steps and a share of --max-rows are needed, as in 20:0.9"),
        (f"{MINI} --batch-wait 20:1.5", "--batch-wait 20:1.5: steps and a share"),
        (f"{MINI} --batch-wait -1:0.5", "--batch-wait"),
        (f"{MINI} --step-times nowhere", "--step-times nowhere cannot be read"),
        (f"{MINI} --step-times x --search", "--step-times are of one mesh and layout"),
        (f"{MINI} --dtype fp8", "cpu-core (one core of a Xeon with AMX) has no fp8"),
    ],
)
def test_wrong_input_is_a_one_line_error_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], line: str, words: str
) -> None:
    assert main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err
    assert err.startswith("narrows: error: ") and err.count("\n") == 1


@pytest.mark.slow
def test_truncated_prompts_are_reported(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    rows = [{"timestamp": 0, "input_length": 600 * i, "output_length": 5} for i in (1, 2)]
    trace.write_text("\n".join(map(json.dumps, rows)))
    line = f"simulate dsv3-mini --device cpu-core --tp 2 --trace {trace}"
    assert main([*line.split(), "--max-context", "1000"]) == 0
    err = capsys.readouterr().err
    assert "1 of 2 requests of the trace are longer than a context of 1000 tokens, and lose 205 tokens" in err
    assert main(line.split()) == 0
    assert not capsys.readouterr().err


@pytest.mark.slow
def test_a_simulation_never_imports_torch() -> None:
    code = (
        "import sys; from narrows.cli.main import main; "
        f"code = main({MINI.split()!r}); assert code == 0; "
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'numpy', 'safetensors'}), "
        "file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    assert done.stderr.strip() == "[]"


def uneven_trace(folder: Path) -> Path:
    """One long prompt and five more that begin with it and grow long, and short ones beside them."""
    long = {"input_length": 1024, "output_length": 400, "hash_ids": [1, 2]}
    rows = [{"timestamp": 0, **long}, *({"timestamp": 4000 + number, **long} for number in range(5))]
    rows += [{"timestamp": 4100 + 200 * number, "input_length": 90, "output_length": 20} for number in range(40)]
    file = folder / "uneven.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return file


@pytest.mark.slow
def test_a_group_short_of_pages_is_named_and_the_others_continue(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """TRT-LLM #17379, #17978: one attention-DP rank out of KV pages stalled them all in silence."""
    line = "simulate dsv3-mini --device cpu-core --dp 2 --kv-tokens 2048"
    out, found = run(capsys, f"{line} --trace {uneven_trace(tmp_path)} --save-requests {tmp_path}/answers.jsonl")
    (one,) = found["candidates"]
    stats = one["scheduler"]
    assert one["figures"]["completed"] == 46 and one["figures"]["failed"] == 0
    assert stats["group_preemptions"][0] > 0 and stats["group_preemptions"][1] == 0
    assert stats["short_steps"][0] > 0 and stats["bound_steps"]["kv_pages"] > 0
    words = " ".join(out.split())
    assert (
        f"preemptions (by group: {stats['group_preemptions'][0]}, 0)" in words and "KV pages (--kv-tokens) in" in words
    )
    rows = [json.loads(row) for row in (tmp_path / "answers.jsonl").read_text().splitlines()]
    short = [row["ended_s"] - row["sent_s"] for row in rows if row["input_tokens"] == 90]
    assert len(short) == 40 and max(short) < 3.0, "20 steps of at most 90 ms, and the wait for its first"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--max-rows 4096 --requests-per-group 2", "requests per group (--requests-per-group) in"),
        ("--max-rows 64", "rows (--max-rows) in"),
        ("--max-rows 4096 --kv-tokens 512", "KV pages (--kv-tokens) in"),
        ("--max-rows 4096", "of the steps: none"),
    ],
)
def test_the_limit_that_binds_is_named(flags: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    out, found = run(capsys, f"simulate dsv3-mini --device cpu-core --dp 2 {LOAD} {flags}")
    assert words in " ".join(out.split())
    steps = found["candidates"][0]["scheduler"]["bound_steps"]
    assert sum(map(bool, steps.values())) == (not words.endswith("none"))


@pytest.mark.slow
def test_fewer_prompt_rows_make_gaps_between_tokens_shorter(capsys: pytest.CaptureFixture[str]) -> None:
    load = "--num-requests 40 --input-length 600 --output-length 30 --rate 2"
    figures = {}
    for rows in (0, 64):
        _, found = run(capsys, f"simulate dsv3-mini --device cpu-core --dp 2 {load} --prompt-rows {rows}")
        figures[rows] = found["candidates"][0]["figures"]
    assert figures[64]["itl_ms"]["p99"] < 0.5 * figures[0]["itl_ms"]["p99"]
    assert figures[64]["ttft_ms"]["mean"] > figures[0]["ttft_ms"]["mean"]


@pytest.mark.slow
def test_a_load_near_saturation_prints_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    line = "simulate dsv3-mini --device cpu-core --tp 2 --num-requests 8 --input-length 64 --output-length 8"
    used = {}
    for rate in (0.5, 500.0):
        out, found = run(capsys, f"{line} --rate {rate}")
        used[rate] = found["utilisation"]
        assert "utilisation: requests come at" in out
        assert ("near saturation" in " ".join(out.split())) is (used[rate] >= 0.85)
    assert used[0.5] < 0.5 and used[500.0] > 1
    out, found = run(capsys, line)
    assert found["utilisation"] is None and "utilisation" not in out.split("{")[0]


@pytest.mark.slow
def test_a_target_that_nothing_meets_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    line = "simulate dsv3-mini --device cpu-core --search --num-gpus 2 --layout auto --num-requests 2 --max-tpot 0.001"
    assert main(line.split()) == 1
    assert "none of these 2 meets the target" in capsys.readouterr().out
