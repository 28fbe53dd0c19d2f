"""Models split over several GGUF files, folders that hold one, and files that are no such thing."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_lab as lab
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from narrows.arch.presets import load_model_config
from narrows.cli.main import main
from narrows.convert.gguf_file import GgufFile
from narrows.convert.gguf_header import GgufHeader, find_gguf
from narrows.convert.gguf_to_hf import convert_gguf
from narrows.engine.config import EngineConfig, resolve
from narrows.engine.core import Engine
from narrows.engine.model_text import load_model_text
from narrows.errors import CheckpointError, ConfigError

torch.set_num_threads(1)

PROMPT = tuple(range(20, 60))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DeepSeek V3 in one file, quantised, so its tensors hold an eight-bit share of each part."""
    model = lab.model_of(lab.configs()["deepseek v3"])
    return lab.write_model(tmp_path_factory.mktemp("whole") / "m.gguf", model, kinds=[Kind.Q8_0, Kind.F16])


def split(whole: Path, folder: Path, **options: Any) -> list[Path]:
    """The same model cut by the gguf package into files of a few tensors, as llama.cpp's gguf-split does."""
    header = GgufHeader(whole)
    file = GgufFile(header)
    tensors = {}
    for name, info in header.tensors.items():
        kind = Kind(info.encoding)
        raw = file._rows[name]
        tensors[name] = (raw.reshape(*info.shape[:-1], -1).view({0: "f4", 1: "f2"}.get(info.encoding, "u1")), kind)
    folder.mkdir(exist_ok=True)
    fields = {key: value for key, value in header.metadata.items() if key != "general.architecture"}
    lab.write_file(folder / "m.gguf", "deepseek2", fields, tensors, **({"split_max_tensors": 15} | options))
    return sorted(folder.glob("*.gguf"))


def logits(model: Path, tp: int = 1) -> torch.Tensor:
    engine_config = EngineConfig(model=str(model), tp=tp, dtype="float32", max_context=64, want_logits=True)
    with Engine(resolve(engine_config)) as engine:
        engine.add(PROMPT, 1)
        return engine.submit(engine.scheduler.schedule(), keep_logits=True).result()[0].logits


def test_any_part_or_the_folder_loads_the_whole_model(tmp_path: Path, whole: Path) -> None:
    parts = split(whole, tmp_path / "split")
    assert [part.name for part in parts] == [f"m-{i:05}-of-00004.gguf" for i in range(1, 5)]
    config, text = load_model_config(str(whole)), load_model_text(whole)
    expected = logits(whole, tp=2)
    for model in (*parts, tmp_path / "split"):
        got = load_model_config(str(model))
        assert got.name == "m-00001-of-00004" and got.moe == config.moe and got.rope == config.rope
        found = load_model_text(model)
        assert found.generation == text.generation and found.tokenizer is not None and text.tokenizer is not None
        assert found.tokenizer.to_json() == text.tokenizer.to_json()
    assert torch.equal(logits(parts[2], tp=2), expected)
    assert torch.equal(logits(tmp_path / "split", tp=2), expected)
    folder = convert_gguf(tmp_path / "split", tmp_path / "hf", dtype="float32")
    assert torch.equal(logits(folder, tp=2), expected)


def test_a_first_part_without_tensors(tmp_path: Path, whole: Path) -> None:
    parts = split(whole, tmp_path / "split", small_first_shard=True)
    assert GgufHeader(parts[1]).parts[0].tensors == []
    assert torch.equal(logits(parts[0]), logits(whole))


def renamed(parts: list[Path]) -> Path:
    return parts[0].rename(parts[0].with_name("first.gguf"))


def swapped(parts: list[Path]) -> Path:
    shutil.copy(parts[1], parts[2])
    return parts[0]


def of_another_split(parts: list[Path]) -> Path:
    """Part 4 of another model, cut into as many files."""
    model = lab.model_of(lab.configs()["llama"])
    other = lab.write_model(parts[0].with_name("o.gguf"), model)
    folder = parts[0].parent.parent / "other"
    file = GgufFile(GgufHeader(other))
    tensors = {
        name: (file._rows[name].view("f4").reshape(i.shape), Kind.F32) for name, i in file.header.tensors.items()
    }
    folder.mkdir()
    lab.write_file(folder / "m.gguf", "llama", {"llama.block_count": 3}, tensors, split_max_tensors=8)
    other.unlink()
    shutil.copy(folder / "m-00004-of-00004.gguf", parts[3])
    return parts[0]


