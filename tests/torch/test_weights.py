"""Weights: every rank's slice is the right piece of the whole tensor, and a bad checkpoint is one clear line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import copytree

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from narrows.arch.config import ModelConfig, read_config
from narrows.arch.weight_sharding import WeightSharding, sharding_choices
from narrows.arch.weights import Weight, embed_weights, head_weights, layer_weights
from narrows.engine.llm import LLM
from narrows.errors import CheckpointError
from narrows.layout import Mesh
from narrows.weights import safetensors_folder
from narrows.weights.dummy import DummyWeights
from narrows.weights.safetensors_folder import SafetensorsFolder

INDEX = "model.safetensors.index.json"
MESHES = [Mesh.of(dp=1, tp=1), Mesh.of(dp=1, tp=3), Mesh.of(dp=2, tp=2), Mesh.of(dp=1, tp=8), Mesh.of(dp=4, tp=1)]


def by_name(config: ModelConfig, mesh: Mesh, sharding: WeightSharding) -> dict[str, Weight]:
    weights = [*embed_weights(config, mesh, sharding).values(), *head_weights(config, mesh).values()]
    for layer in range(config.num_hidden_layers):
        weights += layer_weights(config, mesh, sharding, layer).values()
    return {weight.name: weight for weight in weights}


def some_weight(name: str, *shape: int) -> Weight:
    return Weight(name=name, shape=shape)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of two tensors in one file."""
    save_file({"a": torch.arange(12.0).view(6, 2), "b": torch.arange(3.0)}, tmp_path / "model.safetensors")
    return tmp_path


def split(source: Path, target: Path, num_files: int) -> dict[str, Tensor]:
    """The checkpoint of ``source`` split over several files with an index; all of its tensors."""
    tensors = load_file(source / "model.safetensors")
    files = [f"model-{i + 1:05}-of-{num_files:05}.safetensors" for i in range(num_files)]
    where = {name: files[i % num_files] for i, name in enumerate(tensors)}
    for file in files:
        save_file({name: tensors[name] for name, at in where.items() if at == file}, target / file)
    (target / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}), encoding="utf-8")
    return tensors


def said(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 400
    return text


# -- slices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_files", [1, 3])
@pytest.mark.parametrize("kind", ["v3", "v2-lite", "llama-9"])
def test_slices_of_all_ranks_equal_pieces_of_whole_tensors(
    tiny_model: Callable[..., Path], tmp_path: Path, kind: str, num_files: int
) -> None:
    source = tiny_model(kind)
    config = read_config(source)
    if num_files == 1:
        tensors = load_file(source / "model.safetensors")
    else:
        tensors, source = split(source, tmp_path, num_files), tmp_path
    checkpoint = SafetensorsFolder(source)
    for mesh in MESHES:
        for sharding in (WeightSharding(), sharding_choices(config, mesh)[-1]):
            for weight in by_name(config, mesh, sharding).values():
                names = [weight.name.replace("{expert}", str(i)) for i in range(16)] if weight.experts else None
                covered = {name: 0 for name in names or [weight.name]}
                size = weight.shape[weight.dim or 0]
                for rank in range(mesh.size):
                    span = weight.span(mesh, rank)
                    lo, hi = span or (0, size)
                    for expert in range(*weight.experts[rank]) if weight.experts else (None,):
                        name = weight.name if names is None or expert is None else names[expert]
                        got = checkpoint.take(weight, span, expert)
                        want = tensors[name].narrow(weight.dim or 0, lo, hi - lo)
                        assert got.dtype == want.dtype and torch.equal(got, want), (mesh, rank, name)
                        covered[name] += hi - lo
                # KV heads may be held twice; a tensor sharded over a group only is held once per group.
                assert all(count >= size for count in covered.values()), f"{weight.name} is not whole on {mesh}"


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("kind", ["v3", "v2-lite", "llama-9"])
def test_sharded_slices_of_a_group_have_no_gap_or_overlap(
    tiny_model: Callable[..., Path], kind: str, mesh: Mesh
) -> None:
    config = read_config(tiny_model(kind))
    for sharding in sharding_choices(config, mesh):
        for weight in by_name(config, mesh, sharding).values():
            if weight.dim is None or re.search(r"[kv]_proj", weight.name):
                continue
            ranks = mesh.size if weight.over_world else mesh.group_size
            spans = [weight.span(mesh, rank) for rank in range(ranks)]
            assert all(span is not None for span in spans)
            ends = [0, *(span[1] for span in spans if span)]
            assert [span[0] for span in spans if span] == ends[:-1] and ends[-1] == weight.shape[weight.dim]


def test_a_whole_tensor_an_empty_slice_and_a_slice_of_columns(folder: Path) -> None:
    checkpoint = SafetensorsFolder(folder)
    rows, columns = Weight(name="a", shape=(6, 2), dim=0), Weight(name="a", shape=(6, 2), dim=1)
    assert checkpoint.take(rows, None).tolist() == torch.arange(12.0).view(6, 2).tolist()
    assert checkpoint.take(rows, (6, 6)).shape == (0, 2)
    cut = checkpoint.take(columns, (1, 2))
    assert cut.tolist() == [[1], [3], [5], [7], [9], [11]] and cut.is_contiguous()


def test_threads_share_an_open_checkpoint(tiny_model: Callable[..., Path]) -> None:
    source = tiny_model("v3")
    checkpoint, tensors = SafetensorsFolder(source), load_file(source / "model.safetensors")

    def read(rank: int) -> bool:
        return all(
            torch.equal(checkpoint.take(some_weight(name, *tensor.shape), None), tensor)
            for name, tensor in tensors.items()
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(8)))


