"""Models whose weights stay in the blocks of their GGUF file: against wide weights, over ranks, planned, refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import gguf_lab as lab
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from test_formats_gguf import write
from torch import Tensor

from narrows.arch.block_formats import BLOCK_FORMATS, NO_BLOCKS
from narrows.arch.presets import load_model_config
from narrows.arch.weight_sharding import WeightSharding, head_spans, split_columns
from narrows.arch.weights import head_weights, layer_weights
from narrows.cli.main import main
from narrows.cost.memory import weight_bytes
from narrows.engine.config import EngineConfig, Resolved, resolve
from narrows.engine.core import Engine
from narrows.errors import ConfigError
from narrows.layout import Mesh
from narrows.models.decoder import Decoder, RankContext
from narrows.models.registry import build_model
from narrows.ops.blocks import BlockLinear, BlockStack
from narrows.ops.compiled import kernels
from narrows.ops.int8 import Quantization
from narrows.ops.packed import LinearParts, PackedLinear, PackedStack
from narrows.plan.report.plan_step import plan_step

torch.set_num_threads(1)

Q4_0, Q8_0, Q4_K, Q5_K, Q6_K = BLOCK_FORMATS
MESHES = [(1, 1), (1, 2), (2, 1), (1, 3)]
FILES: dict[str, tuple[str, Sequence[Kind]]] = {
    # Matrices take the kinds in turn: in a layer q, k, v, o, gate, up and down are of several kinds.
    "as Q4_K_M": ("llama", [Kind.Q4_K, Kind.Q4_K, Kind.Q6_K]),
    "as Q4_K_M, with biases": ("qwen2", [Kind.Q4_K, Kind.Q4_K, Kind.Q4_K, Kind.Q6_K]),
    "Q5_K": ("llama", [Kind.Q5_K]),
    "Q8_0": ("llama", [Kind.Q8_0]),
    "Q4_0": ("llama", [Kind.Q4_0]),
    "a head that is the embedding": ("llama", [Kind.Q6_K, Kind.Q4_K]),
    "of kinds that are multiplied and others": ("llama", [Kind.Q8_0, Kind.Q4_1, Kind.BF16, Kind.Q6_K, Kind.Q5_0]),
}
LAB: dict[str, Sequence[Kind]] = {
    "llama, biases": [Kind.Q8_0, Kind.Q4_0],
    "qwen3, tied": [Kind.Q8_0, Kind.Q4_0],
    "qwen3moe": [Kind.Q8_0],
    "deepseek v2 lite": [Kind.Q4_0],
    "deepseek v3": [Kind.Q8_0],
    "deepseek v2": [Kind.Q8_0, Kind.Q4_0],  # no expert whose gate is stored as its up
}
compiled = pytest.mark.skipif(kernels() is None, reason="products with blocks are not compiled here")


def engine_logits(path: Path, dp: int = 1, tp: int = 1, **asked: str) -> Tensor:
    """Of the prompts' last tokens, prefilled together."""
    config = EngineConfig(model=str(path), dp=dp, tp=tp, max_context=64, want_logits=True, **asked)  # type: ignore[arg-type]
    with Engine(resolve(config)) as engine:
        for prompt in (tuple(range(10, 50)), (9, 200, 31), (7,)):
            engine.add(prompt, 1)
        found: Tensor = engine.submit(engine.scheduler.schedule(), keep_logits=True).result()[0].logits
    return found.float()


def assert_near(got: Tensor, want: Tensor, most: float) -> None:
    """The size of the difference, relative to that of the logits."""
    assert got.shape == want.shape and got.isfinite().all()
    difference = float((got - want).norm() / want.norm())
    assert difference < most, difference


