"""`verify --against transformers`: a right model passes, and an error of all layouts is detected."""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from documents import run_for_both
from random_models import save_random_model
from test_formats_gguf import write as write_gguf
from torch import Tensor

from narrows.arch.config import read_config
from narrows.arch.weights import Weight
from narrows.cli.main import main
from narrows.cli.verify_command import _where_to_look
from narrows.engine.config import EngineConfig
from narrows.engine.free_memory import free_memory
from narrows.errors import ConfigError
from narrows.evaluate.transformers_model import TransformersModel, load_transformers
from narrows.evaluate.verify import VerifyReport, verify
from narrows.plan.plan import Plan
from narrows.weights.safetensors_folder import SafetensorsFolder

V3 = {
    "model_type": "deepseek_v3",
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "moe_intermediate_size": 16,
    "n_routed_experts": 16,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.0,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
}
Change = Callable[[Weight, Tensor], Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("v3")
    (folder / "config.json").write_text(json.dumps(V3), encoding="utf-8")
    save_random_model(folder, random.Random(0))
    return folder


@pytest.fixture(scope="module")
def loaded(folder: Path) -> TransformersModel:
    return load_transformers(folder, read_config(folder))


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 67, (length,), generator=generator).tolist() for length in lengths]


def against(model: str | Path, loaded: TransformersModel, *, dp: int = 2, tp: int = 2, **more: Any) -> VerifyReport:
    engine_config = EngineConfig(model=str(model), dp=dp, tp=tp, dtype=more.pop("dtype", "float32"))
    return verify(engine_config, prompts(23, 5, 30, 1), num_decode=4, outside=lambda _config: loaded, **more)


class Changed:
    """A checkpoint some of whose tensors are others, alike on all ranks."""

    def __init__(self, folder: Path, change: Change) -> None:
        self._source, self._change = SafetensorsFolder(folder), change

    def take(self, weight: Weight, span: tuple[int, int] | None, expert: int | None = None) -> Tensor:
        return self._change(weight, self._source.take(weight, span, expert))


def scaled(name: str, factor: float) -> Change:
    return lambda weight, tensor: tensor * factor if weight.name == name else tensor


# -- all is well -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dp", "tp"), [(1, 1), (2, 2)])
def test_a_model_that_is_right_passes_under_every_layout(
    folder: Path, loaded: TransformersModel, dp: int, tp: int
) -> None:
    report = against(folder, loaded, dp=dp, tp=tp)
    assert report.ok and report.outside and len(report.layouts) == (5 if dp > 1 else 2)
    for layout in report.layouts:
        assert layout.num_rows > 50 and layout.agreement == 1.0 and layout.flips == [], "every row was compared"
        assert 0 < layout.max_logit_difference < 2e-5 and layout.largest_at is not None
        prompt, position = layout.largest_at
        assert 0 <= prompt < 4 and 0 <= position < (23, 5, 30, 1)[prompt] + 4


def test_bfloat16_has_the_same_tolerance_as_against_one_rank(folder: Path, loaded: TransformersModel) -> None:
    report = against(folder, loaded, dp=1, dtype="bfloat16", layouts=["auto"])
    assert report.ok and report.tolerance == 6e-2 and report.layouts[0].max_logit_difference > 1e-3