# -- bad checkpoints -------------------------------------------------------------------------------------------------


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        SafetensorsFolder(tmp_path)
    text = said(error)
    assert all(part in text for part in (str(tmp_path), "model.safetensors", INDEX, "--load-format dummy"))


def test_a_shard_that_the_index_names_is_missing(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    split(tiny_model("llama"), tmp_path, 4)
    (tmp_path / "model-00002-of-00004.safetensors").unlink()
    (tmp_path / "model-00004-of-00004.safetensors").unlink()
    with pytest.raises(CheckpointError) as error:
        SafetensorsFolder(tmp_path)
    assert re.search(r"2 of the 4 files .* missing, first model-00002-of-00004", said(error))


@pytest.mark.parametrize("kept", [0, 5, 100, -1], ids=["empty", "in the length", "in the header", "in the data"])
def test_a_truncated_file(folder: Path, kept: int) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()[:kept]
    file.write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        SafetensorsFolder(folder)
    text = said(error)
    assert str(file) in text and f"({len(content)} bytes;" in text and "download it again" in text


def test_a_shard_that_is_no_safetensors_file_at_all(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "page.safetensors"}}), encoding="utf-8")
    (folder / "page.safetensors").write_text("<!doctype html> 404 not found " * 20, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"page\.safetensors: not a whole safetensors file \(600 bytes"):
        SafetensorsFolder(folder)


