"""Tiny models for the tests of this folder: a config.json and seeded weights, written once per session."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from narrows.arch.config import ModelConfig, read_config
from narrows.arch.weight_sharding import WeightSharding
from narrows.arch.weights import Weight, embed_weights, head_weights, layer_weights
from narrows.comm import Communicator
from narrows.engine.config import Resolved
from narrows.layout import Mesh
from narrows.weights.dummy import DummyWeights
from narrows.weights.source import WeightSource

sys.path.insert(0, str(Path(__file__).parent))
"""Folder of the modules that several test files share."""

_COMMON = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "max_position_embeddings": 2048,
    "dtype": "float32",
}
_DEEPSEEK = _COMMON | {
    "q_lora_rank": 20,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "moe_intermediate_size": 16,
    "n_routed_experts": 16,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "v3": _DEEPSEEK
    | {"model_type": "deepseek_v3", "n_shared_experts": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.0},
    "v2": _DEEPSEEK
    | {"model_type": "deepseek_v2", "n_shared_experts": 2, "topk_method": "group_limited_greedy"},
    "v2-lite": _DEEPSEEK
    | {"model_type": "deepseek_v2", "n_shared_experts": 2, "q_lora_rank": None, "n_group": 1, "topk_group": 1},
    "llama": _COMMON | {"model_type": "llama", "num_key_value_heads": 4, "head_dim": 8, "tie_word_embeddings": True},
    # heads that divide nothing, and every bias
    "llama-9": _COMMON
    | {
        "model_type": "llama",
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 4,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "qwen2": _COMMON | {"model_type": "qwen2", "num_key_value_heads": 2},
    "qwen3": _COMMON | {"model_type": "qwen3", "num_key_value_heads": 4, "head_dim": 12},
    "qwen3-moe": _COMMON
    | {
        "model_type": "qwen3_moe",
        "num_key_value_heads": 4,
        "head_dim": 12,
        "moe_intermediate_size": 16,
        "num_experts": 16,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
    },
}  # fmt: skip

TinyModel = Callable[..., Path]


def all_weights(config: ModelConfig, mesh: Mesh, sharding: WeightSharding) -> list[Weight]:
    """Every tensor of a checkpoint, with the slices that the ranks of ``mesh`` take of it."""
    weights = [*embed_weights(config, mesh, sharding).values(), *head_weights(config, mesh).values()]
    for layer in range(config.num_hidden_layers):
        weights += layer_weights(config, mesh, sharding, layer).values()
    return weights


def seeded_tensors(config: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """The whole tensors of a checkpoint by name: those of DummyWeights, an expert at a time."""
    source = DummyWeights(seed=seed, dtype=torch.float32)
    tensors: dict[str, torch.Tensor] = {}
    for weight in all_weights(config, Mesh.of(dp=1, tp=1), WeightSharding()):
        for expert in range(*weight.experts[0]) if weight.experts else (None,):
            name = weight.name if expert is None else weight.name.replace("{expert}", str(expert))
            tensors[name] = source.take(weight, None, expert)
    return tensors


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """``tiny_model(kind, **changes)``: the folder of a tiny model, with ``changes`` to its config.json.

    Kinds: those of CONFIGS. Weights are float32; do not write into the folder, other tests read it.
    """
    made: dict[str, Path] = {}

    def make(kind: str, **changes: Any) -> Path:
        raw = CONFIGS[kind] | changes
        key = json.dumps([kind, raw], sort_keys=True)
        if key not in made:
            folder = tmp_path_factory.mktemp(kind)
            (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
            save_file(seeded_tensors(read_config(folder)), folder / "model.safetensors")
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def evaluated_model(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose tokens are bytes, with a chat template and the files of all four tasks of `eval`."""
    folder = tmp_path_factory.mktemp("evaluated")
    for file in tiny_model("v3", vocab_size=264, max_position_embeddings=256).iterdir():
        os.link(file, folder / file.name)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<s>", "</s>", "<u>", "<a>", *alphabet]
    backend = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(names[:4])
    backend.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}<u>{{ m['content'] }}<a>{% endfor %}"
    config = {"eos_token": "</s>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    eval_folder = folder / "eval"
    eval_folder.mkdir()
    text = "In the beginning there was a narrow road, and it went where the valley was narrowest. "
    (eval_folder / "heldout.txt").write_text(text * 8, encoding="utf-8")
    sums = [{"question": f"{a} + {a + 1} =", "answer": 2 * a + 1, "kind": f"kind {a % 2}"} for a in range(8)]
    choices = [
        {"ctx": f"After {a} comes", "endings": [str(a + 1), "ten more", "x"], "label": str(a % 3)} for a in range(6)
    ]
    stories = [{"question": f"Two and {a}?", "answer": f"So\n#### {a + 2}"} for a in range(6)]
    for name, items in (("arithmetic", sums), ("choices", choices), ("gsm8k", stories)):
        text = "".join(json.dumps(item) + "\n" for item in items)
        (eval_folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


class Faults:
    """Errors planted in meshes of several rank threads; one rank, which they are compared with, stays as it is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def scale(self, name: str, rank: int, factor: float = 1.01) -> None:
        """One rank's copy of a weight is multiplied by ``factor``."""
        true_weights = Resolved.weights

        def weights(resolved: Resolved) -> WeightSource:
            source = true_weights(resolved)
            return _Scaled(source, name, rank, factor) if resolved.mesh.size > 1 else source

        self._monkeypatch.setattr(Resolved, "weights", weights)

    def leave_out_sum(self, where: str) -> None:
        """Every rank keeps its own addend in the all-reduce whose label begins with ``where``."""
        true_sum = Communicator.all_reduce

        def all_reduce(comm: Communicator, x: Tensor, ranks: tuple[int, ...], *rest: Any, **more: Any) -> Tensor:
            out = true_sum(comm, x.clone(), ranks, *rest, **more)
            label = next(item for item in (*rest, *more.values()) if isinstance(item, str))
            return x if label.startswith(where) else out

        self._monkeypatch.setattr(Communicator, "all_reduce", all_reduce)


class _Scaled:
    def __init__(self, source: WeightSource, name: str, rank: int, factor: float) -> None:
        self._source, self._name, self._rank, self._factor = source, name, rank, factor

    def take(self, weight: Weight, span: tuple[int, int] | None, expert: int | None = None) -> Tensor:
        tensor = self._source.take(weight, span, expert)
        here = threading.current_thread().name == f"narrows rank {self._rank}"
        return tensor * self._factor if here and weight.name == self._name else tensor


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Faults:
    """Where a test plants an error that must be seen."""
    return Faults(monkeypatch)
