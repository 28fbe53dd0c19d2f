"""Writes a GGUF file of random weights in the mix of Q4_K_M, for narrows and llama.cpp to read.

    python benchmarks/peers/random_gguf.py llama-1b FILE        # 1.1 billion parameters, 0.68 GB
    python benchmarks/peers/random_gguf.py dsv3-mini FILE       # as in make_mini.py: latent attention, experts

Q4_K, but Q6_K for the output and for the values and down projections of layers in which llama.cpp takes more bits, and
Q8_0 for rows that are no whole blocks of 256. Blocks are random bits under random scales, since only llama.cpp can
round to Q4_K. No tokenizer is written: works are token ids.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from to_gguf import write as write_bf16

sys.path.insert(0, str(Path(__file__).parent.parent))

from make_mini import MODELS, make

STD = 0.02
LAYERS, HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 16, 2048, 8192, 32, 8, 64, 32000


def write_llama(file: Path) -> None:
    """The shape of Llama 3.2 1B, with a head of its own and 32,000 tokens."""
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(4096)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(500000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("none")
    add = Weights(writer, LAYERS)
    add.product("token_embd.weight", (VOCAB, HIDDEN))
    for layer in range(LAYERS):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", np.ones(HIDDEN, np.float32))
        for name, shape in (
            ("attn_q", (HEADS * HEAD_DIM, HIDDEN)),
            ("attn_k", (KV_HEADS * HEAD_DIM, HIDDEN)),
            ("attn_v", (KV_HEADS * HEAD_DIM, HIDDEN)),
            ("attn_output", (HIDDEN, HEADS * HEAD_DIM)),
            ("ffn_gate", (FFN, HIDDEN)),
            ("ffn_up", (FFN, HIDDEN)),
            ("ffn_down", (HIDDEN, FFN)),
        ):
            add.product(f"blk.{layer}.{name}.weight", shape)
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    add.product("output.weight", (VOCAB, HIDDEN))
    _finish(writer)


def write_like(model: str, file: Path) -> None:
    """The tensors of a checkpoint of ``make_mini.py``, those of products as random blocks."""
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "bf16.gguf"
        write_bf16(make(Path(folder) / model, model), whole)
        reader = gguf.GGUFReader(whole)
        writer = gguf.GGUFWriter(str(file), "deepseek2")
        for key, field in reader.fields.items():
            if not key.startswith(("GGUF.", "general.")):
                writer.add_key_value(key, field.contents(), field.types[0])
        add = Weights(writer, reader.fields["deepseek2.block_count"].contents())
        for tensor in reader.tensors:
            if tensor.tensor_type == Kind.BF16:
                add.product(tensor.name, tuple(int(size) for size in reversed(tensor.shape)))
            else:
                writer.add_tensor(tensor.name, np.array(tensor.data))
        _finish(writer)


class Weights:
    """Adds random weights of products to ``writer``, in a model of ``num_layers``."""

    def __init__(self, writer: gguf.GGUFWriter, num_layers: int) -> None:
        self._writer, self._num_layers = writer, num_layers
        self._random = np.random.default_rng(0)

    def product(self, name: str, shape: tuple[int, ...]) -> None:
        kind = self._kind(name, shape)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        blocks = self._random.integers(0, 256, (int(np.prod(shape)) // block, size), np.uint8)
        SCALES[kind](blocks, self._random)
        self._writer.add_tensor(name, blocks.reshape(*shape[:-1], shape[-1] // block * size), raw_dtype=kind)

    def _kind(self, name: str, shape: tuple[int, ...]) -> Kind:
        """As llama.cpp chooses for Q4_K_M."""
        if shape[-1] % 256:
            return Kind.Q8_0
        if name == "output.weight":
            return Kind.Q6_K
        if "attn_v" in name or "ffn_down" in name:
            layer, eighth = int(name.split(".")[1]), self._num_layers // 8
            if layer < eighth or layer >= 7 * eighth or (layer - eighth) % 3 == 2:
                return Kind.Q6_K
        return Kind.Q4_K


def _set(blocks: np.ndarray, at: int, values: np.ndarray) -> None:
    blocks[:, at : at + 2] = values.astype(np.float16).view(np.uint8).reshape(-1, 2)


def _signs(blocks: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A scale's size for each block, times a random sign."""
    return random.uniform(0.5, 1.5, len(blocks)) * random.choice((-1.0, 1.0), len(blocks))


def _q4_k(blocks: np.ndarray, random: np.random.Generator) -> None:
    """A scale is d times 0 to 63, a value 0 to 15; the minimum is the same times dmin, so 7.5 d centres it."""
    sizes = random.uniform(0.5, 1.5, len(blocks)) * STD / 160
    _set(blocks, 0, sizes)
    _set(blocks, 2, 7.5 * sizes)


def _q6_k(blocks: np.ndarray, random: np.random.Generator) -> None:
    """A scale is d times -128 to 127, a value -32 to 31."""
    _set(blocks, 208, _signs(blocks, random) * STD / 1370)


def _q8_0(blocks: np.ndarray, random: np.random.Generator) -> None:
    """A value is d times -128 to 127."""
    _set(blocks, 0, _signs(blocks, random) * STD / 74)


SCALES: dict[Kind, Callable[[np.ndarray, np.random.Generator], None]] = {
    Kind.Q4_K: _q4_k,
    Kind.Q6_K: _q6_k,
    Kind.Q8_0: _q8_0,
}


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("llama-1b", *MODELS):
        raise SystemExit(__doc__)
    if sys.argv[1] == "llama-1b":
        write_llama(Path(sys.argv[2]))
    else:
        write_like(sys.argv[1], Path(sys.argv[2]))
