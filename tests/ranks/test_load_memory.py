"""No rank holds the whole model, not even while it loads: peak memory of a process that loads as one rank of four.

What counts is anonymous memory (``RssAnon`` in /proc/PID/status): memory that the process made itself and the kernel
cannot drop.
Pages of the mapped checkpoint (``RssFile``) are left out: they are shared by all ranks of a host and are given
back when memory is short. What is freed goes back to the system at once, so that it is what is held that counts, not
what glibc's heap keeps for later (0 to 26 MB here, by chance). The process is watched from outside, every millisecond,
so that no lock of Python's hides a peak.

The checkpoints are of random numbers, in several files: 220 MB in bfloat16, 100 MB in FP8 (a Llama, and one with
experts), experts stacked in bfloat16; and one file of 65 MB in Q4_0.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from math import prod
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from narrows.arch.config import ModelConfig
from narrows.arch.presets import load_model_config
from narrows.arch.weight_sharding import WeightSharding
from narrows.arch.weights import Weight, embed_weights, head_weights, layer_weights
from narrows.cost.memory import weight_bytes
from narrows.layout import Mesh

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").is_file(), reason="memory is read from /proc, which only Linux has"
)

INDEX = "model.safetensors.index.json"
RANKS, RANK = 4, 1
MB = 1 << 20
SLACK = 8 * MB  # torch's own first allocations
LLAMA = {
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 64,
}
V3 = {
    "model_type": "deepseek_v3",
    "vocab_size": 4096,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "moe_intermediate_size": 1000,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 2,
    "q_lora_rank": 256,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "max_position_embeddings": 64,
}
FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}

LOAD = """
import sys, torch
torch.set_num_threads(1)
from narrows.arch.weight_sharding import WeightSharding
from narrows.engine.config import EngineConfig, resolve
from narrows.models.decoder import RankContext
from narrows.models.registry import build_model