def twice(parts: list[Path]) -> Path:
    """Part 3 holds part 2's tensors again, and says that it is part 3."""
    data = parts[1].read_bytes()
    key = b"split.no"
    at = data.index(key) + len(key) + 4
    assert struct.unpack_from("<H", data, at) == (1,)
    parts[2].write_bytes(data[:at] + struct.pack("<H", 2) + data[at + 2 :])
    return parts[0]


def cut(parts: list[Path]) -> Path:
    parts[3].write_bytes(parts[3].read_bytes()[:-4000])
    return parts[0]


def unlinked(parts: list[Path]) -> Path:
    parts[2].unlink()
    return parts[0]


def recounted(parts: list[Path]) -> Path:
    """The files of a split into 4, named as if of 5."""
    for part in parts:
        part.rename(part.with_name(part.name.replace("of-00004", "of-00005")))
    return parts[0].with_name("m-00001-of-00005.gguf")


BROKEN: dict[str, tuple[Callable[[list[Path]], Path], str]] = {
    "a missing part": (unlinked, "needs 4 parts beside it; 1 are missing, first m-00003-of-00004.gguf"),
    "the first missing": (lambda parts: parts[0].unlink() or parts[1], "1 are missing, first m-00001-of-00004.gguf"),
    "a renamed part": (renamed, "one of 4 parts; parts are found by their names, NAME-00001-of-0000N.gguf"),
    "another count in the names": (recounted, "says that it is one of 4 parts"),
    "a part under another's name": (swapped, "is by its name part 3 of 4, but its split.no is 1"),
    "a part of another model": (of_another_split, "the 4 parts hold 51 tensors, but split.tensors.count is 52"),
    "a part that is there twice": (twice, "tensors stand there twice, first blk"),
    "a part that is cut off": (cut, "m-00004-of-00004.gguf ("),
    "a part that is something else": (
        lambda parts: parts[2].write_bytes(b"PK\3\4" * 100) and parts[0],
        "m-00003-of-00004.gguf is not a GGUF file: it begins with b'PK",
    ),
}


