"""Models by their names on the hub: the real library sends requests to a fake hub over real HTTP."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from narrows.arch.presets import load_model_config
from narrows.checkpoints import local_model, model_path
from narrows.checkpoints.hub_cache import cache_folder, is_hub_name, name_of
from narrows.cli.main import main
from narrows.errors import ConfigError

from .fake_hub import FakeHub, Repo, running_hub
from .smallest import LLAMA

DEMO = Path(model_path("narrows-demo"))
COMMIT = "c0ffee" + "0" * 34
TEXT = {name: b"{}" for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json")}
FILES = {"config.json": json.dumps(LLAMA).encode(), **TEXT, "chat_template.jinja": b"x"}
NOISE = {
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"another copy",
    "original/params.json": b"{}",
    "README.md": b"",
    "onnx/model.onnx": b"",
    "flax_model.msgpack": b"",
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub, and an empty cache; settings that the library read when it was imported are set there too."""
    with running_hub() as found:
        cache = tmp_path / "hub"
        for name, value in (("HF_HUB_CACHE", str(cache)), ("HF_ENDPOINT", found.url)):
            monkeypatch.setenv(name, value)
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        set_endpoint(monkeypatch, found.url)
        monkeypatch.chdir(tmp_path)
        yield found


def set_endpoint(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def silence(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """The hub's address no longer answers."""
    return lambda: set_endpoint(monkeypatch, "http://127.0.0.1:9")


def refused(name: str, **more: str) -> str:
    with pytest.raises(ConfigError) as error:
        local_model(name, **({"needed": "weights"} | more))  # type: ignore[arg-type]
    text = str(error.value)
    assert "\n" not in text and len(text) < 600
    return text


def there(folder: str) -> set[str]:
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}


def sharded(*names: str) -> dict[str, bytes]:
    index = {"weight_map": {f"t{i}": name for i, name in enumerate(names)}}
    return {"model.safetensors.index.json": json.dumps(index).encode()} | dict.fromkeys(names, b"shard")


# -- names and paths -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "is_one"),
    [
        ("Qwen/Qwen3-8B", True),
        ("a/b.c_d-e", True),
        ("gpt2", False),
        ("deepseek-v3", False),
        ("a/b/c", False),
        ("/a/b", False),
        ("./b", False),
        ("../b", False),
        ("~/b", False),
        ("a/..", False),
        ("a/b--c", False),
        ("a/b.gguf", False),
        ("a/config.json", False),
        ("a/b c", False),
        ("a/ü", False),
        ("a/", False),
        ("https://huggingface.co/a/b", False),
        ("here/is", False),
    ],
)
def test_which_names_are_hub_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, is_one: bool) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "is").mkdir(parents=True)
    assert is_hub_name(model) == is_one


