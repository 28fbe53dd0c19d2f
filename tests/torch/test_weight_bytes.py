"""A plan's bytes per rank are the ranks' bytes: every tensor of every rank's model is counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from narrows.arch.config import ModelConfig, read_config
from narrows.arch.weight_sharding import WeightSharding, sharding_choices
from narrows.cli.main import main
from narrows.cost import device
from narrows.cost.memory import weight_bytes
from narrows.engine.config import EngineConfig, resolve
from narrows.errors import ConfigError
from narrows.layout import Mesh
from narrows.models.decoder import Decoder, RankContext
from narrows.models.registry import build_model
from narrows.ops.int8 import Int8Linear, Int8Stack, Quantization
from narrows.plan.deploy import loaded_dtype, planned_dtype
from narrows.weights.dummy import DummyWeights

DTYPES = {
    "fp32": (torch.float32, Quantization.NONE),
    "bf16": (torch.bfloat16, Quantization.NONE),
    "int8": (torch.bfloat16, Quantization.INT8),
}
KINDS = ("v3", "v2", "v2-lite", "llama", "llama-9", "qwen2", "qwen3", "qwen3-moe")
TinyModel = Callable[..., Path]
NOT_WEIGHTS = ("cache", "cos_", "sin_")


@pytest.fixture
def plain_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without panels, whose last one is padded, and without the second packing of ``kv_b_proj``."""
    monkeypatch.setattr("narrows.ops.packed.kernels", lambda: None)


def held_bytes(model: Decoder) -> int:
    """Bytes of all tensors of a model that are weights, each memory counted once."""
    found: dict[int, int] = {}

    def note(value: Any) -> None:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            found[storage.data_ptr() if storage.nbytes() else id(value)] = storage.nbytes()
        elif isinstance(value, Int8Linear):
            note(value.values_OI)
            note(value.scales_O)
        elif isinstance(value, Int8Stack):
            note(value.values_EOI)
            note(value.scales_EO)
        elif isinstance(value, dict | tuple):
            for each in value.values() if isinstance(value, dict) else value:
                note(each)

    for part in (model, *model.layers):
        for name, value in vars(part).items():
            if not any(word in name for word in NOT_WEIGHTS):
                note(value)
    return sum(found.values())


def model_of(config: ModelConfig, mesh: Mesh, sharding: WeightSharding, dtype: str, rank: int) -> Decoder:
    kind, quantization = DTYPES[dtype]
    rank_context = RankContext(
        mesh=mesh,
        rank=rank,
        sharding=sharding,
        dtype=kind,
        device=torch.device("cpu"),
        num_slots=1,
        num_positions=1,
        quantization=quantization,
    )
    return build_model(config, DummyWeights(dtype=kind), rank_context)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_planned_bytes_are_the_bytes_that_ranks_hold(
    tiny_model: TinyModel, kind: str, dtype: str, plain_weights: None
) -> None:
    all_ranks_hold_what_is_planned(read_config(tiny_model(kind)), dtype)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("v2", {"attention_bias": True, "mlp_bias": True}),
        ("v2-lite", {"attention_bias": True, "hidden_act": "relu"}),
        ("v3", {"attention_bias": True, "num_hidden_layers": 4, "first_k_dense_replace": 0, "moe_layer_freq": 2}),
        ("qwen3-moe", {"mlp_only_layers": [1]}),
        ("qwen3-moe", {"mlp_only_layers": [0, 1, 2]}),
    ],
)
def test_planned_bytes_include_biases_and_mixed_layer_types(
    tiny_model: TinyModel, kind: str, changes: dict[str, Any], plain_weights: None
) -> None:
    all_ranks_hold_what_is_planned(read_config(tiny_model(kind, **changes)), "bf16")