@pytest.mark.parametrize(("breakage", "problem"), BROKEN.values(), ids=BROKEN)
def test_mismatched_parts_are_a_one_line_error(tmp_path: Path, whole: Path, capsys, breakage, problem: str) -> None:
    path = breakage(split(whole, tmp_path / "split"))
    assert main(["generate", str(path), "--prompt", "the"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("narrows: error: ")
    assert problem in err


# -- folders ----------------------------------------------------------------------------------------------------------


def test_resolution_of_gguf_paths(tmp_path: Path) -> None:
    assert find_gguf(tmp_path / "no.gguf") == tmp_path / "no.gguf"  # so that it is reported missing
    assert find_gguf(tmp_path) is None
    assert find_gguf(Path("deepseek-v3")) is None
    file = tmp_path / "Model.Q8_0.GGUF"
    file.touch()
    (tmp_path / "config.json").touch()
    assert find_gguf(tmp_path) == find_gguf(file) == file
    (tmp_path / "model.safetensors.index.json").touch()
    assert find_gguf(tmp_path) is None  # a checkpoint with a GGUF beside it
    assert find_gguf(file) == file


def test_a_folder_of_several_models_names_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a-00001-of-00002", "a-00002-of-00002", "a-00001-of-00003", "b.Q4_K"):
        (tmp_path / f"{name}.gguf").touch()
    with pytest.raises(
        ConfigError, match=r"holds 3 GGUF models; name the file that you mean: a-00001-of-00002.gguf, a"
    ):
        load_model_config(str(tmp_path))
    assert main(["generate", str(tmp_path), "--prompt", "the"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("command", ["plan", "generate", "simulate", "verify"])
def test_commands_take_a_folder_with_a_file(tmp_path: Path, whole: Path, command: str, capsys) -> None:
    shutil.copy(whole, tmp_path / "m.gguf")
    more = {
        "plan": ["--tp", "2", "--device", "h100", "--rows", "8"],
        "generate": ["--tp", "2", "--prompt", "the", "--max-tokens", "2", "--ignore-eos", "--dtype", "float32"],
        "simulate": [
            "--tp",
            "2",
            "--device",
            "h100",
            "--num-requests",
            "2",
            "--input-length",
            "9",
            "--output-length",
            "3",
        ],
        "verify": ["--tp", "2", "--prompt", "the", "--steps", "1", "--layout", "all-reduce", "--dtype", "float32"],
    }[command]
    assert main([command, str(tmp_path), *more]) == 0
    assert capsys.readouterr().out


# -- files that are broken --------------------------------------------------------------------------------------------


def at_tensor(data: bytes, name: str) -> int:
    """Offset of the number of a tensor's dimensions."""
    text = struct.pack("<Q", len(name)) + name.encode()
    return data.index(text) + len(text)


@pytest.mark.parametrize(
    ("offset", "new", "problem"),
    [
        (0, struct.pack("<I", 5), "the tensor output_norm.weight has 5 dimensions"),
        (0, struct.pack("<I", 1 << 31), "the tensor output_norm.weight has 2147483648 dimensions"),
        (
            4,
            struct.pack("<Q", 1 << 60),
            "output_norm.weight is (1152921504606846976,), but the metadata makes",
        ),
        (12, struct.pack("<I", 99), "output_norm.weight is encoded as encoding number 99, which gguf cannot decode"),
        (16, struct.pack("<Q", 1 << 40), "output_norm.weight ends at byte 1099"),
        (16, struct.pack("<Q", (1 << 64) - 32), "output_norm.weight ends at byte 1844"),
    ],
)
def test_an_impossible_tensor_is_a_one_line_error(
    tmp_path: Path, whole: Path, capsys, offset, new, problem: str
) -> None:
    data = bytearray(whole.read_bytes())
    at = at_tensor(bytes(data), "output_norm.weight") + offset
    data[at : at + len(new)] = new
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    assert main(["generate", str(path), "--prompt", "the"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and problem in err


def test_duplicate_keys_and_tensors_are_refused(tmp_path: Path, whole: Path) -> None:
    data = whole.read_bytes()
    path = tmp_path / "m.gguf"
    path.write_bytes(data.replace(b"blk.1.attn_norm.weight", b"blk.0.attn_norm.weight"))
    with pytest.raises(CheckpointError, match=r"1 of 52 tensors stand there twice, first blk.0.attn_norm.weight"):
        load_model_config(str(path))
    path.write_bytes(data.replace(b"deepseek2.vocab_size", b"deepseek2.embedd_len", 1))
    with pytest.raises(ConfigError, match=r"deepseek2.embedd_len is 320, which narrows does not obey"):
        load_model_config(str(path))
    path.write_bytes(data.replace(b"deepseek2.vocab_size", b"deepseek2.vo\nab_size", 1))
    with pytest.raises(ConfigError, match=r"'deepseek2.vo\\nab_size' is 320, which narrows does not obey"):
        load_model_config(str(path))
    path.write_bytes(data.replace(b"tokenizer.ggml.bos_token_id", b"tokenizer.ggml.eos_token_id"))
    with pytest.raises(CheckpointError, match=r"the key tokenizer.ggml.eos_token_id stands there twice"):
        load_model_config(str(path))


def test_lengths_that_no_file_has_are_not_read_into_memory(tmp_path: Path) -> None:
    """A sparse file of 2 TB whose first text, or first array, claims a terabyte of it."""
    for kind, said in ((8, "a text of 1099511627776 bytes"), (9, "an array of 1099511627776 values")):
        key = struct.pack("<Q", 1) + b"k" + struct.pack("<I", kind)
        body = (struct.pack("<I", 0) if kind == 9 else b"") + struct.pack("<Q", 1 << 40)
        path = tmp_path / f"{kind}.gguf"
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key + body)
        with path.open("r+b") as file:
            file.truncate(1 << 41)
        with pytest.raises(CheckpointError, match=f"is not complete GGUF, cut off or broken: {said}"):
            GgufHeader(path)
