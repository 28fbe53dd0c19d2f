"""Checkpoints under the names and in the files that people have: the numbers are those of transformers' model.

Each folder is written by transformers or from its tensors, then transformers and narrows both load it (or, where
transformers does not read the form, the model it was made of).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copyfile
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from narrows.arch.config import read_config
from narrows.arch.weight_sharding import WeightSharding, sharding_choices
from narrows.engine.config import EngineConfig, resolve
from narrows.engine.llm import LLM
from narrows.errors import CheckpointError, ConfigError
from narrows.layout import Mesh
from narrows.weights.fp8 import dequantize_blocks
from narrows.weights.safetensors_folder import SafetensorsFolder

from .conftest import CONFIGS, all_weights

IDS = [[3, 14, 15, 9, 2, 6, 5, 35], [8, 9, 7, 9, 3]]
INDEX = "model.safetensors.index.json"
KINDS = ("v3", "v2-lite", "qwen3-moe", "llama", "qwen2")
MOE = ("v3", "v2-lite", "qwen3-moe")

Tensors = dict[str, Tensor]


def write(folder: Path, kind: str, tensors: Tensors, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[kind] | changes), encoding="utf-8")
    save_file(tensors, folder / "model.safetensors")
    return folder


def shards(folder: Path, parts: dict[str, Tensors], index: dict[str, str] | None = None) -> None:
    """Files by name with an index; the default index lists all tensors."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    for name, tensors in parts.items():
        save_file(tensors, folder / name)
    where = {tensor: name for name, tensors in parts.items() for tensor in tensors}
    (folder / INDEX).write_text(json.dumps({"weight_map": where if index is None else index}), encoding="utf-8")