def all_ranks_hold_what_is_planned(config: ModelConfig, dtype: str) -> None:
    for mesh in (Mesh.of(dp=1, tp=1), Mesh.of(dp=1, tp=3), Mesh.of(dp=2, tp=2)):
        choices = sharding_choices(config, mesh)
        for sharding in {choices[0], choices[-1]}:
            for rank in range(mesh.size):
                held = held_bytes(model_of(config, mesh, sharding, dtype, rank))
                assert held == weight_bytes(config, mesh, sharding, dtype, rank), f"{mesh}, {sharding}, rank {rank}"


# -- a folder has one dtype for every command ----------------------------------------------------------------------


@pytest.fixture
def v3(tiny_model: TinyModel) -> dict[str, Any]:
    """The config.json of a tiny DeepSeek-V3."""
    found: dict[str, Any] = json.loads((tiny_model("v3") / "config.json").read_text(encoding="utf-8"))
    return found


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
STORED = {
    # config.json -> (dtype that is planned for an H200, for an A100 and on this machine)
    "a V3 in bfloat16, as Moonlight": ({"dtype": "bfloat16"}, "bf16", "bf16"),
    "a V3 of transformers 4": ({"dtype": None, "torch_dtype": "bfloat16"}, "bf16", "bf16"),
    "a V3 in float16": ({"dtype": "float16"}, "bf16", "bf16"),
    "a V3 in float32": ({"dtype": "float32"}, "fp32", "fp32"),
    "a V3 in FP8": ({"dtype": "bfloat16", "quantization_config": FP8}, "fp8", "bf16"),
    "a V3 in FP8 of other blocks": (
        {"dtype": "bfloat16", "quantization_config": FP8 | {"weight_block_size": [64, 32]}},
        "fp8",
        "bf16",
    ),
}


@pytest.mark.parametrize(("fields", "on_fp8", "elsewhere"), STORED.values(), ids=STORED)
def test_a_checkpoint_is_planned_in_its_own_format(
    v3: dict[str, Any], fields: dict[str, Any], on_fp8: str, elsewhere: str
) -> None:
    config = read_config(v3 | fields, "folder")
    assert planned_dtype(config, device("h200"), "folder")[0] == on_fp8
    assert planned_dtype(config, device("a100"), "folder")[0] == elsewhere
    assert planned_dtype(config, device("cpu-core"), "folder")[0] == elsewhere == loaded_dtype(config)[0]


@pytest.mark.parametrize(("fields", "on_fp8", "elsewhere"), STORED.values(), ids=STORED)
def test_an_engine_holds_the_bytes_that_its_plan_predicts(
    tmp_path: Path, v3: dict[str, Any], fields: dict[str, Any], on_fp8: str, elsewhere: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(v3 | fields))
    resolved = resolve(EngineConfig(model=str(tmp_path), load_format="dummy"))
    assert resolved.deployment.dtype == elsewhere
    assert resolved.dtype == DTYPES[elsewhere][0]
    config, one = resolved.config, Mesh.of(dp=1, tp=1)
    use = replace(resolved.deployment, mesh=one).memory(WeightSharding())
    assert use.weights == weight_bytes(config, one, WeightSharding(), elsewhere, 0)


UNREADABLE = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "fp8 per tensor": {"quant_method": "fp8"},
}


@pytest.mark.parametrize("stored", UNREADABLE.values(), ids=UNREADABLE)
def test_every_command_refuses_an_unloadable_checkpoint_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], v3: dict[str, Any], stored: dict[str, Any]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(v3 | {"quantization_config": stored}))
    save_file({"nothing": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError) as refused:
        resolve(EngineConfig(model=str(tmp_path)))
    line = f"{tmp_path}: its weights are quantised by {stored['quant_method']!r}"
    assert str(refused.value).startswith(line) and "\n" not in str(refused.value)
    for command in ("plan {} --device h200 --rows 8", "simulate {} --device h200"):
        assert main(command.format(tmp_path).split()) == 2
        assert capsys.readouterr().err == f"narrows: error: {refused.value}\n"
    # A question about another dtype is answered.
    assert main([*f"plan {tmp_path} --device h200 --rows 8 --dtype bf16".split()]) == 0