@pytest.fixture(params=[*FILES, *LAB])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A tiny model of every kind of file."""
    if request.param in FILES:
        drop = ["output.weight"] if request.param.startswith("a head") else []
        return write(tmp_path / "m.gguf", *FILES[request.param], drop=drop)
    model = lab.model_of(lab.configs()[request.param])
    return lab.write_model(tmp_path / "m.gguf", model, kinds=LAB[request.param])


# -- numbers ----------------------------------------------------------------------------------------------------------


def test_numbers_are_those_of_wide_weights_but_for_rounded_rows(path: Path) -> None:
    """Whole, and on every mesh. A number that another order of a sum moves across a rounding moves by a whole step, so
    meshes differ by about as much as rounding costs."""
    want = engine_logits(path, dtype="float32", quantization="none")
    one = engine_logits(path, quantization="stored")
    # Experts that are chosen by a hair are chosen otherwise.
    most = 0.04 if load_model_config(str(path)).moe is None else 0.25
    assert_near(one, want, most)
    assert not torch.equal(one, engine_logits(path, quantization="none"))
    for dp, tp in MESHES[1:]:
        assert_near(engine_logits(path, dp, tp, quantization="stored"), one, most)


@compiled
@pytest.mark.parametrize("name", ["as Q4_K_M", "Q8_0"])
def test_plain_torch_computes_the_same(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "m.gguf", *FILES[name])
    want = engine_logits(path, quantization="stored")
    monkeypatch.setattr("narrows.ops.packed.kernels", lambda: None)
    assert_near(engine_logits(path, 1, 2, quantization="stored"), want, 0.04)


def test_random_weights_may_be_in_blocks(tmp_path: Path) -> None:
    """As `calibrate` and `--load-format dummy` make them: the same on every mesh."""
    path = write(tmp_path / "m.gguf", *FILES["as Q4_K_M"])
    one = engine_logits(path, quantization="stored", load_format="dummy")
    assert one.std() > 1e-3
    assert_near(engine_logits(path, 1, 3, quantization="stored", load_format="dummy"), one, 0.04)


# -- what is held -----------------------------------------------------------------------------------------------------


def held_bytes(model: Decoder) -> int:
    """Bytes of all weights of a model, whose weights are not packed."""
    found: dict[int, int] = {}

    def note(value: object) -> None:
        if isinstance(value, Tensor):
            found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, PackedLinear):
            note(value.panels)
        elif isinstance(value, BlockLinear):
            note(value.bytes_ON)
        elif isinstance(value, BlockStack):
            note(value.bytes_EON)
        elif isinstance(value, LinearParts):
            note(value.parts)
        elif isinstance(value, dict | tuple):
            for each in value.values() if isinstance(value, dict) else value:
                note(each)

    for part in (model, *model.layers):
        for name, value in vars(part).items():
            if not any(word in name for word in ("cache", "cos_", "sin_")):
                note(value)
    return sum(found.values())


def model_of(resolved: Resolved, rank: int = 0) -> Decoder:
    rank_context = RankContext(
        mesh=resolved.mesh,
        rank=rank,
        sharding=resolved.sharding,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        num_slots=1,
        num_positions=1,
        quantization=Quantization.STORED,
    )
    return build_model(resolved.config, resolved.weights(), rank_context)


def test_planned_bytes_are_the_bytes_that_ranks_hold(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("narrows.ops.packed.kernels", lambda: None)  # panels are padded
    for dp, tp in MESHES:
        resolved = resolve(EngineConfig(model=str(path), dp=dp, tp=tp, quantization="stored", max_context=64))
        config, mesh, sharding = resolved.config, resolved.mesh, resolved.sharding
        for rank in range(mesh.size):
            model = model_of(resolved, rank)
            assert held_bytes(model) == weight_bytes(config, mesh, sharding, "stored", rank), (mesh, rank)


@compiled
def test_panels_take_the_bytes_of_the_file(tmp_path: Path) -> None:
    """Of whole panels of 32 outputs no byte more."""
    path = write(tmp_path / "m.gguf", "llama", [Kind.Q4_K])
    layer = model_of(resolve(EngineConfig(model=str(path), max_context=64))).layers[0]
    assert isinstance(layer.gate_up_F2H, PackedLinear) and layer.gate_up_F2H.gated
    assert layer.gate_up_F2H.panels.nbytes == Q4_K.row_bytes(256) * 2 * 768
    assert isinstance(layer.down_HF, PackedLinear)
    assert layer.down_HF.panels.nbytes == Q4_K.row_bytes(768) * 256


def test_a_plan_and_an_engine_agree_on_what_is_held(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "m.gguf", *FILES["as Q4_K_M"])
    for dp, tp in MESHES:
        report = plan_step(str(path), rows=8, dp=dp, tp=tp, device="cpu-core")
        resolved = resolve(EngineConfig(model=str(path), dp=dp, tp=tp, max_context=64, quantization="stored"))
        assert report.deployment.dtype == resolved.deployment.dtype == "stored"
        sharding = resolved.sharding
        assert report.deployment.memory(sharding).weights == resolved.deployment.memory(sharding).weights
        assert report.deployment.config == resolved.config
    assert main([*f"plan {path} --rows 8 --device cpu-core".split()]) == 0
    assert "weights stay in their blocks (Q4_K, Q6_K), rows are rounded" in capsys.readouterr().out


def test_a_plan_counts_fewer_bytes_and_less_time_than_in_bf16(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", "llama", [Kind.Q4_K])
    asked = dict(rows=1, phase="decode", context=32, device="cpu-core")
    stored, wide = plan_step(str(path), **asked), plan_step(str(path), **asked, dtype="bf16")  # type: ignore[arg-type]
    assert not wide.deployment.config.blocks
    assert stored.auto.plan.ps < wide.auto.plan.ps
    size, wide_size = (each.deployment.memory(WeightSharding()).weights for each in (stored, wide))
    assert size < 0.5 * wide_size
    assert stored.deployment.stored_bytes == pytest.approx(144 / 256)


def test_a_gpu_and_other_dtypes_have_no_blocks(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", "llama", [Kind.Q8_0])
    assert plan_step(str(path), rows=8, device="h100").deployment.dtype == "bf16"
    with pytest.raises(ConfigError, match="are for CPU ranks, and this is h100; use bf16"):
        plan_step(str(path), rows=8, device="h100", dtype="stored")


def test_a_head_that_is_the_embedding_is_held_once(tmp_path: Path) -> None:
    """In blocks, where ranks split it as they split the embedding; beside a whole embedding packed apart."""
    path = write(tmp_path / "m.gguf", "llama", [Kind.Q4_K], drop=["output.weight"])
    resolved = resolve(EngineConfig(model=str(path), tp=2, max_context=64, quantization="stored"))
    for embed, is_one in (("vocab", True), ("replicated", False)):
        sharding = WeightSharding(embed=embed)
        model = model_of(replace(resolved, sharding=sharding), 1)
        assert (model.lm_head_VH is model.embed_VH) == is_one
        assert held_bytes(model) >= weight_bytes(resolved.config, resolved.mesh, sharding, "stored", 1)
    untied = load_model_config(str(write(tmp_path / "n.gguf", "llama", [Kind.Q4_K])))
    assert untied.blocks.of_name("model.embed_tokens.weight") is None
    assert untied.blocks.of_name("lm_head.weight") == Q4_K


# -- what is asked for ------------------------------------------------------------------------------------------------


@compiled
def test_weights_stay_as_they_are_unless_another_dtype_is_asked_for(tmp_path: Path) -> None:
    path = str(write(tmp_path / "m.gguf", "llama", [Kind.Q8_0]))
    found = resolve(EngineConfig(model=path))
    assert (found.engine_config.quantization, found.deployment.dtype) == ("stored", "stored") and found.config.blocks
    assert [line for line in found.notes if "weights stay in their blocks (Q8_0)" in line]
    for asked in ({"quantization": "none"}, {"dtype": "bfloat16"}, {"dtype": "float32"}, {"load_format": "dummy"}):
        found = resolve(EngineConfig(model=path, **asked))  # type: ignore[arg-type]
        assert found.engine_config.quantization == "none" and not found.config.blocks, asked
    found = resolve(EngineConfig(model=path, quantization="int8"))
    assert found.deployment.dtype == "int8" and not found.config.blocks


def test_files_without_blocks_run_as_before(tmp_path: Path) -> None:
    path = str(write(tmp_path / "m.gguf", "llama", [Kind.F16]))
    assert resolve(EngineConfig(model=path)).engine_config.quantization == "none"
    with pytest.raises(ConfigError, match="has no weights in blocks that kernels multiply"):
        resolve(EngineConfig(model=path, quantization="stored"))
    with pytest.raises(ConfigError, match="stored is for bfloat16"):
        resolve(EngineConfig(model=path, quantization="stored", dtype="float32"))


def test_what_cannot_be_split_is_refused_in_a_line(tmp_path: Path) -> None:
    """o_proj has 768 columns of 12 heads, down_proj 768: three blocks of 256, or 24 of 32."""
    path = str(write(tmp_path / "m.gguf", "llama", [Kind.Q4_K]))
    with pytest.raises(ConfigError) as refused:
        resolve(EngineConfig(model=path, tp=4, quantization="stored"))
    assert "blocks that 4 of the 12 attention heads" in str(refused.value) and "tp 3 at most" in str(refused.value)
    with pytest.raises(ConfigError) as refused:
        resolve(EngineConfig(model=path, dp=2, tp=2, quantization="stored"))
    said = "4 ranks, more than intermediate_size 768"
    assert said in str(refused.value) and "in blocks of 256, can be split into; use at most 3 ranks" in str(
        refused.value
    )
    assert resolve(EngineConfig(model=path, tp=4, quantization="none")).mesh.size == 4
    narrow = str(write(tmp_path / "n.gguf", "llama", [Kind.Q8_0]))
    assert resolve(EngineConfig(model=narrow, tp=4, quantization="stored")).mesh.size == 4


def test_splits_are_of_whole_blocks(tmp_path: Path) -> None:
    """Uneven shares along inputs; rows are split anywhere, even within what heads allow."""
    for kind, tp in ((Kind.Q4_K, 2), (Kind.Q4_K, 3), (Kind.Q4_0, 5)):
        config = load_model_config(str(write(tmp_path / f"{kind.name}{tp}.gguf", "llama", [kind])))
        mesh = Mesh.of(dp=1, tp=tp)
        weights = layer_weights(config, mesh, WeightSharding(), 0) | head_weights(config, mesh)
        for role, weight in weights.items():
            if weight.blocks is None:
                assert len(weight.shape) == 1, role
                continue
            if weight.dim == 1:
                assert all(cut % weight.blocks.columns == 0 for span in weight.spans for cut in span), role
            for rank in range(tp):
                assert weight.num_values(mesh, rank) > 0, role
    assert split_columns(config, ".mlp.down_proj.weight", 768, 5)[0] == (0, 160)
    assert head_spans(replace(config, blocks=NO_BLOCKS), 3) == ((0, 4), (4, 8), (8, 12))


def test_experts_are_in_blocks_where_all_of_an_expert_is(tmp_path: Path) -> None:
    model = lab.model_of(lab.configs()["qwen3moe"])
    for kinds, held in (((Kind.Q8_0,), True), ((Kind.Q8_0, Kind.BF16), False), ((Kind.Q8_0, Kind.Q4_0), None)):
        config = load_model_config(str(lab.write_model(tmp_path / "m.gguf", model, kinds=kinds)))
        weights = layer_weights(config, Mesh.of(dp=1, tp=1), WeightSharding(), 0).values()
        of_experts = [weight for weight in weights if weight.experts]
        assert len(of_experts) == 3
        blocks = {weight.blocks for weight in of_experts}
        if held is None:  # a gate and its up are stored alike, or none is in blocks
            assert None not in blocks or blocks == {None}
        else:
            assert blocks == ({Q8_0} if held else {None})


@compiled
def test_a_stack_of_experts_is_packed(tmp_path: Path) -> None:
    model = lab.model_of(lab.configs()["qwen3moe"])
    path = lab.write_model(tmp_path / "m.gguf", model, kinds=(Kind.Q8_0,))
    layer = model_of(resolve(EngineConfig(model=str(path), max_context=64))).layers[0]
    stacks = [value for value in vars(layer).values() if isinstance(value, PackedStack)]
    assert len(stacks) == 2 and all(stack.blocks == Q8_0 for stack in stacks)