def reference(folder: Path) -> list[list[float]]:
    """transformers' log-probabilities of the tokens of IDS."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    scores = []
    for ids in IDS:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1]
        chosen = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:]).unsqueeze(1))
        scores.append(chosen.squeeze(1).tolist())
    return scores


def ours(folder: Path, **mesh: int) -> list[list[float]]:
    with LLM(folder, dtype="float32", max_context=64, **mesh) as llm:
        return [[score.logprob for score in done.prompt_logprobs] for done in llm.score(IDS)]


def agree(got: list[list[float]], want: list[list[float]]) -> None:
    for a, b in zip(got, want, strict=True):
        assert a == pytest.approx(b, abs=2e-5)


def stacked(tensors: Tensors) -> Tensors:
    """Experts as transformers 5 holds them: its own model's tensors are compared with these in the test below."""
    made = {name: value for name, value in tensors.items() if ".experts." not in name}
    blocks = sorted({name.split(".experts.")[0] for name in tensors if ".experts." in name})
    for block in blocks:
        count = sum(name.startswith(f"{block}.experts.") and "down_proj" in name for name in tensors)
        gate, up, down = (
            torch.stack([tensors[f"{block}.experts.{i}.{part}_proj.weight"] for i in range(count)])
            for part in ("gate", "up", "down")
        )
        made[f"{block}.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
        made[f"{block}.experts.down_proj"] = down
    return made


def without_model(tensors: Tensors) -> Tensors:
    return {name.removeprefix("model."): value for name, value in tensors.items()}


def said(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 600
    return text


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        resolve(EngineConfig(model=str(folder)))
    return said(error)


def notes(folder: Path) -> str:
    return "\n".join(resolve(EngineConfig(model=str(folder))).notes)


# -- stacked experts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MOE)
def test_experts_stacked_by_transformers_itself(tiny_model: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    source = tiny_model(kind)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.save_pretrained(tmp_path, save_original_format=False)
    saved = load_file(tmp_path / "model.safetensors")
    assert any(name.endswith("experts.gate_up_proj") for name in saved), "no stack: this test tests nothing"
    made = stacked(load_file(source / "model.safetensors"))
    assert all(torch.equal(saved[name], made[name]) for name in made if "experts" in name)
    want = reference(source)
    agree(reference(tmp_path), want)
    for mesh in ({"tp": 1}, {"tp": 2}, {"dp": 2, "tp": 2}):
        agree(ours(tmp_path, **mesh), want)


@pytest.mark.parametrize("kind", MOE)
def test_slices_of_stacked_experts_are_those_of_single_ones(
    tiny_model: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    source = tiny_model(kind)
    config = read_config(source)
    one = SafetensorsFolder(source)
    stack = SafetensorsFolder(write(tmp_path / "s", kind, stacked(load_file(source / "model.safetensors"))))
    for mesh in (Mesh.of(dp=1, tp=3), Mesh.of(dp=2, tp=2)):
        for sharding in sharding_choices(config, mesh):
            for weight in all_weights(config, mesh, sharding):
                for rank in range(mesh.size):
                    for expert in range(*weight.experts[rank]) if weight.experts else ():
                        span = weight.span(mesh, rank)
                        got, want = stack.take(weight, span, expert), one.take(weight, span, expert)
                        assert torch.equal(got, want) and got.is_contiguous()


def test_a_square_stack_is_read_in_the_one_orientation(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """2F is H: the shape does not tell rows from columns, transformers' layout does."""
    source = tiny_model("qwen3-moe", moe_intermediate_size=16)
    assert CONFIGS["qwen3-moe"]["hidden_size"] == 32
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.save_pretrained(tmp_path, save_original_format=False)
    agree(ours(tmp_path), reference(source))


def test_a_stack_of_another_shape_or_beside_single_experts(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny_model("v3", moe_intermediate_size=24)
    tensors = load_file(source / "model.safetensors")
    good = stacked(tensors)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    change = {"moe_intermediate_size": 24}
    for bad, shape in ((good[name].transpose(1, 2).contiguous(), "(16, 32, 48)"), (good[name][:8], "(8, 48, 32)")):
        folder = write(tmp_path / "bad", "v3", good | {name: bad.clone()}, **change)
        with pytest.raises(CheckpointError) as error, LLM(folder):
            pass
        assert f"{name} has shape {shape}, but config.json implies (16, 48, 32)" in said(error)
    both = write(tmp_path / "both", "v3", tensors | {name: good[name]}, **change)
    assert f"experts.0.gate_proj.weight and the stack {name}: which of the two counts is not known" in refused(both)


@pytest.mark.parametrize("block", [(16, 16), (8, 12), (5, 7)], ids=str)
@pytest.mark.parametrize("over", ["both", "each"])
def test_stacked_experts_in_fp8(
    tiny_model: Callable[..., Path], tmp_path: Path, block: tuple[int, int], over: str
) -> None:
    """Blocks over gate and up as one matrix, or over each: which one, the number of scales says."""
    size, hidden, num_experts = 24, 32, 16
    source = tiny_model("qwen3-moe", moe_intermediate_size=size)
    config = read_config(source)
    generator = torch.Generator().manual_seed(5)

    def quantized(rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
        """(values, scales, dequantised values) of a stack."""
        values = torch.randn(num_experts, rows, columns, generator=generator).to(torch.float8_e4m3fn)
        blocks = (-(-rows // block[0]), -(-columns // block[1]))
        scales = torch.rand(num_experts, *blocks, generator=generator) + 0.5
        worth = [dequantize_blocks(v, s, block, (0, 0), torch.float32) for v, s in zip(values, scales, strict=True)]
        return values, scales, torch.stack(worth)

    if over == "both":
        gate_up, gate_up_scales, worth = quantized(2 * size, hidden)
    else:
        halves = [quantized(size, hidden) for _ in range(2)]
        gate_up, gate_up_scales, worth = (torch.cat(parts, dim=1) for parts in zip(*halves, strict=True))
    down, down_scales, down_worth = quantized(hidden, size)
    prefix = "model.layers.0.mlp.experts."
    tensors = {
        prefix + "gate_up_proj": gate_up,
        prefix + "gate_up_proj_scale_inv": gate_up_scales,
        prefix + "down_proj": down,
        prefix + "down_proj_scale_inv": down_scales,
    }
    quantization = {"quant_method": "fp8", "weight_block_size": list(block)}
    folder = write(tmp_path / "fp8", "qwen3-moe", tensors, moe_intermediate_size=size, quantization_config=quantization)
    checkpoint = SafetensorsFolder(folder, quantization=read_config(folder).quantization)
    ambiguous = -(-2 * size // block[0]) == 2 * -(-size // block[0]) and size % block[0]
    whole = {"gate": worth[:, :size], "up": worth[:, size:], "down": down_worth}
    for mesh in (Mesh.of(dp=1, tp=1), Mesh.of(dp=1, tp=3)):
        for sharding in sharding_choices(config, mesh) or [WeightSharding()]:
            for weight in all_weights(config, mesh, sharding):
                if not weight.name.startswith(prefix):
                    continue
                part = weight.name.removesuffix("_proj.weight").rpartition(".")[2]
                for rank in range(mesh.size):
                    for expert in range(*weight.experts[rank]):
                        span = weight.span(mesh, rank)
                        if ambiguous and part != "down":
                            with pytest.raises(CheckpointError, match="save the experts one by one"):
                                checkpoint.take(weight, span, expert)
                            continue
                        lo, hi = span or (0, weight.shape[weight.dim or 0])
                        want = whole[part][expert].narrow(weight.dim or 0, lo, hi - lo)
                        assert torch.equal(checkpoint.take(weight, span, expert), want), (part, rank, expert)


def test_a_stack_in_fp8_with_scales_of_another_shape_or_none(tmp_path: Path) -> None:
    changes = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 16]}}
    name = "model.layers.0.mlp.experts.down_proj"
    values = torch.zeros(16, 32, 16).to(torch.float8_e4m3fn)
    config = None
    for scales, words in (
        ({}, f"{name} is stored as F8_E4M3, but its scales {name}_scale_inv (16, 2, 1) are missing"),
        ({f"{name}_scale_inv": torch.zeros(2, 1)}, "has shape (2, 1), but blocks of 16 x 16 make it (16, 2, 1)"),
        ({f"{name}_scale_inv": torch.zeros(16, 2, 1).to(torch.int8)}, "is stored as I8"),
    ):
        folder = write(tmp_path / "x", "qwen3-moe", {name: values} | scales, **changes)
        config = read_config(folder)
        checkpoint = SafetensorsFolder(folder, quantization=config.quantization)
        weight = next(
            w
            for w in all_weights(config, Mesh.of(dp=1, tp=1), WeightSharding())
            if ".0.mlp.experts.{expert}.down" in w.name
        )
        with pytest.raises(CheckpointError) as error:
            checkpoint.take(weight, None, 3)
        assert words in said(error)


# -- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "qwen3-moe"])
def test_names_without_model_as_automodel_saves_them(
    tiny_model: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    source = tiny_model(kind, tie_word_embeddings=True)
    transformers.AutoModel.from_pretrained(source, dtype=torch.float32).save_pretrained(tmp_path)
    assert "embed_tokens.weight" in load_file(tmp_path / "model.safetensors")
    config = CONFIGS[kind] | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    want = reference(source)
    agree(reference(tmp_path), want)
    agree(ours(tmp_path, tp=2), want)
    assert "names its layers layers...: read as model.layers..." in notes(tmp_path)


@pytest.mark.parametrize("kind", ["v3", "qwen2"])
@pytest.mark.parametrize(
    "rename",
    [
        without_model,
        lambda tensors: without_model(stacked(tensors)),
        lambda tensors: {f"language_model.{name}": value for name, value in tensors.items()},
        lambda tensors: {f"_orig_mod.{name}": value for name, value in tensors.items()},
        lambda tensors: (
            {name.replace("model.", "model.language_model.", 1): value for name, value in tensors.items()}
            | {"model.visual.layers.0.norm1.weight": torch.zeros(3)}
        ),
        lambda tensors: tensors | {"draft.layers.0.input_layernorm.weight": torch.zeros(3)},
        lambda tensors: tensors | {"model.rotary_emb.inv_freq": torch.zeros(3)},
    ],
    ids=["none", "none, stacked", "language_model.model.", "_orig_mod.", "model.language_model.", "drafts", "tables"],
)
def test_other_prefixes_are_read_where_one_can_be_meant(
    tiny_model: Callable[..., Path], tmp_path: Path, kind: str, rename: Callable[[Tensors], Tensors]
) -> None:
    source = tiny_model(kind)
    tensors = load_file(source / "model.safetensors")
    folder = write(tmp_path / "x", kind, rename(tensors))
    by_usual_name, by_other = SafetensorsFolder(source), SafetensorsFolder(folder)
    for weight in all_weights(read_config(source), Mesh.of(dp=1, tp=1), WeightSharding()):
        expert = 3 if weight.experts else None
        assert torch.equal(by_other.take(weight, None, expert), by_usual_name.take(weight, None, expert))
    resolve(EngineConfig(model=str(folder)))


def test_two_models_in_one_folder_are_refused(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    tensors = load_file(tiny_model("llama") / "model.safetensors")
    both = {f"{side}.{name}": value.clone() for side in ("a", "b") for name, value in tensors.items()}
    text = refused(write(tmp_path / "x", "llama", both))
    assert "holds the layers of 2 models, a.model.layers.0 and b.model.layers.0" in text


@pytest.mark.parametrize(
    ("gone", "instead", "words"),
    [
        (
            "model.layers.0.self_attn.q_proj.weight",
            "model.layers.0.self_attn.qkv_proj.weight",
            "self_attn.qkv_proj.weight",
        ),
        ("model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.gate_up_proj.weight", "mlp.gate_up_proj.weight"),
        (
            "model.norm.weight",
            "model.final_layernorm.weight",
            "it has model.final_layernorm.weight, which the model has not",
        ),
    ],
)
def test_names_of_other_engines_are_a_one_line_error(
    tiny_model: Callable[..., Path], tmp_path: Path, gone: str, instead: str, words: str
) -> None:
    tensors = load_file(tiny_model("qwen2") / "model.safetensors")
    tensors[instead] = tensors.pop(gone)
    text = refused(write(tmp_path / "x", "qwen2", tensors))
    assert f"tensor {gone} is missing" in text and words in text


def test_missing_and_unused_tensors_are_reported(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    tensors = load_file(tiny_model("qwen2") / "model.safetensors")
    few = {name: value for name, value in tensors.items() if "layers.1." not in name}
    assert "; 11 more are missing" in refused(write(tmp_path / "few", "qwen2", few))
    more = {"model.layers.0.mlp.up_proj.bias": torch.zeros(40), "model.layers.9.eh_proj.weight": torch.zeros(3)}
    folder = write(tmp_path / "more", "qwen2", tensors | more)
    assert "1 tensor(s) of the checkpoint are in no layer of the model: model.layers.0.mlp.up_proj.bias" in notes(
        folder
    )
    assert "in no layer" not in notes(tiny_model("qwen2"))


# -- tied pairs and padding ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held", ["embedding", "head", "both, equal", "both, different"])
@pytest.mark.parametrize("mesh", [{"tp": 1}, {"dp": 2, "tp": 2}], ids=str)
def test_tied_pairs_are_read_as_transformers_does(
    tiny_model: Callable[..., Path], tmp_path: Path, held: str, mesh: dict[str, int]
) -> None:
    tensors = load_file(tiny_model("llama") / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    assert "lm_head.weight" not in tensors
    if held != "embedding":
        tensors["lm_head.weight"] = embedding.flip(0) if held == "both, different" else embedding.clone()
    if held == "head":
        del tensors["model.embed_tokens.weight"]
    folder = write(tmp_path / "x", "llama", tensors)
    assert ("two differ: each is used" in notes(folder)) == (held == "both, different")
    agree(ours(folder, **mesh), reference(folder))


def test_a_head_that_is_missing_and_not_tied(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    tensors = load_file(tiny_model("qwen2") / "model.safetensors")
    del tensors["lm_head.weight"]
    assert '"tie_word_embeddings": true in config.json' in refused(write(tmp_path / "x", "qwen2", tensors))


@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_an_embedding_beyond_the_vocabulary_are_not_read(
    tiny_model: Callable[..., Path], tmp_path: Path, tied: bool
) -> None:
    source = tiny_model("qwen2", tie_word_embeddings=tied)
    tensors = load_file(source / "model.safetensors")
    vocabulary = [name for name in tensors if "embed_tokens" in name or "lm_head" in name]
    padded = {name: torch.cat([tensors[name], torch.full((61, 32), 1e3)]) for name in vocabulary}
    folder = write(tmp_path / "x", "qwen2", tensors | padded, tie_word_embeddings=tied)
    want = reference(source)
    agree(ours(folder, tp=2), want)
    assert "embedding has 128 rows; the first 67 (vocab_size) are used" in notes(folder)
    short = {name: tensors[name][:60].clone() for name in vocabulary}
    with (
        pytest.raises(CheckpointError) as error,
        LLM(write(tmp_path / "y", "qwen2", tensors | short, tie_word_embeddings=tied)),
    ):
        pass
    assert "has shape (60, 32), but config.json implies (67, 32); vocab_size there is larger" in said(error)


def test_a_model_of_the_hubs_cache_is_its_folder_or_its_snapshot(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    source, repo = tiny_model("llama"), tmp_path / "models--org--tiny"
    snapshot = repo / "snapshots" / ("a" * 40)
    for folder in (repo / "blobs", repo / "refs", snapshot):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text("a" * 40, encoding="utf-8")
    for i, file in enumerate(source.iterdir()):
        copyfile(file, repo / "blobs" / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    want = ours(source)
    assert ours(repo) == ours(snapshot) == want
    with LLM(repo, revision="a" * 40, max_context=64) as llm:
        assert llm.resolved.config.name == "org/tiny" and llm.resolved.engine_config.model == str(snapshot)


# -- files and the index ---------------------------------------------------------------------------------------------


def test_the_index_decides_between_copies(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny_model("llama")
    tensors = load_file(source / "model.safetensors")
    stale = {name: torch.zeros_like(value) for name, value in tensors.items()}
    half = sorted(tensors)[::2]
    where = {name: "b.safetensors" if name in half else "a.safetensors" for name in tensors}
    write(tmp_path, "llama", tensors)
    parts = {
        file: {name: (tensors if where[name] == file else stale)[name].clone() for name in tensors}
        for file in ("a.safetensors", "b.safetensors")
    }
    shards(tmp_path, parts, where)
    agree(ours(tmp_path), reference(source))


def test_a_single_file_wins_over_an_index_as_in_transformers(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    tensors = load_file(tiny_model("llama") / "model.safetensors")
    write(tmp_path, "llama", tensors)
    shards(tmp_path, {"a.safetensors": {name: value * 2 for name, value in tensors.items()}})
    save_file(tensors, tmp_path / "model.safetensors")
    agree(ours(tmp_path), reference(tmp_path))
    said_once = notes(tmp_path)
    assert said_once.count("holds both model.safetensors and model.safetensors.index.json: the first is read") == 1


def test_an_index_with_missing_or_extra_tensors(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    tensors = load_file(tiny_model("llama") / "model.safetensors")
    write(tmp_path, "llama", tensors)
    name = "model.norm.weight"
    listed = {each: "a.safetensors" for each in tensors}
    shards(tmp_path, {"a.safetensors": tensors}, {each: at for each, at in listed.items() if each != name})
    resolve(EngineConfig(model=str(tmp_path)))  # one file has it
    rest = {each: value for each, value in tensors.items() if each != name}
    shards(tmp_path, {"a.safetensors": rest}, listed | {"lm_head.weight": "a.safetensors"})
    assert f"the index puts {name} into a.safetensors, which lacks it" in refused(tmp_path)
    shards(tmp_path, {"a.safetensors": tensors}, listed | {"lm_head.weight": "a.safetensors"})
    resolve(EngineConfig(model=str(tmp_path)))  # a tied head that its makers' index still lists


@pytest.mark.parametrize("name", ["../outside.safetensors", "{abs}", "link.safetensors"])
def test_files_outside_the_folder_are_not_read(tiny_model: Callable[..., Path], tmp_path: Path, name: str) -> None:
    tensors = load_file(tiny_model("llama") / "model.safetensors")
    folder, outside = write(tmp_path / "x", "llama", tensors), tmp_path / "outside.safetensors"
    save_file(tensors, outside)
    (folder / "link.safetensors").symlink_to(outside)
    name = name.replace("{abs}", str(outside))
    shards(folder, {}, dict.fromkeys(tensors, name))
    assert "outside the folder; only files in it are read" in refused(folder)


def test_folders_without_safetensors_list_their_files(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    write(tmp_path, "llama", {"x": torch.zeros(1)})
    (tmp_path / "model.safetensors").unlink()
    for name, words in (
        ("", "put the weights there, or use --load-format dummy"),
        ("pytorch_model.bin", "but pickles (pytorch_model.bin), which can run code"),
        ("model-00001-of-00002.safetensors", "which says what model-00001-of-00002.safetensors and others hold"),
    ):
        if name:
            (tmp_path / name).touch()
        assert words in refused(tmp_path)
    (tmp_path / "model.safetensors").mkdir()
    assert "model.safetensors: is a folder, where a file is needed" in refused(tmp_path)


@pytest.mark.parametrize(
    ("header", "size"),
    [
        (
            '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
            8,
        ),
        (
            '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
            4,
        ),
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', 4),
        ('{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}', 8),
        ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', 8),
        ('{"a":{"dtype":"Q7","shape":[1],"data_offsets":[0,4]}}', 4),
        ("[]", 0),
    ],
    ids=["a name twice", "shared bytes", "shape", "beyond the file", "bytes of nothing", "dtype", "no object"],
)
def test_headers_that_lie(tmp_path: Path, header: str, size: int) -> None:
    content = len(header).to_bytes(8, "little") + header.encode() + bytes(size)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        SafetensorsFolder(tmp_path)


def test_weights_without_permission(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("narrows.weights.tensor_files.safe_open", fail)
    assert "model.safetensors: cannot be read (Permission denied)" in refused(tiny_model("llama"))


def test_an_unsupported_tokenizer_error_has_the_conversion_command(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = write(tmp_path, "llama", load_file(tiny_model("llama") / "model.safetensors"))
    (folder / "tokenizer.model").touch()
    with LLM(folder, max_context=64) as llm, pytest.raises(ConfigError) as error:
        llm.generate(["text"])
    text = said(error)
    assert "it has tokenizer.model" in text and "save_pretrained" in text and text.endswith("prompts as token ids")


def test_dtypes_that_are_not_read(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    tensors = load_file(tiny_model("llama") / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    for dtype, stored in ((torch.int8, "I8"), (torch.float8_e5m2, "F8_E5M2"), (torch.int32, "I32")):
        folder = write(tmp_path / stored, "llama", tensors | {name: tensors[name].to(dtype)})
        with pytest.raises(CheckpointError) as error, LLM(folder):
            pass
        assert f"{name} is stored as {stored}; supported: F64" in said(error)