def test_the_cache_folder_is_huggingface_hubs() -> None:
    home = os.path.expanduser("~")
    for given, want in (
        ({}, f"{home}/.cache/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
        ({"HF_HOME": "/h", "XDG_CACHE_HOME": "/x"}, "/h/hub"),
        ({"HF_HUB_CACHE": "~/c", "HF_HOME": "/h"}, f"{home}/c"),
    ):
        assert str(cache_folder(given)) == want
    code = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
    env = {"PATH": os.environ["PATH"], "HOME": "/h", "HF_HOME": "/some/where"}
    theirs = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert theirs.strip() == str(cache_folder(env))


def test_folders_of_the_cache_given_as_paths(tmp_path: Path) -> None:
    repo = tmp_path / "models--org--some--name"
    for commit in ("aaa", "bbb"):
        (repo / "snapshots" / commit).mkdir(parents=True)
        (repo / "snapshots" / commit / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"no snapshot of the revision 'main'.* it has 2, such as aaa.*--revision"):
        model_path(str(repo))
    (repo / "refs" / "pr").mkdir(parents=True)
    (repo / "refs" / "main").write_text("bbb", encoding="utf-8")
    (repo / "refs" / "pr" / "1").write_text("aaa\n", encoding="utf-8")
    assert model_path(str(repo)) == model_path(f"{repo}/") == str(repo / "snapshots" / "bbb")
    assert model_path(str(repo), "pr/1") == model_path(str(repo), "aaa") == str(repo / "snapshots" / "aaa")
    assert load_model_config(str(repo)).name == load_model_config(model_path(str(repo))).name == "org/some--name"
    for revision in ("v9", "../refs/main"):
        with pytest.raises(ConfigError, match=r"revision|--revision"):
            model_path(str(repo), revision)
    shutil.rmtree(repo / "snapshots" / "aaa")
    (repo / "refs" / "main").unlink()
    assert model_path(str(repo)) == str(repo / "snapshots" / "bbb")
    shutil.rmtree(repo / "snapshots" / "bbb")
    with pytest.raises(ConfigError, match="no snapshot is in it; download the model again"):
        model_path(str(repo))


def test_a_revision_of_a_model_outside_the_hub_is_refused(tmp_path: Path) -> None:
    for model in (str(tmp_path), "deepseek-v3", "narrows-demo", "x.gguf"):
        with pytest.raises(ConfigError, match="has no revisions; models of the hub"):
            local_model(model, revision="main", needed="config")


def test_names_of_models() -> None:
    assert name_of(Path("/c/models--a--b/snapshots/1/")) == "a/b" and name_of(Path("/c/models--a--b")) == "a/b"
    assert name_of(Path("/x/folder/")) == "folder" and name_of(Path()) == Path.cwd().name


# -- what is fetched -------------------------------------------------------------------------------------------------


def test_a_plan_fetches_only_the_config_and_later_uses_the_cache(hub: FakeHub) -> None:
    hub.repos["org/name"] = Repo(FILES | NOISE | {"model.safetensors": b"w"})
    config = load_model_config("org/name")
    assert (config.name, config.hidden_size) == ("org/name", 8)
    assert hub.fetched() == {"config.json"}
    hub.asked.clear()
    assert load_model_config("org/name") == config and not hub.asked


def test_a_folder_of_that_name_wins(hub: FakeHub, tmp_path: Path) -> None:
    hub.repos["org/name"] = Repo(FILES)
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "org" / "name" / "config.json").write_text(json.dumps(LLAMA | {"hidden_size": 16}), encoding="utf-8")
    assert load_model_config("org/name").hidden_size == 16 and not hub.asked


@pytest.mark.parametrize("needed", ["text", "weights"])
def test_only_files_that_are_read_are_fetched(hub: FakeHub, needed: str) -> None:
    more = {"model.safetensors": b"w", "additional_chat_templates/rag.jinja": b"r", "tokenizer.model": b"t"}
    hub.repos["org/name"] = Repo(FILES | NOISE | more)
    folder = local_model("org/name", needed=needed)  # type: ignore[arg-type]
    want = {*FILES, *more} - ({"model.safetensors"} if needed == "text" else set())
    assert there(folder) == want and Path(folder).name == COMMIT
    hub.asked.clear()
    assert local_model("org/name", needed=needed) == folder and not hub.fetched()  # type: ignore[arg-type]