@pytest.mark.parametrize(
    "content",
    [
        "{not json",
        "[]",
        "7",
        "null",
        "{}",
        '{"weight_map": null}',
        '{"weight_map": ["a"]}',
        '{"weight_map": {"a": 5}}',
        '{"weight_map": {"a": ["x"]}}',
        '{"weight_map": {"a": "x", "b": null}}',
        "\ufffe",
    ],
)
def test_an_invalid_index_is_refused(folder: Path, content: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_bytes(content.encode("utf-16" if content == "\ufffe" else "utf-8"))
    with pytest.raises(CheckpointError) as error:
        SafetensorsFolder(folder)
    words = said(error)
    assert INDEX in words and ("not a safetensors index" in words or "not valid JSON" in words)


def test_a_tensor_that_is_missing(folder: Path) -> None:
    checkpoint = SafetensorsFolder(folder)
    with pytest.raises(CheckpointError) as error:
        checkpoint.take(some_weight("model.layers.7.mlp.up_proj.weight", 4, 4), None)
    text = said(error)
    assert "model.layers.7.mlp.up_proj.weight is missing (2 tensors in 1 file(s))" in text and str(folder) in text
    with pytest.raises(CheckpointError, match=r"experts\.3\.up is missing"):
        checkpoint.take(some_weight("experts.{expert}.up", 4, 4), None, 3)


@pytest.mark.parametrize("span", [None, (0, 1)])
def test_a_tensor_of_another_shape(folder: Path, span: tuple[int, int] | None) -> None:
    with pytest.raises(CheckpointError) as error:
        SafetensorsFolder(folder).take(Weight(name="a", shape=(2, 6), dim=0), span)
    text = said(error)
    assert "a has shape (6, 2)" in text and "config.json implies (2, 6)" in text and "model.safetensors" in text


# -- dummy weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_slices_of_dummy_weights_are_slices_of_the_whole(tiny_model: Callable[..., Path], dtype: torch.dtype) -> None:
    config = read_config(tiny_model("v3"))
    mesh = Mesh.of(dp=1, tp=3)
    for sharding in (WeightSharding(), sharding_choices(config, mesh)[-1]):
        for weight in by_name(config, mesh, sharding).values():
            for rank in range(mesh.size):
                span, expert = weight.span(mesh, rank), (weight.experts[rank][0] if weight.experts else None)
                whole = DummyWeights(seed=3, dtype=dtype).take(weight, None, expert)
                assert whole.shape == weight.shape and whole.dtype == dtype
                lo, hi = span or (0, weight.shape[0])
                got = DummyWeights(seed=3, dtype=dtype).take(weight, span, expert)
                assert torch.equal(got, whole.narrow(weight.dim or 0, lo, hi - lo)) and got.is_contiguous()


def test_dummy_tensors_differ_by_name_expert_and_seed_and_are_of_a_sane_size() -> None:
    source = DummyWeights(dtype=torch.float32)
    weight = some_weight("layers.0.experts.{expert}.up_proj.weight", 64, 256)
    tensors = [
        source.take(weight, None, 0),
        source.take(weight, None, 1),
        source.take(some_weight("layers.1.up_proj.weight", 64, 256), None),
        DummyWeights(seed=1, dtype=torch.float32).take(weight, None, 0),
    ]
    assert all(not torch.equal(a, b) for i, a in enumerate(tensors) for b in tensors[:i])
    assert all(abs(tensor.std().item() - 256**-0.5) < 0.01 for tensor in tensors)
    norm = source.take(some_weight("input_layernorm.weight", 512), None)
    bias = source.take(some_weight("q_proj.bias", 512), None)
    correction = source.take(some_weight("gate.e_score_correction_bias", 512), None)
    assert abs(norm.mean().item() - 1) < 0.05 and 0.05 < norm.std().item() < 0.2
    assert bias.abs().max().item() < 0.1 < correction.abs().max().item()


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="mappings are read from /proc, which only Linux has")
def test_a_loaded_engine_keeps_no_file_of_the_checkpoint_mapped(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "a model of its own"
    copytree(tiny_model("v3"), folder)
    with LLM(folder, tp=2):
        assert str(folder) not in Path("/proc/self/maps").read_text()


def test_a_file_is_remapped_after_a_number_of_bytes(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_model("v3")
    config = read_config(folder)
    want = by_name(config, Mesh.of(dp=1, tp=1), WeightSharding()).values()
    opened: list[Path] = []
    true_open = safetensors_folder.open_file
    monkeypatch.setattr(safetensors_folder, "_MAPPED", 4096)
    monkeypatch.setattr(safetensors_folder, "open_file", lambda path: opened.append(path) or true_open(path))
    source = SafetensorsFolder(folder)
    stored = load_file(folder / "model.safetensors")
    for weight in (weight for weight in want if not weight.experts):
        whole = source.take(weight, None)
        assert torch.equal(whole, stored[weight.name])
        num = weight.shape[weight.dim or 0]
        half = source.take(weight, (num // 2, num))
        assert torch.equal(half, whole.narrow(weight.dim or 0, num // 2, num - num // 2)) and half.is_contiguous()
    assert len(opened) > 5