model, tp, rank = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
resolved = resolve(EngineConfig(model=model, tp=tp, dtype="bfloat16", layout="all-reduce", kv_tokens=64))
source = resolved.weights()
rank_context = RankContext(
    mesh=resolved.mesh, rank=rank, sharding=resolved.sharding, dtype=resolved.dtype, device=torch.device("cpu"),
    num_slots=resolved.num_slots, num_positions=resolved.limits.max_context,
)
torch.zeros(64, 64, dtype=torch.bfloat16) @ torch.zeros(64, 64, dtype=torch.bfloat16)
print("ready" if resolved.sharding == WeightSharding() else resolved.sharding, flush=True)
sys.stdin.readline()
kept = build_model(resolved.config, source, rank_context)
print("done", flush=True)
sys.stdin.readline()
"""


def tensors_of(config: ModelConfig) -> dict[str, Weight]:
    """Every tensor of the model by name."""
    mesh, sharding = Mesh.of(dp=1, tp=1), WeightSharding()
    weights = [*embed_weights(config, mesh, sharding).values(), *head_weights(config, mesh).values()]
    for layer in range(config.num_hidden_layers):
        weights += layer_weights(config, mesh, sharding, layer).values()
    found = {}
    for weight in weights:
        for expert in range(*weight.experts[0]) if weight.experts else (0,):
            found[weight.name.replace("{expert}", str(expert))] = weight
    return found


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(1, 60, (prod(shape),), dtype=torch.uint8).view(shape).to(dtype)


def write_safetensors(folder: Path, raw: dict[str, object], num_files: int = 4) -> Path:
    """A checkpoint in several files, its linear weights in FP8 if the config says so."""
    (folder / "config.json").write_text(json.dumps(raw))
    is_fp8 = "quantization_config" in raw
    files: list[dict[str, torch.Tensor]] = [{} for _ in range(num_files)]
    for i, (name, weight) in enumerate(tensors_of(load_model_config(str(folder))).items()):
        quantised = is_fp8 and weight.quantized
        tensor = random_tensor(weight.shape, torch.float8_e4m3fn if quantised else torch.bfloat16)
        files[i % num_files][name] = tensor
        if quantised:
            files[i % num_files][f"{name}_scale_inv"] = torch.ones([-(-n // 128) for n in weight.shape])
    where = {}
    for i, tensors in enumerate(files):
        file = f"model-{i + 1:05}-of-{num_files:05}.safetensors"
        save_file(tensors, folder / file)
        where |= dict.fromkeys(tensors, file)
    (folder / INDEX).write_text(json.dumps({"weight_map": where}))
    return folder


def write_stacked(folder: Path, raw: dict[str, object]) -> Path:
    """The same in bfloat16, all experts of a layer in two tensors, as transformers 5 holds them."""
    write_safetensors(folder, raw)
    for file in sorted(folder.glob("*.safetensors")):
        tensors = {name: value for name, value in load_file(file).items() if ".experts." not in name}
        save_file(tensors, file)
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    where = {name: file for name, file in index.items() if ".experts." not in name}
    for block in sorted({name.split(".experts.")[0] for name in index.keys() - where.keys()}):
        num, rows, hidden = (raw[key] for key in ("n_routed_experts", "moe_intermediate_size", "hidden_size"))
        shapes = {
            f"{block}.experts.gate_up_proj": (num, 2 * rows, hidden),
            f"{block}.experts.down_proj": (num, hidden, rows),
        }
        file = f"{block}.safetensors"
        save_file({name: random_tensor(shape, torch.bfloat16) for name, shape in shapes.items()}, folder / file)
        where |= dict.fromkeys(shapes, file)
    (folder / INDEX).write_text(json.dumps({"weight_map": where}))
    return folder


def write_gguf(folder: Path, raw: dict[str, object]) -> Path:
    """The same kind of model in Q4_0."""
    (folder / "config.json").write_text(json.dumps(raw))
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "attn_output",
        **{f"self_attn.{letter}_proj": f"attn_{letter}" for letter in "qkv"},
        **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
    }
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    for key, field in (
        ("block_count", "num_hidden_layers"),
        ("context_length", "max_position_embeddings"),
        ("embedding_length", "hidden_size"),
        ("feed_forward_length", "intermediate_size"),
        ("attention.head_count", "num_attention_heads"),
        ("attention.head_count_kv", "num_key_value_heads"),
    ):
        writer.add_uint32(f"llama.{key}", raw[field])
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    rng = np.random.default_rng(0)
    for name, weight in tensors_of(load_model_config(str(folder))).items():
        stem = name.removesuffix(".weight")
        prefix = ""
        if stem.startswith("model.layers."):
            _, _, layer, stem = stem.split(".", 3)
            prefix = f"blk.{layer}."
        if len(weight.shape) == 1:
            data, kind = np.ones(weight.shape, np.float32), gguf.GGMLQuantizationType.F32
        else:
            blocks = rng.integers(0, 60, (weight.shape[0], weight.shape[1] // 32, 18), np.uint8)
            data, kind = blocks.reshape(weight.shape[0], -1), gguf.GGMLQuantizationType.Q4_0
        writer.add_tensor(f"{prefix}{names[stem]}.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "model.gguf"


def anonymous_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon in /proc/PID/status")


def peak_growth(model: Path) -> int:
    """Peak anonymous memory of loading as one rank of `RANKS`, above that before loading."""
    command = [sys.executable, "-c", LOAD, str(model), str(RANKS), str(RANK)]
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(MB // 8)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as child:
        assert child.stdin is not None and child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        before = peak = anonymous_bytes(child.pid)
        child.stdin.write("\n")
        child.stdin.flush()
        # A line that readline() had buffered would be missed, but nothing is printed before the load ends.
        while not _is_readable(child.stdout.fileno()) and child.poll() is None:
            peak = max(peak, anonymous_bytes(child.pid))
            time.sleep(0.001)
        assert child.stdout.readline() == "done\n"
        peak = max(peak, anonymous_bytes(child.pid))
        child.stdin.write("\n")
    return peak - before


def _is_readable(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


def bounds(model: Path) -> tuple[int, int, int]:
    """In bytes of bfloat16: the rank's share, the largest whole tensor, and the whole model."""
    config = load_model_config(str(model))
    shares = [
        weight_bytes(config, Mesh.of(dp=1, tp=tp), WeightSharding(), "bf16", rank)
        for tp, rank in ((RANKS, RANK), (1, 0))
    ]
    return shares[0], max(2 * prod(weight.shape) for weight in tensors_of(config).values()), shares[1]


FORMATS = {
    # how to write it, and which part of a rank's share is anonymous at least: rows of plain tensors stay in the file
    "bfloat16": (lambda folder: write_safetensors(folder, LLAMA), 0.3),
    "fp8": (lambda folder: write_safetensors(folder, LLAMA | FP8), 0.7),
    "fp8 experts": (lambda folder: write_safetensors(folder, V3 | FP8), 0.7),
    "stacked experts": (lambda folder: write_stacked(folder, V3), 0.3),
    "gguf": (lambda folder: write_gguf(folder, LLAMA), 0.9),
}


@pytest.mark.parametrize(
    ("write", "least"),
    [pytest.param(*how, marks=[pytest.mark.full] * (name == "fp8")) for name, how in FORMATS.items()],
    ids=FORMATS,
)
def test_a_rank_holds_its_share_and_one_tensor_at_most(tmp_path: Path, write, least: float) -> None:
    model = write(tmp_path)
    share, largest, whole = bounds(model)
    limit = share + largest + SLACK
    assert limit < 0.6 * whole, "this model is too small for the test to mean anything"
    peak = peak_growth(model)
    print(f"share {share / MB:.0f} MB, largest tensor {largest / MB:.0f}, whole {whole / MB:.0f}; peak {peak / MB:.0f}")
    assert peak < limit, f"peak {peak / MB:.0f} MB; allowed {limit / MB:.0f} of the whole {whole / MB:.0f}"
    assert peak > least * share, f"peak {peak / MB:.0f} MB cannot be: the share is {share / MB:.0f}"
    for file in model.parent.iterdir() if model.is_file() else model.iterdir():
        file.unlink()  # pytest keeps temporary folders of the last runs
