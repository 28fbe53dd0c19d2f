"""narrows-demo, the included trained checkpoint: its results under every layout, and detection of faults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from narrows import LLM
from narrows.checkpoints import model_path
from narrows.cli.main import main
from narrows.engine.config import EngineConfig
from narrows.evaluate.evaluation import Evaluation, default_files, evaluate
from narrows.evaluate.tasks import Setting
from narrows.evaluate.verify import verify
from narrows.text import Tokenizer

FOLDER = Path(model_path("narrows-demo"))
LAYOUTS = ("all-reduce", "attn-tp-input-scattered", "norm-before-gather", "sequence-parallel", "auto")
PERPLEXITY = 30.0
"""Per token, over the first windows of the held-out text."""

SAMPLE = Setting(limit=24, window=96, arithmetic_tokens=6)


def run(layouts: tuple[str, ...], *tasks: str, dp: int = 2, tp: int = 2, **more: Any) -> Evaluation:
    files = default_files(str(FOLDER))
    engine_config = EngineConfig(model="narrows-demo", dp=dp, tp=tp, max_context=512)
    given = {"setting": SAMPLE, "num_alone": 1, "kl_rows": 192} | more
    return evaluate(engine_config, {task: files[task] for task in tasks}, layouts, **given)


def test_the_demo_model_is_a_small_deepseek_v3_with_task_files() -> None:
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["architectures"] == ["DeepseekV3ForCausalLM"]
    assert all(config[name] for name in ("q_lora_rank", "kv_lora_rank", "n_shared_experts", "topk_group"))
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) < 30e6
    assert set(default_files(str(FOLDER))) == {"perplexity", "arithmetic", "choices", "gsm8k"}


def test_transformers_loads_it_unchanged_and_writes_the_same_greedy_text() -> None:
    questions = ["What is 47 + 38?", "Which is larger, 512 or 498?"]
    prose = ["In the beginning"]
    theirs = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    backend = AutoTokenizer.from_pretrained(FOLDER)
    chats = [[{"role": "user", "content": question}] for question in questions]
    with LLM("narrows-demo", tp=2, dtype="float32") as llm:
        ours = llm.generate([*chats, *prose], max_tokens=24)
    for prompt, completion in zip([*chats, *prose], ours, strict=True):
        if isinstance(prompt, str):
            ids = backend(prompt)["input_ids"]
        else:
            ids = backend.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
        with torch.no_grad():
            out = theirs.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0, len(ids) :]
        assert completion.text == backend.decode(out, skip_special_tokens=True), prompt


def test_a_small_sample_of_all_tasks_is_within_fixed_bounds_under_every_layout() -> None:
    report = run(LAYOUTS, "perplexity", "arithmetic")
    assert report.ok, [layout.failures for layout in report.layouts]
    for result in (report.one_rank, *report.layouts):
        scores = {score.task: score for score in result.scores if not score.alone}
        kinds = scores["arithmetic"].kinds
        assert kinds["two-digit addition"].share >= 0.95, result.layout
        assert scores["perplexity"].perplexity.perplexity < PERPLEXITY, result.layout
        assert scores["arithmetic"].same is None or scores["arithmetic"].same >= 0.95, result.layout


def test_a_norm_1_percent_off_on_one_rank_shows_in_eval_and_verify(faults: Any) -> None:
    """In float32: bf16 rounds away more than that, and says so."""
    faults.scale("model.layers.3.input_layernorm.weight", rank=1)
    (found,) = run(("auto",), "arithmetic").layouts
    assert any(line.startswith("distributions in float32, batched: ") for line in found.failures)
    engine_config = EngineConfig(model="narrows-demo", dp=2, tp=2, dtype="float32")
    (named,) = verify(engine_config, _prompts(), layouts=["auto"]).layouts
    assert named.failure.startswith("layer 3 input_norm: hidden differs") and "on rank 1" in named.failure


@pytest.mark.full  # on small models in test_evaluate.py and test_verify.py
def test_a_missing_reduction_shows_in_every_figure_and_in_verify(faults: Any) -> None:
    faults.leave_out_sum("layer 3 post_attn_norm")
    (found,) = run(("all-reduce",), "perplexity", "arithmetic").layouts
    seen = {line.partition(":")[0] for line in found.failures}
    assert {"perplexity, batched", "arithmetic, batched", "distributions in bfloat16, batched"} <= seen, found.failures
    (named,) = verify(EngineConfig(model="narrows-demo", dp=2, tp=2), _prompts(), layouts=["all-reduce"]).layouts
    assert named.failure.startswith("layer 3 post_attn_norm: hidden differs"), named.failure


def test_the_name_is_known_to_every_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "narrows-demo", "--device", "h100", "--tp", "2", "--rows", "64"]) == 0
    assert "narrows-demo on dp 1 x tp 2" in capsys.readouterr().out
    assert main(["generate", "narrows-demo", "--chat", "--prompt", "What is 20 + 22?", "--quiet"]) == 0
    assert capsys.readouterr().out.strip() == "42"
    assert main(["plan", "narrows-dema", "--device", "h100", "--tp", "2", "--rows", "64"]) == 2
    assert "built in: narrows-demo" in capsys.readouterr().err
    (tmp_path / "narrows-demo").mkdir()  # a local folder comes before the included model
    assert main(["plan", "narrows-demo", "--device", "h100", "--tp", "2", "--rows", "64"]) == 2


def _prompts() -> list[list[int]]:
    tokenizer = Tokenizer.from_folder(FOLDER)
    return [tokenizer.encode("What is 47 + 38?"), tokenizer.encode("In the beginning God created the heaven")]
