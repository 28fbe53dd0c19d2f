"""Command lines of engines: every flag of every way is in the engine's list, and lists are built from sources."""

from __future__ import annotations

import importlib.util
import json
import shlex
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from narrows.advise.command import HUB_NAMES, ServerLimits, command_lines, weights_flags
from narrows.advise.flags import FLAG_LISTS, flag_list
from narrows.advise.ways import Way, ways
from narrows.arch.presets import PRESETS, preset
from narrows.errors import ConfigError

ROOT = Path(__file__).parents[2]
MODELS = ("deepseek-v3", "deepseek-v2-lite", "qwen3-235b-a22b", "glm-4.5", "llama-3.1-8b")


def every_way(engine: str, model: str, num_ranks: int) -> tuple[Way, ...]:
    try:
        return tuple(way for way in ways(engine, preset(model), num_ranks) if not way.refusal)
    except ConfigError:
        return ()


def limits(engine: str, **more: object) -> ServerLimits:
    return ServerLimits(engine=engine, rows=8192, requests_per_group=256, max_context=8192, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("engine", FLAG_LISTS)
def test_every_flag_of_every_way_is_in_the_engines_list(engine: str) -> None:
    known = flag_list(engine)
    seen = 0
    for model in MODELS:
        for num_ranks in (1, 2, 8, 16):
            for way in every_way(engine, model, num_ranks):
                hosts = 2 if num_ranks == 16 else 1
                for line in command_lines(
                    model, way, limits(engine, kv_dtype="fp8", prefix_cache=False), hosts=hosts, revision="main"
                ):
                    words = shlex.split(line.rpartition("; ")[2])
                    flags = [word for word in words if word.startswith("--") and word != "--model-path"]
                    assert HUB_NAMES[model] in words and all(flag in known.flags for flag in flags), line
                    seen += len(flags)
    assert seen > 100


def test_what_an_engine_would_refuse() -> None:
    sglang = flag_list("sglang")
    assert not sglang.fault("--tp-size", 8) and not sglang.fault("--tensor-parallel-size", 8)
    assert "has no --enable-everything" in sglang.fault("--enable-everything")
    assert "takes no value" in sglang.fault("--enable-attn-tp-input-scattered", 1)
    assert "takes a value" in sglang.fault("--tp-size")
    assert "not fp7" in sglang.fault("--kv-cache-dtype", "fp7")
    assert all(flag_list(engine).version for engine in FLAG_LISTS)


def test_a_way_with_another_releases_flag_is_refused() -> None:
    way = every_way("sglang", "llama-3.1-8b", 2)[0]
    old = replace(way, flags=(*way.flags, ("--enable-ep-moe", None)))
    with pytest.raises(ConfigError, match=r"SGLang .* has no --enable-ep-moe"):
        command_lines("llama-3.1-8b", old, limits("sglang"))


def test_hosts() -> None:
    plain, attention = (
        next(way for way in every_way("vllm", "deepseek-v3", 16) if way.mesh.num_groups == groups) for groups in (1, 8)
    )
    first, second = command_lines("deepseek-v3", plain, limits("vllm"), hosts=2)
    assert "--nnodes 2 --node-rank 0" in first and "--headless" not in first
    assert "--nnodes 2 --node-rank 1" in second and second.endswith("--headless")
    first, second = command_lines("deepseek-v3", attention, limits("vllm"), hosts=2)
    assert "--data-parallel-size-local 4" in first and "--data-parallel-start-rank 4" in second
    on_four = [way for way in ways("vllm", preset("deepseek-v3"), 16, 4) if "4 hosts evenly" in way.refusal]
    assert [way.mesh.num_groups for way in on_four] == [2]
    (line,) = command_lines("deepseek-v3", every_way("trtllm", "deepseek-v3", 16)[0], limits("trtllm"), hosts=2)
    assert line.startswith("trtllm-llmapi-launch trtllm-serve") and "--gpus_per_node 8" in line


def test_rows_are_counted_as_the_engine_counts_them() -> None:
    groups = {
        engine: next(way for way in every_way(engine, "deepseek-v3", 8) if way.mesh.num_groups == 8)
        for engine in FLAG_LISTS
    }
    lines = {engine: command_lines("deepseek-v3", way, limits(engine))[0] for engine, way in groups.items()}
    assert "--chunked-prefill-size 8192 --max-running-requests 2048" in lines["sglang"]
    assert "--max-num-batched-tokens 8192 --max-num-seqs 256" in lines["vllm"]
    assert "--max_num_tokens 8192 --max_batch_size 256" in lines["trtllm"]
    rows = {engine: limits(engine).rows_per_step(way.mesh) for engine, way in groups.items()}
    assert rows == {"sglang": 8192, "vllm": 65536, "trtllm": 65536}


def test_weights() -> None:
    plain, block = preset("llama-3.1-8b"), preset("deepseek-v3")
    assert weights_flags("vllm", plain, "bf16") == weights_flags("vllm", block, "fp8") == ()
    assert weights_flags("sglang", plain, "fp8") == (("--quantization", "fp8"),)
    with pytest.raises(ConfigError, match="give an FP8 checkpoint"):
        weights_flags("trtllm", plain, "fp8")
    with pytest.raises(ConfigError, match="int8"):
        weights_flags("sglang", plain, "int8")


def test_hub_names_are_of_presets() -> None:
    assert set(HUB_NAMES) <= set(PRESETS)


# -- the script that makes the lists -----------------------------------------------------------------------------------


@pytest.fixture
def builder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("engine_flags", ROOT / "benchmarks" / "engine_flags.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def test_annotated_fields_as_sglang_has_them(builder: ModuleType, tmp_path: Path) -> None:
    root = tmp_path / "sglang" / "srt"
    write(root / "arg_groups" / "choices.py", 'KINDS = ["a", "b"]\n')
    write(
        root / "arg_groups" / "fields" / "one.py",
        "class One:\n"
        '    size: A[int, Arg(help="", aliases=["--long-size"])] = 1\n'
        '    kind: A[str, Arg(help="", choices=KINDS + ["c"])] = "a"\n'
        '    enable_it: A[bool, "words"] = False\n'
        '    both: A[Optional[bool], Arg(help="", action=argparse.BooleanOptionalAction)] = None\n'
        "    hidden: A[bool, Arg(no_cli=True)] = False\n"
        '    named: A[int, Arg(help="", cli_name="--other-name")] = 0\n',
    )
    write(root / "server_args.py", 'parser.add_argument("--old", action="store_true")\n')
    assert builder.sglang(tmp_path) == {
        "--size": {"aliases": ["--long-size"], "default": 1},
        "--kind": {"choices": ["a", "b", "c"], "default": "a"},
        "--enable-it": {"switch": True},
        "--both": {"aliases": ["--no-both"], "switch": True},
        "--other-name": {"default": 0},
        "--old": {"switch": True},
    }


def test_configs_as_vllm_has_them(builder: ModuleType, tmp_path: Path) -> None:
    root = tmp_path / "vllm"
    write(
        root / "config" / "parallel.py",
        'Backend = Literal["ring", "tree"]\n'
        "class Config:\n"
        "    size: int = Field(default=2, ge=1)\n    backend: Backend = 'ring'\n    fast: bool = False\n",
    )
    write(
        root / "engine" / "arg_utils.py",
        'group.add_argument("--size", "-s", **parallel_kwargs["size"])\n'
        'group.add_argument("--backend", **parallel_kwargs["backend"])\n'
        'group.add_argument("--fast", **parallel_kwargs["fast"])\n',
    )
    write(root / "entrypoints" / "common" / "cli_args.py", "class Front:\n    host: str | None = None\n")
    assert builder.vllm(tmp_path) == {
        "--size": {"aliases": ["-s"], "default": 2},
        "--backend": {"choices": ["ring", "tree"], "default": "ring"},
        "--fast": {"aliases": ["--no-fast"], "switch": True},
        "--host": {},
    }


def test_the_reference_list_of_tensorrt_llm(builder: ModuleType, tmp_path: Path) -> None:
    def said(name: str, kind: str, default: str, *words: str) -> str:
        values = {"type": kind, "default": default, "is_flag": str(kind == "bool").lower()}
        lines = [f"      {name}:", *(f"        {key}: {value}" for key, value in values.items()), "        flags:"]
        return "\n".join([*lines, *(f'        - "{word}"' for word in words), ""])

    serve = (
        said("tensor_parallel_size", "int", "1", "--tensor_parallel_size", "--tp_size")
        + said("kv", "Choice(['auto', 'fp8'])", "auto", "--kv_cache_dtype")
        + said("telemetry", "bool", "true", "--no-telemetry", "--telemetry")
    )
    text = f"commands:\n  serve:\n    options:\n{serve}  other:\n    options:\n{said('x', 'int', '1', '--x')}"
    write(tmp_path / "tests/unittest/api_stability/references/trtllm_serve_cli.yaml", text)
    flags = builder.trtllm(tmp_path)
    assert flags == {
        "--tp_size": {"aliases": ["--tensor_parallel_size"], "default": 1},
        "--kv_cache_dtype": {"choices": ["auto", "fp8"], "default": "auto"},
        "--telemetry": {"aliases": ["--no-telemetry"], "switch": True},
    }
    document = json.loads(builder.document("trtllm", "1.0", flags))
    assert document["flags"] == flags and document["command"] == "trtllm-serve"
