"""Makes a checkpoint folder with random weights that narrows and its peers all load: dsv3-mini, or dsv2-mini.

    python benchmarks/make_mini.py FOLDER [--model dsv3-mini] [--seed 0]

bfloat16, normal with a standard deviation of 0.02, norms 1; the same bytes for the same seed. The tokenizer has one
word per id (``w17`` is 17), so that every peer can write down whatever comes out.
"""

from __future__ import annotations

import argparse
import json
import zlib
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from narrows.arch.config import read_config
from narrows.arch.presets import PRESETS
from narrows.arch.weight_sharding import WeightSharding
from narrows.arch.weights import Weight, embed_weights, head_weights, layer_weights
from narrows.errors import NarrowsError
from narrows.layout import Mesh

MODELS = ("dsv3-mini", "dsv2-mini")
STD = 0.02
BOS, EOS = 0, 1


def config_json(model: str) -> dict[str, object]:
    """The preset as transformers writes it."""
    raw = dict(PRESETS[model])
    version = 3 if raw["model_type"] == "deepseek_v3" else 2
    return raw | {
        "architectures": [f"DeepseekV{version}ForCausalLM"],
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "attention_bias": False,
        "initializer_range": STD,
        "tie_word_embeddings": False,
        "moe_layer_freq": 1,
        "norm_topk_prob": raw.get("norm_topk_prob", False),
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }


def tensors(folder: Path, seed: int) -> dict[str, torch.Tensor]:
    """Every tensor of the checkpoint by name."""
    config, mesh, sharding = read_config(folder), Mesh.of(dp=1, tp=1), WeightSharding()
    weights = [*embed_weights(config, mesh, sharding).values(), *head_weights(config, mesh).values()]
    for layer in range(config.num_hidden_layers):
        weights += layer_weights(config, mesh, sharding, layer).values()
    out = {}
    for weight in weights:
        for name in _names(weight):
            out[name] = _values(name, weight.shape, seed)
    return out


def _names(weight: Weight) -> list[str]:
    if not weight.experts:
        return [weight.name]
    return [weight.name.replace("{expert}", str(expert)) for expert in range(*weight.experts[0])]


def _values(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    if name.endswith("e_score_correction_bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode(), seed))
    return (STD * torch.randn(shape, generator=generator)).to(torch.bfloat16)


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w2"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.decoder = Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": f"w{BOS}", "eos_token": f"w{EOS}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said), encoding="utf-8")


def make(folder: Path, model: str, seed: int = 0) -> Path:
    """The folder, made unless it is there: config.json is written last."""
    if (folder / "config.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    said = config_json(model)
    part = folder / "part"
    part.mkdir(exist_ok=True)
    (part / "config.json").write_text(json.dumps(said, indent=1), encoding="utf-8")
    save_file(tensors(part, seed), folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder, int(str(said["vocab_size"])))
    (part / "config.json").rename(folder / "config.json")
    part.rmdir()
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--model", choices=MODELS, default=MODELS[0])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        print(make(args.folder, args.model, args.seed))
    except (NarrowsError, OSError) as error:
        raise SystemExit(f"make_mini: {error}") from None


if __name__ == "__main__":
    main()
