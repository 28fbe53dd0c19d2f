"""`eval`: right layouts are within the bounds in every dtype, and every planted fault is outside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from documents import run_for_both
from torch import Tensor

from narrows.cli.main import main
from narrows.comm import Communicator
from narrows.engine.config import EngineConfig
from narrows.errors import ConfigError
from narrows.evaluate.evaluation import Evaluation, default_files, evaluate
from narrows.evaluate.tasks import Setting

LAYOUTS = ("all-reduce", "attn-tp-input-scattered", "norm-before-gather", "sequence-parallel", "auto")


@pytest.fixture
def engine_config(evaluated_model: Path) -> EngineConfig:
    return EngineConfig(model=str(evaluated_model), dp=2, tp=2, max_context=128, dtype="float32")


SETTING = Setting(limit=5, window=60, shots=2, arithmetic_tokens=3, gsm8k_tokens=4)


def run(engine_config: EngineConfig, layouts: Sequence[str] = ("all-reduce",), *tasks: str, **more: Any) -> Evaluation:
    files = default_files(engine_config.model)
    chosen = {task: files[task] for task in tasks or ("perplexity",)}
    return evaluate(engine_config, chosen, layouts, **({"setting": SETTING, "num_alone": 2, "kl_rows": 480} | more))


# -- all is well -----------------------------------------------------------------------------------------------------


def test_every_layout_is_within_the_bounds_in_float32(engine_config: EngineConfig) -> None:
    report = run(engine_config, LAYOUTS, "perplexity", "arithmetic", "choices", "gsm8k", num_alone=1)
    assert report.ok and [layout.layout for layout in report.layouts] == list(LAYOUTS)
    for layout in report.layouts:
        assert [(score.task, score.alone) for score in layout.scores] == [
            (task, alone) for task in ("perplexity", "arithmetic", "choices", "gsm8k") for alone in (False, True)
        ]
        for ours, one in zip(layout.scores, report.one_rank.scores, strict=True):
            assert ours.num_items == one.num_items == (1 if ours.alone else one.num_items)
            if one.perplexity is None:
                assert ours.same == 1.0 and ours.shares == one.shares
            else:
                assert ours.perplexity is not None and ours.perplexity.more_nats is not None
                assert ours.perplexity.num_tokens == one.perplexity.num_tokens
                assert abs(ours.perplexity.more_nats.value) < 1e-6
        assert [(found.dtype, found.alone) for found in layout.distances] == [("float32", False), ("float32", True)]
        for found in layout.distances:
            distance = found.distance
            assert distance.num_rows > 150 and distance.kl < 1e-10 and distance.agreement == 1.0
            assert distance.beyond == 0.0 and distance.noise is None


def test_bfloat16_is_bounded_by_its_own_rounding_beside_float32(
    engine_config: EngineConfig,
) -> None:
    report = run(replace(engine_config, dtype="bfloat16"), ("all-reduce", "auto"), float32_tasks=True)
    assert report.ok, [layout.failures for layout in report.layouts]
    assert report.exact is not None and report.exact.scores[0].perplexity is not None
    for layout in report.layouts:
        kinds = [(found.dtype, found.alone) for found in layout.distances]
        assert kinds == [("bfloat16", False), ("bfloat16", True), ("float32", False), ("float32", True)]
        for found in layout.distances:
            if found.dtype == "bfloat16":
                assert found.distance.kl > 1e-9 and found.distance.beyond is None
                assert found.distance.noise is not None and abs(found.distance.noise.value) < 1.0
            else:
                assert found.distance.kl < 1e-10


def test_without_float32_a_dtype_is_judged_by_its_tolerance(engine_config: EngineConfig) -> None:
    report = run(replace(engine_config, dtype="bfloat16"), with_float32=False)
    (layout,) = report.layouts
    assert report.ok and [found.dtype for found in layout.distances] == ["bfloat16", "bfloat16"]
    assert all(found.distance.noise is None and found.distance.beyond is not None for found in layout.distances)


def test_no_rows_means_no_distributions(engine_config: EngineConfig) -> None:
    assert run(engine_config, kl_rows=0).layouts[0].distances == ()


# -- planted faults --------------------------------------------------------------------------------------------------


def shaken(x: Tensor) -> Tensor:
    """A little off, and not by a factor, which the next norm would take out again."""
    return x + 0.01 * x.roll(1, dims=-1)


@pytest.mark.parametrize(
    ("layout", "rank", "dtype"),
    [
        ("all-reduce", 3, "float32"),
        ("sequence-parallel", 1, "bfloat16"),
        pytest.param("norm-before-gather", 2, "float32", marks=pytest.mark.full),
    ],
)
def test_a_norm_that_is_one_percent_off_on_one_rank_is_out_of_bounds(
    engine_config: EngineConfig, layout: str, rank: int, dtype: str, faults: Any
) -> None:
    faults.scale("model.layers.1.input_layernorm.weight", rank)
    report = run(replace(engine_config, dtype=dtype), [layout])
    (found,) = report.layouts
    assert not report.ok
    batched = next(f.distance for f in found.distances if f.dtype == "float32" and not f.alone)
    assert batched.beyond is not None and batched.beyond > 1 / 8 and "half a rank's share" in batched.failure
    assert any(line.startswith("distributions in float32, batched: ") for line in found.failures)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_reduction_that_is_left_out_is_out_of_bounds(engine_config: EngineConfig, dtype: str, faults: Any) -> None:
    faults.leave_out_sum("layer 1 post_attn_norm")
    report = run(replace(engine_config, dtype=dtype))
    (found,) = report.layouts
    judged = {(f.dtype, f.alone): f.distance for f in found.distances}
    assert not report.ok and all(distance.failure for distance in judged.values()), found.failures
    if dtype == "bfloat16":
        noise = judged["bfloat16", False].noise
        assert noise is not None and noise.value > 2.0 and "that of one rank" in judged["bfloat16", False].failure


def test_a_fault_of_single_row_steps_is_detected_one_at_a_time(
    engine_config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_sum = Communicator.all_reduce

    def all_reduce(self: Communicator, x: Tensor, *rest: Any, **more: Any) -> Tensor:
        out = true_sum(self, x, *rest, **more)
        return shaken(out) if len(out) == 1 else out

    monkeypatch.setattr(Communicator, "all_reduce", all_reduce)
    (found,) = run(replace(engine_config, dp=1), setting=replace(SETTING, window=64)).layouts
    batched, alone = (f.distance for f in found.distances)
    assert not batched.failure
    assert alone.beyond == 0.25 and alone.failure.startswith("rows of decode steps: 100.0 %"), "no more than a rank's"


def test_logits_that_are_not_numbers_are_out_of_bounds(
    engine_config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_gather = Communicator.column_gather

    def gather(self: Communicator, *args: Any, **options: Any) -> Tensor:
        out = true_gather(self, *args, **options).clone()
        out[0, 5] = torch.nan
        return out

    monkeypatch.setattr(Communicator, "column_gather", gather)
    report = run(engine_config)
    assert not report.ok
    assert all("not numbers" in found.distance.failure for found in report.layouts[0].distances)


# -- the command -----------------------------------------------------------------------------------------------------


def command(model: Path, *more: str) -> list[str]:
    return [
        "eval",
        str(model),
        "--tp",
        "2",
        "--ranks",
        "threads",
        "--dtype",
        "float32",
        "--max-context",
        "200",
        "--shots",
        "1",
        *more,
    ]


def test_the_command_prints_tables_and_writes_a_document(
    evaluated_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--task", "arithmetic", "--task", "perplexity", "--limit", "3", "--kl-rows", "130", "--every-layout"]
    printed, found = run_for_both(capsys, command(evaluated_model, *options, "--one-at-a-time", "1"))
    out = printed.splitlines()
    assert found["ok"] and list(found["files"]) == ["perplexity", "arithmetic"]
    layouts = [layout["layout"] for layout in found["layouts"]]
    assert "norm-before-gather" not in layouts and "auto" in layouts
    assert any(line.startswith("not run: norm-before-gather: ") for line in out)
    assert "served path: op by op: no compiled code for float32 here" in out
    assert sum("one rank" in line and "batched" in line for line in out) == 2
    items = {(score["task"], score["alone"]): score["num_items"] for score in found["one_rank"]["scores"]}
    assert items[("arithmetic", False)] == 3 and items[("arithmetic", True)] == 1
    assert set(found["one_rank"]["scores"][2]["kinds"]) == {"kind 0", "kind 1"}


def test_a_layout_out_of_bounds_gives_exit_code_1_and_one_line(
    evaluated_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    true_sum = Communicator.all_reduce
    monkeypatch.setattr(Communicator, "all_reduce", lambda *args, **more: shaken(true_sum(*args, **more)))
    options = ["--task", "choices", "--layout", "all-reduce", "--kl-rows", "200", "--one-at-a-time", "0"]
    out, found = run_for_both(capsys, command(evaluated_model, *options), code=1)
    assert "DIFFERS" in out and "all-reduce: distributions in float32, batched: " in out and "narrows verify" in out
    assert found["layouts"][0]["failures"]


def test_encoded_rows_are_marked_and_judged_by_the_tasks(
    evaluated_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layouts = ["--layout", "sequence-parallel", "--layout", "all-reduce"]
    options = ["--task", "perplexity", *layouts, "--kl-rows", "130", "--one-at-a-time", "0"]
    out, found = run_for_both(capsys, command(evaluated_model, *options, "--encode-rows", "int8-always"))
    encoded, plain = found["layouts"]
    assert found["encode_rows"] == "int8-always" and (encoded["encodings"], plain["encodings"]) == (
        ["int8"],
        [],
    )
    assert [one["distance"]["kl"] > 1e-8 for one in encoded["distances"]] == [True, True]
    assert [one["distance"]["kl"] < 1e-10 for one in plain["distances"]] == [True, True]
    assert "sequence-parallel: rows travelled as int8 before gathers" in out and "DIFFERS" not in out
    assert "all-reduce: no plan of these steps encodes rows" in out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--task", "chess"], "--task 'chess' is not known; tasks: perplexity, arithmetic, choices, gsm8k"),
        (["--file", "gsm8k"], "--file 'gsm8k' must be TASK=PATH"),
        (["--file", "perplexity=/nowhere.txt", "--task", "perplexity"], "/nowhere.txt cannot be read"),
        (["--limit", "0"], "--limit is 0; it must be at least 1"),
        (["--layout", "auto", "--every-layout"], "leave --layout out"),
        (["--layout", "norm-before-gather"], "dp is 1"),
        (["--task", "perplexity", "--window", "500"], "--window is 500; it must be between 2 and the context of 200"),
        (["--task", "perplexity", "--window", "8", "--stride", "8"], "--stride is 8; it must be between 1 and 7"),
        (["--task", "perplexity", "--kl-rows", "-1"], "--kl-rows is -1"),
        (["--task", "perplexity", "--kl-rows", "3"], "half of that holds no text"),
        (["--task", "gsm8k", "--shots", "6"], "6 lines, of which --shots 6 are worked examples"),
        (["--task", "gsm8k"], "line 2, after 1 worked examples has 68 tokens"),
    ],
)  # fmt: skip
def test_impossible_options_are_refused_in_one_line(
    evaluated_model: Path, options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(evaluated_model, *options)) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_a_model_without_tokenizer_or_files_is_refused(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    model = str(tiny_model("v3"))
    (tmp_path / "a.txt").write_text("text", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        evaluate(EngineConfig(model=model), {"perplexity": tmp_path / "a.txt"}, ["auto"])
    with pytest.raises(ConfigError, match="nothing to evaluate"):
        evaluate(EngineConfig(model=model), {}, ["auto"])
    assert default_files(model) == {}


def test_generate_prints_the_scores_of_the_prompt(evaluated_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--prompt", "narrow", "--prompt-logprobs", "2", "--max-tokens", "3", "--ignore-eos", "--quiet"]
    assert main(["generate", str(evaluated_model), *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    scored = lines[-5:]
    assert [line.split()[1] for line in scored] == [repr(letter) for letter in "arrow"]
    assert all(float(line.split()[0]) < 0 and len(line.split()) >= 6 for line in scored)
    assert main(["generate", str(evaluated_model), "--logprobs", "0", *options]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(lines) + 3


def test_int8_weights_are_judged_by_the_tasks_against_unquantised_ones(
    evaluated_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--task", "perplexity", "--kl-rows", "130", "--one-at-a-time", "0", "--quantization", "int8"]
    out, found = run_for_both(capsys, command(evaluated_model, *options))
    (layout,) = found["layouts"]
    assert (layout["encodings"], layout["quantization"]) == ([], "int8")
    assert all(one["distance"]["kl"] > 1e-8 for one in layout["distances"])
    assert "auto: weights were held as int8; its distributions have no bound" in out
