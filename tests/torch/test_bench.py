"""`narrows bench` on tiny models with rank threads: runs, counts, and refusals."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from documents import run_for_both
from gguf import GGUFReader
from safetensors.torch import load_file

from narrows.arch.config import read_config
from narrows.arch.presets import preset
from narrows.bench.collectives import must_copy
from narrows.bench.engines import parse_variants, running_variants
from narrows.bench.requests import Times, random_prompts
from narrows.calibrate.machine import proportional_memory
from narrows.calibrate.step_work import StepWork, fill_caches
from narrows.cli.main import main
from narrows.engine.config import EngineConfig, resolve
from narrows.engine.core import Engine
from narrows.engine.program import Wrap
from narrows.engine.worker import Worker
from narrows.errors import ConfigError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
QUICK = ("--rounds", "2", "--warmup", "0")
TOP_K, NUM_MOE_LAYERS = 3, 2


@pytest.fixture(scope="module")
def folder(tiny_model) -> Path:
    return tiny_model("v3", num_hidden_layers=3)


@pytest.fixture(autouse=True)
def small_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's limits do not matter here."""
    for module in ("probe", "rates"):
        monkeypatch.setattr(f"narrows.calibrate.{module}.GEMM_SHAPE", (64, 128, 64))
    monkeypatch.setattr("narrows.calibrate.rates._READ", 1 << 20)


def bench(capsys: pytest.CaptureFixture[str], kind: str, folder: Path, *flags: str) -> dict[str, Any]:
    _, document = run_for_both(capsys, ["bench", kind, str(folder), *QUICK, *flags])
    assert document["bench"] == kind and document["machine"]["cores"] >= 1 and document["versions"]["torch"]
    return document


