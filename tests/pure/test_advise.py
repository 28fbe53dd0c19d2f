"""`narrows advise` as it is used: the command line, figures with bands, what the engine lacks, and wrong input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from documents import run_for_both
from engine_results import VLLM

from narrows.advise.command import ServerLimits
from narrows.advise.missing import missing
from narrows.advise.search import Setting, advise
from narrows.advise.ways import ways
from narrows.arch.presets import preset
from narrows.arch.weight_sharding import WeightSharding
from narrows.cli.main import main
from narrows.cost.devices import device
from narrows.cost.engines import engine_style
from narrows.cost.pricer import StepShape
from narrows.errors import ConfigError
from narrows.layout import Mesh, split_evenly
from narrows.plan.named import ENGINE_LAYOUTS, inapplicable
from narrows.plan.planner import Deployment, Planner
from narrows.sim.search import Target
from narrows.workload.arrivals import Prefixes, random_lengths

LOAD = "--num-requests 4 --input-length 200 --output-length 8"
SMALL = f"advise llama-3.1-8b --device h100 --num-gpus 2 {LOAD}"


def run(capsys: pytest.CaptureFixture[str], line: str, code: int = 0) -> tuple[str, dict[str, Any]]:
    return run_for_both(capsys, line.split(), code)


def refused(capsys: pytest.CaptureFixture[str], line: str) -> str:
    assert main(line.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("narrows: error: ") and error.count("\n") == 1
    return error


@pytest.mark.slow
def test_a_command_line_with_figures_and_bands(capsys: pytest.CaptureFixture[str]) -> None:
    out, found = run(capsys, f"{SMALL} --engine vllm")
    (line,) = found["command_lines"]
    assert line.startswith("vllm serve meta-llama/Llama-3.1-8B-Instruct --tensor-parallel-size 2 ")
    assert line in out and "band of the mean" in out and "prices rest on" in out and "memory per rank" in out
    assert found["engine"]["version"] and found["best"]["figures"]["completed"] == 4
    for low, high in found["bands"].values():
        assert low < 1 < high
    assert {trial["mesh"]["dp"] for trial in found["trials"]} == {1, 2}
    assert "run several servers" in found["trials"][-1]["refusal"]
    assert [step["phase"] for step in found["steps"]] and found["own"]["way"] == "auto"
    for step in found["steps"]:
        assert step["engine_ms"] >= step["best_ms"] and step["more"] == pytest.approx(
            step["engine_ms"] / step["best_ms"] - 1
        )


@pytest.mark.slow
def test_several_hosts_have_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    line = f"advise llama-3.1-8b --device h100 --engine sglang {LOAD}"
    out, two = run(capsys, f"{line} --nodes 2x4")
    assert len(two["command_lines"]) == 2 and two["nodes"] == "2x4" and "2 nodes of 4 ranks" in out
    assert all(f"--nnodes 2 --node-rank {host}" in two["command_lines"][host] for host in (0, 1))
    _, one = run(capsys, f"{line} --num-gpus 8")
    assert one["best"]["figures"]["tpot_ms"]["mean"] < two["best"]["figures"]["tpot_ms"]["mean"]


@pytest.mark.slow
def test_a_target_that_nothing_meets(capsys: pytest.CaptureFixture[str]) -> None:
    out, found = run(capsys, f"{SMALL} --engine sglang --max-tpot 0.1", code=1)
    assert "meets the target; the nearest misses TPOT by" in " ".join(out.split())
    assert "misses TPOT by" in found["best"]["misses"][0]
    _, met = run(capsys, f"{SMALL} --engine sglang --max-tpot 1000")
    assert met["best"]["misses"] == [] and met["best"]["goodput"] > 0


@pytest.mark.slow
def test_what_the_engine_lacks_is_what_its_layout_costs() -> None:
    """Long prompts on H20: all-reduce replicates norm and projection before attention, SGLang's flag scatters them."""
    config = preset("dsv3-mini")
    setting = Setting(
        config=config,
        device=device("h20"),
        dtype="bf16",
        engine=engine_style("sglang"),
        limits=ServerLimits(engine="sglang", rows=8192, requests_per_group=4, max_context=8192),
        asks=random_lengths(2, 8000, 2, spread=0.0, seed=0, prefixes=Prefixes(count=1, tokens=0)),
        target=Target(),
    )
    asked = [way for way in ways("sglang", config, 2) if way.mesh.num_groups == 1 and way.experts == "split"]
    found = advise(setting, asked, 2)
    scattered, plain = found.trials
    assert scattered.layouts == {"prefill": "attn-tp-input-scattered", "decode": "all-reduce"}
    first, later = (trial.candidate.outcome for trial in (scattered, plain))
    assert first is not None and later is not None and first.figures.ttft_ms.mean < later.figures.ttft_ms.mean

    prefill = next(step for step in missing(setting, plain, found.own) if step.shape.phase == "prefill")
    worth = {each.feature: each.worth for each in prefill.missing}
    # Together they are worth at least as much as the dearest alone, and no freedom is told that costs nothing.
    assert worth["input of attention"] > 0.003 and prefill.more >= max(worth.values()) and min(worth.values()) > 0
    words = {each.feature: each.words for each in prefill.missing}["input of attention"]
    assert "all-gather of qkv_latent into attention, not all-reduce" in words
    narrower = next(step for step in missing(setting, scattered, found.own) if step.shape.phase == "prefill")
    assert narrower.more < prefill.more


