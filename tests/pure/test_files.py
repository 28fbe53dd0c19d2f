"""A folder's files: nothing outside it is read, every byte order mark is, and the rest is one line."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from narrows.arch.config import read_config
from narrows.arch.presets import load_model_config
from narrows.errors import CheckpointError, ConfigError
from narrows.files import file_in, read_json, read_json_object, read_text
from narrows.text import Tokenizer
from narrows.text.folder import read_tokenizer_files
from narrows.text.generation_config import read_generation_config

from .smallest import LLAMA

TOKENIZER = {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}


def said(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 500
    return text


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder with a file, beside another file."""
    (tmp_path / "home" / "more").mkdir(parents=True)
    for name in ("outside.json", "home/a.json", "home/more/b.json"):
        (tmp_path / name).write_text(json.dumps({"name": name}), encoding="utf-8")
    return tmp_path / "home"


def cached(tmp_path: Path, name: str = "config.json", content: str = "{}") -> Path:
    """A snapshot folder of the hub's cache, with one file."""
    repo = tmp_path / "hub" / "models--org--name"
    snapshot = repo / "snapshots" / ("a" * 40)
    (repo / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (repo / "blobs" / "1234").write_text(content, encoding="utf-8")
    (snapshot / name).symlink_to("../../blobs/1234")
    return snapshot


def test_files_of_the_folder_are_found_and_missing_ones_are_none(home: Path, tmp_path: Path) -> None:
    assert file_in(home, "a.json") == home / "a.json" and file_in(home, "more/b.json") == home / "more/b.json"
    assert file_in(home, "c.json") is None and file_in(home, "no/c.json") is None
    (home / "link.json").symlink_to("more/b.json")
    assert file_in(home, "link.json") == home / "link.json"
    (tmp_path / "other name").symlink_to(home)
    assert file_in(tmp_path / "other name", "a.json") is not None
    assert file_in(tmp_path / "nowhere", "a.json") is None


@pytest.mark.parametrize("name", ["../outside.json", "more/../../outside.json", "/etc/hostname", "{abs}", "a\0b", ".."])
def test_a_name_outside_the_folder_is_refused(home: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError) as error:
        file_in(home, name.replace("{abs}", str(tmp_path / "outside.json")))
    assert "outside the folder; only files in it are read" in said(error)


@pytest.mark.parametrize("target", ["../outside.json", "{abs}", "more/out.json"])
def test_a_link_out_of_the_folder_is_refused(home: Path, tmp_path: Path, target: str) -> None:
    (home / "more" / "out.json").symlink_to("../../outside.json")
    (home / "link.json").symlink_to(target.replace("{abs}", str(tmp_path / "outside.json")))
    with pytest.raises(CheckpointError, match=r"is a link to .*outside\.json, outside the folder"):
        file_in(home, "link.json")


def test_a_linked_folder_outside_is_refused(home: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.json").write_text("{}", encoding="utf-8")
    (home / "sub").symlink_to("../elsewhere")
    with pytest.raises(CheckpointError, match="outside the folder"):
        file_in(home, "sub/b.json")


def test_links_of_the_hub_cache_lead_to_its_own_files_only(tmp_path: Path) -> None:
    snapshot = cached(tmp_path)
    assert file_in(snapshot, "config.json") is not None
    (tmp_path / "link").symlink_to(snapshot)
    assert file_in(tmp_path / "link", "config.json") is not None
    other = tmp_path / "hub" / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    (other / "5").write_text("{}", encoding="utf-8")
    (tmp_path / "secret").write_text("{}", encoding="utf-8")
    for name, target in (("o", other / "5"), ("s", tmp_path / "secret"), ("r", snapshot.parent.parent / "refs")):
        target.parent.mkdir(exist_ok=True)
        target.exists() or target.write_text("{}", encoding="utf-8")
        (snapshot / name).symlink_to(target)
        with pytest.raises(CheckpointError, match="outside the folder"):
            file_in(snapshot, name)
    (snapshot.parent.parent / "blobs" / "1234").unlink()
    with pytest.raises(CheckpointError, match=r"is a link to \.\./\.\./blobs/1234, which is not there; download"):
        file_in(snapshot, "config.json")


def test_a_file_that_is_not_regular_is_refused(home: Path) -> None:
    (home / "loop").symlink_to("loop")
    (home / "around").symlink_to("around2")
    (home / "around2").symlink_to("around")
    os.mkfifo(home / "pipe")
    for name, words in (
        ("more", "is a folder, where a file is needed"),
        ("loop", "is a link to loop, which is not there"),
        ("around", "is a link to around2, which is not there"),
        ("pipe", "is no regular file"),
        ("a" * 300, "cannot be read"),
    ):
        with pytest.raises(CheckpointError) as error:
            file_in(home, name)
        assert words in str(error.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission(home: Path) -> None:
    (home / "a.json").chmod(0)
    with pytest.raises(CheckpointError, match=r"a\.json: cannot be read \(Permission denied\)"):
        read_json(home / "a.json")


def test_a_file_that_cannot_be_read(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", fail)
    for read in (read_json, read_text):
        with pytest.raises(CheckpointError, match=r"a\.json: cannot be read \(Permission denied\)"):
            read(home / "a.json")


@pytest.mark.parametrize("content", ["{", "", "\x00", "[" * 100000, "1" * 5000, "{'a': 1}"])
def test_invalid_json_is_refused(home: Path, content: str) -> None:
    (home / "a.json").write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_json(home / "a.json")


def test_json_must_be_an_object_and_a_missing_file_is_empty(home: Path) -> None:
    assert read_json_object(home / "a.json") == {"name": "home/a.json"} and read_json_object(None) == {}
    for content, kind in (("[]", "list"), ('"x"', "str"), ("null", "NoneType"), ("3", "int")):
        (home / "a.json").write_text(content, encoding="utf-8")
        with pytest.raises(CheckpointError, match=f"holds a JSON {kind}, where an object is needed"):
            read_json_object(home / "a.json")


MARKS: dict[str, Callable[[str], bytes]] = {
    "utf-8": lambda text: codecs.BOM_UTF8 + text.encode(),
    "utf-16-le": lambda text: codecs.BOM_UTF16_LE + text.encode("utf-16-le"),
    "utf-16-be": lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"),
    "utf-32": lambda text: text.encode("utf-32"),
}


@pytest.mark.parametrize("mark", MARKS)
def test_byte_order_marks_in_every_json_of_a_folder(tmp_path: Path, mark: str) -> None:
    for name, value in (
        ("config.json", LLAMA),
        ("generation_config.json", {"eos_token_id": 3, "top_k": 5}),
        ("tokenizer_config.json", {"eos_token": "ä"}),
        ("special_tokens_map.json", {"bos_token": "a"}),
    ):
        (tmp_path / name).write_bytes(MARKS[mark](json.dumps(value, ensure_ascii=False)))
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    assert read_config(tmp_path).hidden_size == 8
    assert read_generation_config(tmp_path).top_k == 5
    files = read_tokenizer_files(tmp_path)
    assert files.named["eos_token"].content == "ä" and files.named["bos_token"].content == "a"


def test_byte_order_marks_of_the_tokenizer_and_of_templates(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(codecs.BOM_UTF8 + json.dumps(TOKENIZER).encode())
    (tmp_path / "chat_template.jinja").write_bytes(codecs.BOM_UTF8 + b"a")
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("aa") == [0, 0] and tokenizer.encode_chat([{"role": "user", "content": ""}]) == [0]
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: not UTF-8"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "additional_chat_templates/rag.jinja",
    ],
)
def test_checkpoint_files_that_link_outside_are_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    (folder / "additional_chat_templates").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER), encoding="utf-8")
    content = (folder / name).read_text(encoding="utf-8") if (folder / name).exists() else "{}"
    (folder / name).unlink(missing_ok=True)
    (tmp_path / "outside").write_text(content, encoding="utf-8")
    (folder / name).symlink_to(tmp_path / "outside")

    def read_all() -> None:
        read_config(folder)
        Tokenizer.from_folder(folder)

    with pytest.raises(CheckpointError) as error:
        read_all()
    assert f"{name}: is a link to {tmp_path / 'outside'}, outside the folder" in said(error)
    (folder / name).unlink()
    (folder / name).write_text(content, encoding="utf-8")
    read_all()


def test_templates_are_found_in_all_their_places(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(TOKENIZER), encoding="utf-8")
    config = tmp_path / "tokenizer_config.json"
    for given, found in (
        ("text", {"default": "text"}),
        ([{"name": "default", "template": "d"}, {"name": "rag", "template": "r"}], {"default": "d", "rag": "r"}),
        ({"default": "d", "tool_use": "t"}, {"default": "d", "tool_use": "t"}),
    ):
        config.write_text(json.dumps({"chat_template": given}), encoding="utf-8")
        assert read_tokenizer_files(tmp_path).templates == found
    more = tmp_path / "additional_chat_templates"
    more.mkdir()
    (more / "rag.jinja").write_text("file of rag", encoding="utf-8")
    assert read_tokenizer_files(tmp_path).templates == {"rag": "file of rag"}
    (tmp_path / "chat_template.jinja").write_text("file", encoding="utf-8")
    assert read_tokenizer_files(tmp_path).templates == {"default": "file", "rag": "file of rag"}


def test_a_folder_without_config_lists_its_files(tmp_path: Path) -> None:
    for name, words in (
        ("", r"config\.json: no such file; a model is a folder with config\.json, org/name of the hub, or a preset$"),
        ("adapter_config.json", "holds an adapter .* merge it"),
    ):
        if name:
            (tmp_path / name).touch()
        with pytest.raises(CheckpointError, match=words):
            load_model_config(str(tmp_path))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="give the folder of this file instead"):
        load_model_config(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("name", ["plain", "two words", "名前 ü", "v1.5"])
def test_folder_names_in_every_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(folder)
    for given in (str(folder), f"{folder}/", f"~/{name}", ".", "./", f"../{name}", "config.json", f"{folder}/./"):
        assert load_model_config(given).name == name, given


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("", "the model's name is empty"),
        ("a" * 5000, "cannot be opened (File name too long)"),
        ("a\0b", "cannot be opened (embedded null byte)"),
        ("loop", "cannot be opened (Too many levels of symbolic links)"),
    ],
)
def test_paths_that_cannot_be_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        load_model_config(model)
    assert words in said(error)


def test_a_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: str) -> list[str]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "listdir", fail)
    with pytest.raises(ConfigError, match=r"cannot be opened \(Permission denied\)"):
        load_model_config(str(tmp_path))