def test_the_command_passes_the_demo_model(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--against", "transformers", "--tp", "2", "--layout", "auto", "--steps", "4"]
    out, found = run_for_both(capsys, ["verify", "narrows-demo", *flags])
    (one,) = found["layouts"]
    assert found["ok"] and one["ok"] and one["layout"] == "auto" and found["reference"].startswith("transformers 5.")
    assert 0 < one["max_logit_difference"] < 1e-3 and found["served"]["faults"] == {}
    assert "against transformers 5." in out and "of the logits' size" in out and "differs" not in out


def test_a_gguf_file_is_compared_after_conversion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, to = write_gguf(tmp_path / "model.gguf", "qwen2"), tmp_path / "folder"
    assert f"make one with `narrows convert {file} FOLDER`" in refused(capsys, file)
    assert main(["convert", str(file), str(to)]) == 0
    assert main(["verify", str(to), "--against", "transformers", "--layout", "auto", "--steps", "2"]) == 0


def test_a_prompts_reference_does_not_depend_on_earlier_prompts(tmp_path: Path) -> None:
    """Rotary positions of type dynamic remember the longest text of all: 20 tokens after 30 would be those of 30."""
    config = {"model_type": "llama", "vocab_size": 67, "hidden_size": 16, "num_attention_heads": 2}
    config |= {"num_hidden_layers": 2, "intermediate_size": 24, "max_position_embeddings": 16}
    config |= {"rope_scaling": {"type": "dynamic", "factor": 4.0}}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_random_model(tmp_path, random.Random(1))
    model = load_transformers(tmp_path, read_config(tmp_path))
    first, longer = prompts(20, 30)
    model.begin([first, longer, first])
    alone, _, after = model._prompts
    assert torch.equal(alone.logits, after.logits)


# -- errors of all layouts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.o_proj.weight", "model.norm.weight"])
def test_a_misread_tensor_is_detected_only_by_the_reference(folder: Path, loaded: TransformersModel, name: str) -> None:
    source = Changed(folder, scaled(name, 1.01))
    layouts = ["sequence-parallel", "auto"]
    engine_config = EngineConfig(model=str(folder), tp=2, dtype="float32")
    assert verify(engine_config, prompts(9, 5), num_decode=2, source=source, layouts=layouts).ok, (
        "layouts agree about it"
    )
    report = against(folder, loaded, dp=1, source=source, layouts=layouts)
    assert [layout.layout for layout in report.layouts if layout.ok] == []
    for layout in report.layouts:
        assert layout.worst > 1e-3 and "gathered: logits differs by" in layout.failure


def other_config(folder: Path, to: Path, **fields: Any) -> Path:
    """The same weights under another config.json."""
    shutil.copytree(folder, to)
    (to / "config.json").write_text(json.dumps(V3 | fields), encoding="utf-8")
    return to


@pytest.mark.parametrize(
    "fields",
    [{"rope_theta": 20000.0}, {"rms_norm_eps": 1e-3}, {"routed_scaling_factor": 2.1}, {"norm_topk_prob": False}],
    ids=str,
)
def test_a_misread_field_is_detected(
    folder: Path, loaded: TransformersModel, tmp_path: Path, fields: dict[str, Any]
) -> None:
    report = against(other_config(folder, tmp_path / "other", **fields), loaded, dp=1, layouts=["auto"])
    assert not report.ok and report.layouts[0].worst > 1e-4


def test_a_different_routing_rule_is_no_near_tie(folder: Path, loaded: TransformersModel, tmp_path: Path) -> None:
    """The choice is replayed, so the logits agree; the margin reveals the rule."""
    report = against(other_config(folder, tmp_path / "other", topk_group=4), loaded, dp=1, layouts=["auto"])
    (layout,) = report.layouts
    assert "rows go to other experts, and not by a near-tie: first layer 1, row " in layout.failure
    assert len(layout.flips) > 20 and layout.first_difference is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts_per_tok": 2}, r"routed experts in layer \d .* read config.json differently"),
        ({"first_k_dense_replace": 0}, r"tensor model.layers.0.mlp.gate.weight is missing"),
    ],
    ids=["numbers", "layers"],
)
def test_other_numbers_or_layers_of_experts_are_a_one_line_error(
    folder: Path, loaded: TransformersModel, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        against(other_config(folder, tmp_path / "other", **fields), loaded, dp=1, tp=1)


def test_the_command_says_where_to_look(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    take = SafetensorsFolder.take

    def wrong(self: SafetensorsFolder, weight: Weight, *rest: Any) -> Tensor:
        return scaled("model.norm.weight", 1.02)(weight, take(self, weight, *rest))

    monkeypatch.setattr(SafetensorsFolder, "take", wrong)
    flags = ["--prompt", "one", "--prompt", "two words", "--steps", "2"]
    assert main(["verify", str(folder), *flags]) == 0
    assert main(["verify", str(folder), *flags, "--against", "transformers"]) == 1
    out = capsys.readouterr().out
    assert out.count("DIFFERS") == 2 and "every layout differs from transformers 5." in out
    assert "how config.json is read" in " ".join(out.split())


def test_a_wrong_layout_is_distinguished_from_a_wrong_model(folder: Path, loaded: TransformersModel) -> None:
    seen: set[str] = set()

    def tamper(plan: Plan) -> Plan:
        seen.add(plan.layout_name)
        return plan

    report = against(folder, loaded, dp=1, layouts=["all-reduce", "auto"], tamper=tamper)
    assert seen >= {"all-reduce"} and report.ok
    report.layouts[1].failure = "it is wrong"
    assert _where_to_look(report, "transformers 5").startswith("only auto differs from transformers 5, so the model")


# -- wrong inputs ----------------------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], model: str | Path, *flags: str) -> str:
    assert main(["verify", str(model), "--against", "transformers", *flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("narrows: error: ")
    return error


def test_without_transformers_one_line_says_how_to_install_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'narrows[against]'" in refused(capsys, folder)


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(folder: Path, tmp_path: Path) -> None:
    config = read_config(folder)
    weights = sum(tensor.numel() * 4 for tensor in load_transformers(folder, config).model.state_dict().values())
    with pytest.raises(ConfigError, match="GB of weights in float32"):
        load_transformers(folder, config, room=weights)
    assert load_transformers(folder, config, room=round(weights * 1.11)).model is not None
    large = {"hidden_size": 8192, "moe_intermediate_size": 4096, "n_routed_experts": 256, "num_hidden_layers": 64}
    (tmp_path / "config.json").write_text(json.dumps(V3 | large), encoding="utf-8")
    with pytest.raises(ConfigError, match="GB are free; take a smaller model"):
        load_transformers(tmp_path, read_config(tmp_path))


def test_the_room_is_the_machines_or_the_containers(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9000 kB\nMemAvailable:    4000 kB\n", encoding="ascii")
    assert free_memory(meminfo, tmp_path) == 4_096_000, "no limit is known"
    for name, text in (("max", "max"), ("current", "500000"), ("stat", "anon 1\ninactive_file 100000\n")):
        (tmp_path / f"memory.{name}").write_text(text, encoding="ascii")
    assert free_memory(meminfo, tmp_path) == 4_096_000
    (tmp_path / "memory.max").write_text("1000000\n", encoding="ascii")
    assert free_memory(meminfo, tmp_path) == 600_000
    assert free_memory() > 1 << 20


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"model_type": "kimi_k2"}, "cannot load it"),
        ({"model_type": "mamba"}, 'architecture "mamba" is not supported'),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 16]}}, "not fp8; take the unq"),
    ],
    ids=str,
)
def test_models_that_cannot_be_compared_are_refused_by_name(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], fields: dict[str, Any], says: str
) -> None:
    assert says in refused(capsys, other_config(folder, tmp_path / "other", **fields))


def test_random_weights_and_presets_have_no_checkpoint(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    assert "--load-format dummy has no checkpoint" in refused(capsys, folder, "--load-format", "dummy")
    assert "is none" in refused(capsys, "dsv3-mini")


def test_a_tensor_that_transformers_would_draw_at_random_is_named(folder: Path, tmp_path: Path) -> None:
    other = other_config(folder, tmp_path / "other", num_hidden_layers=4)
    with pytest.raises(ConfigError, match=r"no tensor for \d+ of its weights, first model.layers.3."):
        load_transformers(other, read_config(other))


def test_code_that_comes_with_a_checkpoint_never_runs(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "it-ran"
    classes = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    other = other_config(folder, tmp_path / "other", auto_map=classes)
    (other / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\n", encoding="utf-8")
    load_transformers(other, read_config(other))
    unknown = other_config(folder, tmp_path / "unknown", auto_map=classes, model_type="kimi_k2")
    shutil.copy(other / "evil.py", unknown)
    with pytest.raises(ConfigError, match="cannot load it"):
        load_transformers(unknown, read_config(unknown))
    assert not marker.exists()