@pytest.mark.slow
def test_measured_beside_predicted(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    file.write_text(json.dumps(VLLM | {"mean_tpot_ms": 1000.0, "request_rate": "inf"}), encoding="utf-8")
    out, found = run(capsys, f"advise llama-3.1-8b --device h100 --num-gpus 2 --engine vllm --measured {file}")
    assert (found["load"]["requests"], found["load"]["input_length"], found["load"]["output_length"]) == (10, 100, 50)
    rows = {row["figure"]: row for row in found["measured"]["rows"]}
    assert rows["TPOT mean, ms"]["measured"] == 1000.0 and rows["TPOT mean, ms"]["inside"] is False
    assert "decoding (TPOT): predicted" in " ".join(out.split()) and "too fast (outside its band)" in out
    out, found = run(capsys, f"{SMALL} --engine vllm --measured {file}")
    assert "the loads differ: 100 tokens in" in found["measured"]["words"][0]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            "advise llama-3.1-8b --device cuda --engine vllm",
            "--device cuda is a kind of device; name the one that is priced",
        ),
        ("advise llama-3.1-8b --device h100 --engine tgi", "invalid choice: 'tgi'"),
        ("advise deepseek-v2 --device h100 --engine trtllm", "AutoDeploy"),
        ("advise deepseek-v3 --device h100 --engine vllm --num-gpus 3", "128 attention heads do not divide over 3"),
        (
            "advise llama-3.1-8b --device h100 --engine vllm --num-gpus 64",
            "tp 64 is larger than the 32 attention heads",
        ),
        ("advise llama-3.1-8b --device h100 --engine vllm --nodes 2x8 --num-gpus 8", "--nodes 2x8 holds 16 GPUs"),
        ("advise llama-3.1-8b --device h100 --engine vllm --network ib-400", "say --nodes NxR too"),
        ("advise llama-3.1-8b --device h100 --engine vllm --nodes 2by8", "NODESxRANKS"),
        ("advise llama-3.1-8b --device cpu-core --engine vllm", "GPUs"),
        ("advise llama-3.1-8b --device h100 --engine trtllm --dtype fp8", "FP8 checkpoint"),
        ("advise llama-3.1-8b --device h100 --engine sglang --percentile 0", "--percentile is 0"),
        ("advise model.gguf --device h100 --engine sglang", "not GGUF"),
    ],
)
def test_wrong_input(capsys: pytest.CaptureFixture[str], line: str, words: str) -> None:
    assert words in refused(capsys, line)


def test_a_model_that_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, "advise deepseek-v3 --device h100 --engine trtllm --num-gpus 4 --num-requests 1")
    assert "none of the 6 ways of TensorRT-LLM" in error and "does not fit" in error


# -- ways and their layouts --------------------------------------------------------------------------------------------


def test_ways_say_what_engines_can_do() -> None:
    v3 = preset("deepseek-v3")
    sglang = ways("sglang", v3, 8)
    assert {way.mesh.num_groups for way in sglang if not way.refusal} == {1, 2, 4, 8}
    scattered = [way for way in sglang if ("--enable-attn-tp-input-scattered", None) in way.flags]
    assert scattered and all(way.mesh.num_groups == 1 for way in scattered)
    assert not any("scattered" in way.title for way in ways("sglang", preset("deepseek-v2-lite"), 8))  # no q_lora_rank
    assert not any("scattered" in way.title for way in ways("vllm", v3, 8))
    trtllm = ways("trtllm", v3, 8)
    assert {way.mesh.num_groups for way in trtllm if not way.refusal} == {1, 8}
    assert {way.refusal for way in trtllm if way.mesh.num_groups == 2} == {"its attention groups have one rank each"}
    grouped = [way for way in ways("vllm", v3, 8) if way.mesh.num_groups == 2]
    assert [bool(way.refusal) for way in grouped] == [True, False]
    assert ("--enable-expert-parallel", None) in grouped[1].flags
    with pytest.raises(ConfigError, match="blocks of 128"):
        ways("trtllm", preset("deepseek-v3"), 24)


@pytest.mark.parametrize("model", ["deepseek-v3", "deepseek-v2-lite", "qwen3-30b-a3b"])
@pytest.mark.parametrize(("dp", "tp"), [(4, 1), (2, 2)])
def test_layouts_of_engines_are_plans(model: str, dp: int, tp: int) -> None:
    """Each is a legal plan, no cheaper than `auto`, and takes the experts' sum by reduce-scatter."""
    mesh = Mesh.of(dp=dp, tp=tp)
    deployment = Deployment(config=preset(model), mesh=mesh, device=device("h200"), dtype="bf16")
    planner = Planner(deployment, WeightSharding())
    shape = StepShape.of(mesh, split_evenly(1001, dp), phase="prefill", context=512)
    least = planner.plan(shape).ps
    for name in ENGINE_LAYOUTS:
        if reason := inapplicable(name, deployment.config, mesh):
            assert name == "trtllm-dp" and "one rank in each group" in reason
            continue
        plan = planner.plan(shape, name)
        plan.validate()
        assert plan.ps >= least
        moves = {op.name for _, op in plan.ops() if op.move is not None and op.boundary == "input_norm"}
        assert "reduce_scatter" in moves and "all_reduce" not in moves
    one_group = Mesh.of(dp=1, tp=4)
    assert all("dp is 1" in inapplicable(name, deployment.config, one_group) for name in ENGINE_LAYOUTS)