def by_work(document: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    return {result["work"]: result["variants"] for result in document["results"]}


def test_latency_counts_experts_and_compares_layouts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    works = ("--prompt-lengths", "24", "--batches", "1,4", "--context", "5", "--steps", "4")
    document = bench(capsys, "latency", folder, "--tp", "2", "--every-layout", *works)
    found = by_work(document)
    assert list(found) == ["prefill 24", "decode, batch 1", "decode, batch 4"]
    layouts = ["all-reduce", "attn-tp-input-scattered", "sequence-parallel", "auto"]
    for variants in found.values():
        assert list(variants) == layouts
        assert all(one["count"] == 2 and one["median"] > 0 for one in variants.values())
    for name in layouts:
        one, four = (found[f"decode, batch {batch}"][name]["experts_hit"] for batch in (1, 4))
        assert one == NUM_MOE_LAYERS * TOP_K, "a row of its own hits as many as it takes"
        assert NUM_MOE_LAYERS * TOP_K < four < 4 * NUM_MOE_LAYERS * TOP_K, "rows share some of theirs"
    assert document["calibration"]["read_bytes_per_s"]["count"] == 2


def test_more_sequences_than_ever_run_at_once_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    works = ("--prompt-lengths", "0", "--batches", "300", "--context", "4", "--steps", "2")  # a group runs 256
    assert main(["bench", "latency", str(folder), *QUICK, *works]) == 2
    assert "batch 300: its requests never all ran at once; raise --max-rows" in capsys.readouterr().err


def test_layer_parts_add_up_to_the_step(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layouts = ("--layout", "all-reduce", "--layout", "attn-tp-input-scattered")
    found = by_work(bench(capsys, "layer", folder, "--tp", "2", "--rows", "16", *layouts))
    for name in ("all-reduce", "attn-tp-input-scattered"):
        values = {work: variants[name]["values"] for work, variants in found.items() if not work.startswith(" ")}
        assert list(values) == [
            "low-rank projection", "norm", "communication", "rest", "outside the plan", "whole step",
        ]  # fmt: skip
        whole = values.pop("whole step")
        assert [sum(parts) for parts in zip(*values.values(), strict=True)] == pytest.approx(whole)
        assert min(values["communication"]) > 0
        detail = [variants[name]["values"] for work, variants in found.items() if work.startswith(" ")]
        assert [sum(parts) for parts in zip(*detail, strict=True)] == pytest.approx(values["rest"])
    assert found["low-rank projection"]["all-reduce"]["predicted_ms"] > 0


def test_layer_runs_decode_steps_too(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = by_work(bench(capsys, "layer", folder, "--dp", "2", "--rows", "3", "--phase", "decode", "--context", "20"))
    assert found["whole step"]["auto"]["median"] > 0


GRID = ("--rows", "1,24", "--context", "8", "--seconds-per-cell", "0.2")


def test_layout_measures_every_layout_once_per_way(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = bench(
        capsys, "layout", folder, "--tp", "2", *GRID, "--rounds", "5"
    )  # the median of some: one may be bad
    assert [(one["phase"], one["rows"]) for one in document["cells"]] == [
        ("prefill", 1), ("prefill", 24), ("decode", 1), ("decode", 24),
    ]  # fmt: skip
    layouts = ["all-reduce", "attn-tp-input-scattered", "sequence-parallel", "auto"]
    for one in document["cells"]:
        assert sorted(name for plan in one["plans"] for name in plan["layouts"]) == sorted(layouts)
        assert one["regret"] >= 0 and "auto" in one["chosen"] and one["named_pick"] in layouts[:3]
        assert len({plan["rounds"] for plan in one["plans"]}) == 1, "plans take turns"
        for plan in one["plans"]:
            assert plan["rounds"] >= 5 and plan["outside_ms"] >= 0
            assert plan["execution_ms"] > 0 and plan["measured_ms"] > 0
            assert plan["predicted_ms"] > 0 and plan["sources"] == {"roofline": pytest.approx(1)}
            by_class: dict[str, float] = {}
            for op in plan["ops"]:
                by_class[op["class"]] = by_class.get(op["class"], 0.0) + op["times"] * op["predicted_us"] / 1e3
            for name, ms in plan["classes_ms"].items():
                assert ms["measured"] > 0 and ms["predicted"] == pytest.approx(by_class[name])
    found = document["summary"]
    assert found["cells"] == 4 and found["right"] == sum(one["within_3_percent"] for one in document["cells"])
    assert [list(variants) for variants in by_work(document).values()] == [layouts] * 4
    assert document["calibration"]["gemm_flop_per_s"]["count"] == 5, "before the first cell, and after each"
    assert not any("pace" in note for note in document["notes"]), "there is no profile to be held against"


def test_layout_beside_auto_alone_and_prompts_of_a_length(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--phase", "prefill", "--rows", "12", "--prompt-length", "4", "--layout", "norm-before-gather")
    (only,) = bench(capsys, "layout", folder, "--dp", "2", *flags, "--seconds-per-cell", "0")["cells"]
    assert only["step"] == "prefill 12 by 4" and only["context"] == 4
    assert sorted(name for plan in only["plans"] for name in plan["layouts"]) == ["auto", "norm-before-gather"]
    assert {plan["rounds"] for plan in only["plans"]} == {2}, "no seconds: as many rounds as requested"


def test_a_step_whose_cache_is_too_large_is_left_out_with_a_note(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    token = (12 + 4) * 4 * 3  # latent and rotary key, float32, three layers; one rank
    monkeypatch.setattr("narrows.bench.layout.available_memory", lambda: 2 * 1000 * token)
    grid = ("--rows", "2,90", "--phase", "decode", "--context", "8", "--seconds-per-cell", "0")
    document = bench(capsys, "layout", folder, *grid)
    assert [one["step"] for one in document["cells"]] == ["decode 2 x 8"]
    assert "left out: decode 90 x 8" in document["notes"][0]
    assert main(["bench", "layout", str(folder), "--rows", "90", *grid[2:]]) == 2
    assert "lower --rows or --context" in capsys.readouterr().err


def test_a_cache_is_filled_as_far_as_it_reaches(folder: Path) -> None:
    engine_config = EngineConfig(model=str(folder), tp=2, kv_tokens=5000, page_size=4, max_context=50)
    workers: list[Worker] = []
    with Engine(resolve(engine_config), wrap=_remembers(workers)) as engine:
        fill_caches(engine)
        caches = [layer.cache_SC for worker in workers for layer in worker.model.layers]
        assert len(caches) == 2 * 3 and all(bool((cache != 0).any(dim=1).all()) for cache in caches)


def _remembers(workers: list[Worker]) -> Callable[[Worker], Wrap]:
    def make(worker: Worker) -> Wrap:
        workers.append(worker)
        return lambda layer, op, reads, writes, operation: operation

    return make


def test_offline_against_other_ranks(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = ("--num-requests", "3", "--input-length", "6", "--output-length", "4")
    found = by_work(bench(capsys, "offline", folder, *work, "--against", "tp=2"))
    output, both, first = found.values()
    assert list(output) == ["auto", "tp=2"]
    assert [both["auto"]["values"][i] / output["auto"]["values"][i] for i in (0, 1)] == pytest.approx([30 / 12] * 2)
    assert 0 < first["auto"]["median"] < 12 / output["auto"]["p10"]
    assert "memory_mb" not in output["auto"], "with two engines in one process nobody knows whose it is"
    alone = by_work(bench(capsys, "offline", folder, *work))
    assert next(iter(alone.values()))["auto"]["memory_mb"] > 50


def test_collectives_beside_memcpy(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = by_work(bench(capsys, "collectives", folder, "--tp", "2", "--sizes", "2K,64K"))
    assert list(found) == [f"{op}, {n} KiB" for n in (2, 64) for op in ("all_reduce", "reduce_scatter", "all_gather")]
    assert all(one["times_memcpy"] > 0 for variants in found.values() for one in variants.values())


def test_bytes_that_a_collective_must_copy() -> None:
    assert [must_copy(op, 96, 2) for op in ("reduce_scatter", "all_gather", "all_reduce")] == [72, 96, 120]
    assert must_copy("all_reduce", 96, 1) == must_copy("reduce_scatter", 96, 1) == 96


def test_plot(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "layer.svg"
    bench(capsys, "layer", folder, "--tp", "2", "--rows", "8", "--plot", str(file))
    drawn = file.read_text(encoding="utf-8")
    assert drawn.startswith("<?xml") and "low-rank projection" in drawn


def test_without_matplotlib_the_extra_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["bench", "layer", str(folder), "--rows", "8", "--plot", "a.png"]) == 2
    assert "pip install 'narrows[plot]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("layer", "--rows", "0"), "--rows 0 must be at least 1"),
        (("layer", "--rows", "4", "--phase", "decode"), "needs --context of 2 or more"),
        (("layer", "--rows", "4", "--layout", "norm-before-gather"), "norm-before-gather"),
        (("layer", "--rows", "4", "--layout", "auto", "--every-layout"), "leave --layout out"),
        (("layout", "--rows", "0,4"), "--rows: whole numbers above 0"),
        (("layout", "--rows", "four"), "--rows: whole numbers above 0"),
        (("layout", "--context", "1"), "needs --context of 2 or more"),
        (("layout", "--context", "4000"), "4000 tokens are longer than"),
        (("layout", "--rows", "4096"), "give --prompt-length"),
        (("layout", "--layout", "norm-before-gather"), "norm-before-gather"),
        (("layout", "--seconds-per-cell", "-1"), "--seconds-per-cell is -1"),
        (("layout", "--prompt-length", "-1"), "--prompt-length is -1"),
        (("layout", "--rounds", "0"), "--rounds is 0"),
        (("layout", "--html", "/no/such/a.html"), "there is no folder /no/such"),
        (("latency", "--prompt-lengths", "0", "--batches", "0"), "leave nothing to measure"),
        (("latency", "--batches", "two"), "whole numbers with commas"),
        (("offline", "--num-requests", "0"), "--num-requests is 0"),
        (("offline", "--rounds", "0"), "--rounds is 0"),
        (("offline", "--threads", "0"), "--threads is 0"),
        (("offline", "--against", "colour=red"), "OPTION=VALUE[,OPTION=VALUE] is needed"),
        (("offline", "--against", "tp=two"), "'two' must be a whole number"),
        (("offline", "--against", "checked=perhaps"), "'perhaps' must be yes or no"),
        (("collectives",), "one rank has no other to exchange with"),
        (("collectives", "--tp", "2", "--against", "mpi"), "transports: gloo, threads"),
        (("collectives", "--tp", "2", "--against", "gloo"), "compare with them under --ranks processes"),
        (("collectives", "--tp", "2", "--sizes", "2X"), "is no number of bytes"),
        (("layer", "--rows", "8", "--plot", "a.nothing"), "the name must end in one of"),
        (("layer", "--rows", "8", "--plot", "/no/such/a.png"), "there is no folder /no/such"),
    ],
)
def test_impossible_options_are_a_one_line_error(
    folder: Path, flags: tuple[str, ...], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, *more = flags
    assert main(["bench", kind, str(folder), *more]) == 2
    err = capsys.readouterr().err
    assert text in err and err.startswith("narrows: error: ") and err.count("\n") == 1


def test_steps_are_timed_while_all_requests_run() -> None:
    first = (1.0, 2.0, 3.0, 4.0, 5.0, 6.5, 8.5)
    second = (3.0, 4.0, 5.0, 6.5, 8.5, 9.0, 9.5)  # began two steps later; the first ends at 8.5
    assert Times(total=9.5, tokens=(first, second)).step_seconds() == (1.5, 2.0)


def test_prompts_are_the_same_for_the_same_seed() -> None:
    assert random_prompts(2, 5, 100, 1) == random_prompts(2, 5, 100, 1) != random_prompts(2, 5, 100, 2)


def test_variants_share_an_engine_unless_options_differ(folder: Path) -> None:
    engine_config = EngineConfig(model=str(folder), tp=2)
    with running_variants(
        parse_variants(engine_config, ("auto", "all-reduce"), ("tp=1,batch-invariant=yes",))[:3]
    ) as running:
        assert [one.name for one in running] == ["auto", "all-reduce", "auto, tp=1,batch-invariant=yes"]
        assert running[0].shared is running[1].shared is not running[2].shared
        assert running[2].resolved.engine_config.batch_invariant and running[2].resolved.mesh.size == 1
        assert running[1].engine().plans.current.layout == "all-reduce"
        assert running[0].engine().plans.current.layout == "auto"


def test_a_pinned_plan_refuses_other_layouts(folder: Path) -> None:
    with (
        Engine(resolve(EngineConfig(model=str(folder), tp=2, batch_invariant=True))) as engine,
        pytest.raises(ConfigError, match="one plan runs at every step"),
    ):
        engine.plans.select("all-reduce")


def test_ranks_have_the_requested_threads(folder: Path) -> None:
    seen: list[int] = []

    class Threads:
        def __init__(self, worker: object) -> None:
            seen.append(torch.get_num_threads())

    with Engine(resolve(EngineConfig(model=str(folder), tp=2, threads=2)), wrap=Threads):
        assert seen == [2, 2]


@pytest.mark.parametrize(("phase", "rows", "context"), [("prefill", 10, 0), ("prefill", 10, 4), ("decode", 5, 9)])
def test_a_manual_step_has_the_requested_rows(phase: str, rows: int, context: int) -> None:
    batch = StepWork(rows=rows, phase=phase, context=context).batch(2, 4, 50)
    assert (batch.num_rows, batch.phase) == (rows, phase)
    for group in batch.groups:
        pages = [page for chunk in group for page in chunk.pages]
        assert len(set(pages)) == len(pages) and 0 not in pages, "no page twice, and never the null page"
        assert all(len(chunk.pages) * 4 >= chunk.start + len(chunk.tokens) for chunk in group)


def test_memory_of_a_process_that_has_ended_is_nothing() -> None:
    assert proportional_memory([2**22 + 1]) == 0


# -- the checkpoint of the peers


def module_of(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("model", ["dsv3-mini", "dsv2-mini"])
def test_the_config_that_peers_read_is_the_preset(model: str, tmp_path: Path) -> None:
    raw = module_of(BENCHMARKS / "make_mini.py").config_json(model)
    (tmp_path / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    ours, theirs = preset(model), read_config(tmp_path)
    for name in ("attention", "moe", "hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size", "dtype"):
        assert getattr(ours, name) == getattr(theirs, name)


def test_the_gguf_file_has_every_value(tiny_model, tmp_path: Path) -> None:
    folder = tiny_model(
        "v3", scoring_func="sigmoid", topk_method="noaux_tc", rope_theta=1e4, rms_norm_eps=1e-6, num_key_value_heads=8
    )
    module_of(BENCHMARKS / "peers" / "to_gguf.py").write(folder, tmp_path / "tiny.gguf")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "model.safetensors")
    found = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "tiny.gguf").tensors}

    def values(name: str) -> torch.Tensor:
        tensor = found[name]
        shape = [int(n) for n in reversed(tensor.shape)]
        data = np.array(tensor.data)
        if tensor.tensor_type.name == "F32":
            return torch.from_numpy(data).view(shape)
        return torch.from_numpy(data).view(torch.bfloat16).view(shape).float()

    assert sum(int(tensor.n_elements) for tensor in found.values()) == sum(t.numel() for t in tensors.values())
    stacked = torch.stack([tensors[f"model.layers.1.mlp.experts.{i}.up_proj.weight"] for i in range(16)])
    assert torch.equal(values("blk.1.ffn_up_exps.weight"), stacked.bfloat16().float())
    kv_b = tensors["model.layers.0.self_attn.kv_b_proj.weight"].view(config["num_attention_heads"], -1, 12)
    assert torch.equal(values("blk.0.attn_k_b.weight"), kv_b[:, :8].transpose(1, 2).bfloat16().float())
    assert torch.equal(values("blk.0.attn_v_b.weight"), kv_b[:, 8:].bfloat16().float())
    assert torch.equal(values("blk.1.exp_probs_b.bias"), tensors["model.layers.1.mlp.gate.e_score_correction_bias"])


@pytest.mark.parametrize(
    ("kind", "works", "rows"),
    [
        ("layer", ("--rows", "16", "--layout", "all-reduce", "--layout", "sequence-parallel"), {16}),
        ("latency", ("--prompt-lengths", "24", "--batches", "2", "--context", "5", "--steps", "4"), {24, 2}),
        ("offline", ("--num-requests", "2", "--input-length", "6", "--output-length", "4"), {12, 2}),
    ],
)
def test_a_trace_of_a_bench(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, kind: str, works: tuple[str, ...], rows: set[int]
) -> None:
    """From the first round on, the counting of experts before it included: instruments stand side by side."""
    file = tmp_path / "trace.json"
    bench(capsys, kind, folder, "--tp", "2", *works, "--trace", str(file))
    events = json.loads(file.read_text())["traceEvents"]
    assert rows <= {event["args"]["rows"] for event in events if event.get("cat") == "step"}
    steps = sum(event.get("cat") == "step" for event in events)
    assert sum(event.get("cat") == "execution" for event in events) == 2 * steps > 0