def test_the_shards_of_the_index_are_fetched(hub: FakeHub) -> None:
    parts = sharded("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "odd [x]*.safetensors")
    hub.repos["org/name"] = Repo(FILES | NOISE | parts)
    assert there(local_model("org/name", needed="weights")) == {*FILES, *parts}


def test_a_single_file_wins_over_an_index_as_it_does_in_a_folder(hub: FakeHub) -> None:
    hub.repos["org/name"] = Repo(FILES | sharded("a.safetensors") | {"model.safetensors": b"w"})
    local_model("org/name", needed="weights")
    assert "a.safetensors" not in hub.fetched() and "model.safetensors" in hub.fetched()


def test_revisions(hub: FakeHub, silence: Callable[[], None]) -> None:
    hub.repos["org/name"] = Repo(FILES, revisions=("main", "v1"))
    folder = local_model("org/name", revision="v1", needed="text")
    assert Path(folder).name == COMMIT
    assert "has no revision 'v2'" in refused("org/name", revision="v2", needed="text")
    silence()
    assert local_model("org/name", revision="v1", needed="text") == folder
    assert local_model("org/name", revision=COMMIT, needed="text") == folder
    assert "the revision 'v2' of org/name is neither" in refused("org/name", revision="v2", needed="text")


def test_a_token_opens_private_and_gated_models(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos["org/private"] = Repo(FILES, token="secret")
    hub.repos["org/gated"] = Repo(FILES, token="secret", gated=True)
    assert "for a private model set HF_TOKEN" in refused("org/private", needed="text")
    assert "accept its terms at" in refused("org/gated", needed="text")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    assert "accept its terms at" in refused("org/gated", needed="text")
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert (
        there(local_model("org/private", needed="text")) == there(local_model("org/gated", needed="text")) == {*FILES}
    )


# -- what goes wrong -------------------------------------------------------------------------------------------------


def test_an_unknown_hub_name_is_refused(hub: FakeHub) -> None:
    text = refused("org/nme")
    assert "org/nme is neither a folder here nor a model that" in text and hub.url in text


@pytest.mark.parametrize("status", [403, 429, 500, 503])
def test_a_hub_that_refuses(hub: FakeHub, caplog: pytest.LogCaptureFixture, status: int) -> None:
    hub.repos["org/name"] = Repo(FILES | {"model.safetensors": b"w"})
    folder = local_model("org/name", needed="weights")
    hub.status = status
    text = refused("org/other")
    assert str(status) in text and ("HF_TOKEN" in text) == (status == 403)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "narrows.checkpoints"):
        assert local_model("org/name", needed="weights") == folder
    [record] = [record for record in caplog.records if record.name == "narrows.checkpoints"]
    assert f"org/name is read from the cache, commit {COMMIT}" in record.getMessage()


@pytest.mark.parametrize("page", [b"<html>log in first</html>", b"[]", b'"x"', b"{}"])
def test_a_server_that_is_no_hub_is_refused(hub: FakeHub, page: bytes) -> None:
    hub.page = page
    assert f"{hub.url} does not answer like a hub" in refused("org/name")


def test_a_download_that_breaks_off(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    hub.repos["org/name"] = Repo(FILES | {"model.safetensors": b"weights" * 1000})
    hub.cut_after = 2000
    text = refused("org/name")
    assert "the download from" in text and "broke off" in text and "run the command again" in text
    hub.cut_after = -1
    local = Path(local_model("org/name", needed="weights"))
    assert (local / "model.safetensors").read_bytes() == b"weights" * 1000


def test_without_a_network_a_complete_cache_is_read(hub: FakeHub, silence: Callable[[], None]) -> None:
    parts = sharded("a.safetensors", "b.safetensors")
    for name in ("org/whole", "org/text"):
        hub.repos[name] = Repo(FILES | parts)
    folder = local_model("org/whole", needed="weights")
    local_model("org/text", needed="text")
    silence()
    assert local_model("org/whole", needed="weights") == folder
    assert "lacks 2 file(s), such as a.safetensors, and http" in refused("org/text")
    text = refused("org/none")
    assert "org/none is neither a folder here nor in the cache" in text and "check the network" in text


def test_offline_mode_makes_no_request(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hub.repos["org/name"] = Repo(FILES | {"model.safetensors": b"w"})
    folder = local_model("org/name", needed="weights")
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert local_model("org/name", needed="weights") == folder
    assert "HF_HUB_OFFLINE is set: unset it" in refused("org/other")
    assert not hub.asked and not caplog.records


def test_a_cache_of_an_older_library_is_read(hub: FakeHub, tmp_path: Path, silence: Callable[[], None]) -> None:
    """Of an older library: links to blobs, and no list of what the repository holds."""
    repo = tmp_path / "hub" / "models--org--old"
    (repo / "blobs").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc", encoding="utf-8")
    (repo / "snapshots" / "abc").mkdir(parents=True)
    for i, (name, data) in enumerate((FILES | {"model.safetensors": b"w"}).items()):
        (repo / "blobs" / str(i)).write_bytes(data)
        (repo / "snapshots" / "abc" / name).symlink_to(f"../../blobs/{i}")
    silence()
    assert local_model("org/old", needed="weights") == str(repo / "snapshots" / "abc")
    assert load_model_config("org/old").hidden_size == 8


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (
            {"model-Q4.gguf": b"", "README.md": b""},
            "holds GGUF files (1): fetch one, such as with `hf download org/name",
        ),
        (FILES | {"pytorch_model.bin": b""}, "holds pickles (pytorch_model.bin) and no safetensors"),
        (FILES, "is no whole model: it needs config.json, and model.safetensors or"),
        ({"adapter_config.json": b"{}"}, "is an adapter, not a model"),
        (FILES | {"model.safetensors.index.json": b'{"weight_map": {"a": "../b.safetensors"}}'}, "is no whole model"),
        (FILES | {"model.safetensors.index.json": b"[]"}, "holds a JSON list"),
    ],
)
def test_repositories_that_are_no_model(hub: FakeHub, files: dict[str, bytes], words: str) -> None:
    hub.repos["org/name"] = Repo(files)
    assert words in refused("org/name")


def test_a_model_that_the_disk_has_no_room_for(hub: FakeHub) -> None:
    hub.repos["org/name"] = Repo(FILES | {"model.safetensors": b"w"}, sizes={"model.safetensors": 10**18})
    text = refused("org/name")
    assert "takes 1000000000.0 GB more" in text and "HF_HUB_CACHE" in text and "model.safetensors" not in hub.fetched()


def test_a_disk_that_fills_up_or_refuses(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos["org/name"] = Repo(FILES)
    for number, words in ((28, "the disk of"), (122, "the disk of"), (13, "cannot be fetched into")):

        def fail(*args: object, **kwargs: object) -> None:
            raise OSError(number, os.strerror(number))  # noqa: B023 - called within this turn of the loop

        monkeypatch.setattr("huggingface_hub.file_download.http_get", fail)
        assert words in refused("org/name", needed="text")


# -- the command line ------------------------------------------------------------------------------------------------


def test_plan_and_simulate_take_names(hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.repos["org/demo"] = Repo({"config.json": (DEMO / "config.json").read_bytes()}, revisions=("main", "v1"))
    assert main(["plan", "org/demo", "--device", "h20", "--rows", "8", "--revision", "v1"]) == 0
    assert "org/demo on" in capsys.readouterr().out
    arguments = ["--device", "h20", "--num-requests", "2", "--input-length", "8", "--output-length", "2"]
    assert main(["simulate", "org/demo", *arguments]) == 0
    assert main(["plan", "org/none", "--device", "h20", "--rows", "8"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("narrows: error: org/none is neither a folder here nor a model") and error.count("\n") == 1
    assert main(["plan", "deepseek-v3", "--device", "h20", "--rows", "8", "--revision", "v1"]) == 2
    assert "deepseek-v3 has no revisions" in capsys.readouterr().err


def test_local_names_do_not_import_huggingface_hub() -> None:
    code = (
        "import sys\nfrom narrows.cli.main import main\n"
        "main(['plan', 'narrows-demo', '--device', 'h20', '--rows', '8', '--json'])\n"
        "sys.exit('huggingface_hub' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.slow
def test_fetching_prints_no_progress_into_a_pipe(hub: FakeHub, tmp_path: Path) -> None:
    hub.repos["org/demo"] = Repo({"config.json": (DEMO / "config.json").read_bytes()})
    env = os.environ | {"HF_HOME": str(tmp_path / "home")}
    env.pop("HF_HUB_CACHE")
    command = [sys.executable, "-m", "narrows", "plan", "org/demo", "--device", "h20", "--rows", "8", "--json"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and json.loads(done.stdout)
    assert (tmp_path / "home" / "hub" / "models--org--demo" / "refs" / "main").read_text(encoding="utf-8") == COMMIT
