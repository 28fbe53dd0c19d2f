"""Every key of GGUF's metadata is obeyed, passed by for a reason, or refused by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import gguf_lab as lab
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoModelForCausalLM, LlamaConfig

from narrows.arch.presets import load_model_config
from narrows.convert import gguf_keys
from narrows.convert.gguf_config import gguf_config
from narrows.convert.gguf_header import GgufHeader
from narrows.engine.model_text import load_model_text
from narrows.errors import CheckpointError, ConfigError
from narrows.ops.rope import rope_inverse_frequencies

torch.set_num_threads(1)


# -- the tables -------------------------------------------------------------------------------------------------------


def keys_of(space: type) -> Iterator[str]:
    """Every key that the gguf package names, classes within classes too."""
    for name, value in vars(space).items():
        if isinstance(value, str) and not name.startswith("_"):
            yield value
        elif isinstance(value, type):
            yield from keys_of(value)


def test_every_key_that_the_gguf_package_knows_is_in_a_table() -> None:
    """When this fails after an update of gguf: find out what the new key does to the numbers, and give it a table."""
    decided = (
        gguf_keys.OBEYED
        | gguf_keys.HARMLESS.keys()
        | gguf_keys.NEUTRAL.keys()
        | gguf_keys.REFUSED
        | frozenset().union(*gguf_keys.OBEYED_BY.values())
    )
    known = {key.removeprefix("{arch}.") for key in keys_of(gguf.Keys) if key.startswith("{arch}.")}
    assert len(known) > 100
    assert known - decided == set()
    tokenizer = {key.removeprefix("tokenizer.ggml.") for key in keys_of(gguf.Keys) if key.startswith("tokenizer.ggml.")}
    of_tokenizer = gguf_keys.TOKENIZER_OBEYED | gguf_keys.TOKENIZER_HARMLESS | gguf_keys.TOKENIZER_NEUTRAL.keys()
    assert tokenizer - of_tokenizer == set()


def test_no_key_is_in_two_tables() -> None:
    tables = (gguf_keys.OBEYED, gguf_keys.HARMLESS.keys(), gguf_keys.NEUTRAL.keys(), gguf_keys.REFUSED)
    assert sum(map(len, tables)) == len(frozenset().union(*tables))


SMALL = LlamaConfig(
    **lab.COMMON | {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2},
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
)


@pytest.fixture(scope="module")
def model() -> Any:
    return lab.model_of(SMALL)


def write(path: Path, model: Any, **metadata: Any) -> str:
    """A file with these keys, ``__`` for a dot."""
    return str(lab.write_model(path, model, metadata={key.replace("__", "."): v for key, v in metadata.items()}))


@pytest.mark.parametrize("key", sorted(gguf_keys.NEUTRAL))
def test_a_key_is_accepted_only_at_its_neutral_value(tmp_path: Path, model: Any, key: str) -> None:
    expected = load_model_config(write(tmp_path / "m.gguf", model))
    for value in gguf_keys.NEUTRAL[key]:
        assert load_model_config(write(tmp_path / "m.gguf", model, **{key: value})) == expected
    with pytest.raises(ConfigError, match=rf"llama\.{key} is 7, which narrows does not obey .*; supported: "):
        load_model_config(write(tmp_path / "m.gguf", model, **{key: 7}))
    with pytest.raises(ConfigError, match=rf"llama\.{key} is nan, which narrows does not obey"):
        load_model_config(write(tmp_path / "m.gguf", model, **{key: float("nan")}))


@pytest.mark.parametrize("key", [*sorted(gguf_keys.REFUSED), "a_key_of_the_future", "attention.new"])
def test_other_architectures_and_unknown_keys_are_refused(tmp_path: Path, model: Any, key: str) -> None:
    with pytest.raises(ConfigError, match="which narrows does not obey for the architecture 'llama'; supported: files"):
        load_model_config(write(tmp_path / "m.gguf", model, **{key: 0}))


def test_records_and_other_tools_keys_change_nothing(tmp_path: Path, model: Any) -> None:
    expected = load_model_config(write(tmp_path / "m.gguf", model))
    records = {
        "general.name": "x",
        "general.file_type": 7,
        "general.type": "model",
        "general.quantization_version": 2,
        "general.whatever": [1, 2],
        "rope.scaling.finetuned": True,
        "pooling_type": 3,
        "tokenizer.ggml.fim_pre_token_id": 5,
        "tokenizer.huggingface.json": "{}",
    }
    assert load_model_config(write(tmp_path / "m.gguf", model, **records)) == expected
    path = lab.write_model(tmp_path / "q.gguf", model)
    fields = {"quantize.imatrix.entries_count": 3, "llama3.expert_count": 9, "mradermacher.quantized_by": "x"}
    lab.write_file(path, "llama", {**GgufHeader(path).metadata, **fields, "general.architecture": None}, held(path))
    assert load_model_config(str(path)).num_hidden_layers == 1


def held(path: Path) -> dict[str, tuple[np.ndarray, Kind]]:
    """The tensors of a file, read by the gguf package."""
    return {t.name: (np.array(t.data), t.tensor_type) for t in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("general.type", "adapter", "holds no model: its general.type is 'adapter'"),
        ("general.type", "mmproj", "holds no model: its general.type is 'mmproj'"),
        ("general.quantization_version", 1, "is quantised by ggml's version 1; supported: 2"),
        ("tokenizer.ggml.add_sep_token", True, "add_sep_token is True, which narrows does not obey"),
        ("tokenizer.ggml.remove_extra_whitespaces", True, "remove_extra_whitespaces is True, which narrows"),
        ("tokenizer.ggml.precompiled_charsmap", [1, 2, 3], "precompiled_charsmap is .1, 2, 3., which narrows"),
        ("tokenizer.ggml.suppress_tokens", [5], "suppress_tokens is .5., which narrows does not obey"),
        ("tokenizer.ggml.of_the_future", 1, "of_the_future is 1, which narrows does not obey"),
        ("attention.sliding_window", 64, "sliding_window is 64; narrows attends to the whole context"),
        ("rope.scaling.type", "longrope", "rope.scaling.type is 'longrope'; supported: 'none', 'linear', 'yarn'"),
        ("rope.scaling.attn_factor", 2.0, "attn_factor is 2.0; supported: 1, or none"),
        ("rope.scaling.yarn_ext_factor", 1.0, "yarn_ext_factor is 1.0; supported: 0 or -1, or none"),
        ("rope.dimension_count", 8, "rope.dimension_count 8 but heads of 16"),
        ("attention.value_length", 8, "attention.value_length 8 but heads of 16"),
    ],
)
def test_values_that_narrows_cannot_obey(tmp_path: Path, model: Any, key: str, value: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        load_model_config(write(tmp_path / "m.gguf", model, **{key: value}))
    assert not isinstance(caught.value, CheckpointError) and "\n" not in str(caught.value)


COUNTS = (
    "block_count",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "context_length",
)
NUMBERS = ("rope.freq_base", "attention.layer_norm_rms_epsilon")


@pytest.mark.parametrize("key", COUNTS)
def test_impossible_counts_are_a_one_line_error(tmp_path: Path, model: Any, key: str) -> None:
    for value in (float("nan"), 3.5, -1.0, 0, 1 << 31, "8", True, ["a"], [3.5], [0, 0]):
        with pytest.raises(CheckpointError, match=rf"llama\.{key} is .*(one int is needed|at least 1)") as caught:
            load_model_config(write(tmp_path / "m.gguf", model, **{key: value}))
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    if key != "context_length":  # which is in no tensor's shape
        with pytest.raises(ConfigError, match=r"2147483647|4398046507008|68719476704"):
            load_model_config(write(tmp_path / "m.gguf", model, **{key: (1 << 31) - 1}))


@pytest.mark.parametrize("key", NUMBERS)
def test_impossible_numbers_are_a_one_line_error(tmp_path: Path, model: Any, key: str) -> None:
    for value in (float("nan"), float("inf"), 0.0, -1.0, "8", True, [1.0]):
        with pytest.raises(CheckpointError, match=rf"llama\.{key} is .*(needed|above 0)"):
            load_model_config(write(tmp_path / "m.gguf", model, **{key: value}))


@pytest.mark.parametrize("key", [*COUNTS[:4], "context_length", "attention.layer_norm_rms_epsilon"])
def test_fields_that_llama_cpp_needs_are_needed(tmp_path: Path, model: Any, key: str) -> None:
    with pytest.raises(CheckpointError, match=rf"has no llama\.{key}, which is needed"):
        load_model_config(write(tmp_path / "m.gguf", model, **{key: None}))


def test_defaults_are_llama_cpps(tmp_path: Path, model: Any) -> None:
    full = load_model_config(write(tmp_path / "m.gguf", model))
    absent = ("rope.freq_base", "rope.dimension_count", "attention.key_length", "attention.value_length", "vocab_size")
    assert load_model_config(write(tmp_path / "m.gguf", model, **dict.fromkeys(absent))) == full


def test_one_number_for_all_layers_may_be_a_list(tmp_path: Path, model: Any) -> None:
    full = load_model_config(write(tmp_path / "m.gguf", model))
    lists: Mapping[str, Any] = {"attention.head_count": [2, 2], "feed_forward_length": [32]}
    assert load_model_config(write(tmp_path / "m.gguf", model, **lists)) == full
    with pytest.raises(ConfigError, match=r"feed_forward_length differs by layer \(\[32, 64\]\)"):
        load_model_config(write(tmp_path / "m.gguf", model, feed_forward_length=[32, 64]))


def test_a_window_that_never_slides(tmp_path: Path, model: Any) -> None:
    full = load_model_config(write(tmp_path / "m.gguf", model))
    assert load_model_config(write(tmp_path / "m.gguf", model, attention__sliding_window=128)) == full


# -- rotary scaling ---------------------------------------------------------------------------------------------------


def frequencies(path: str) -> tuple[torch.Tensor, float]:
    config = load_model_config(path)
    return rope_inverse_frequencies(
        16, config.rope.rope_theta, scaling=config.rope.as_mapping(), max_position=config.max_position_embeddings
    )


def expected(**parameters: Any) -> tuple[torch.Tensor, float]:
    """transformers' frequencies of the same model."""
    raw = SMALL.to_dict() | {"rope_parameters": {"rope_theta": 10000.0} | parameters}
    rotary = AutoModelForCausalLM.from_config(LlamaConfig(**raw)).model.rotary_emb
    return rotary.inv_freq, rotary.attention_scaling


YARN = {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0}


@pytest.mark.parametrize(
    ("metadata", "parameters"),
    [
        ({"rope__scaling__type": "linear", "rope__scaling__factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope__scaling__factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope__scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope__scaling__type": "none", "rope__scaling__factor": 4.0}, {"rope_type": "default"}),
        ({"rope__scaling__type": "linear", "rope__scaling__factor": 0.0}, {"rope_type": "default"}),
        (
            YARN | {"rope__scaling__original_context_length": 32},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        ),
        (YARN, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}),
        (
            YARN | {"rope__scaling__yarn_beta_fast": 16.0, "rope__scaling__yarn_beta_slow": 2.0},
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
            },
        ),
        (
            YARN | {"rope__scaling__attn_factor": 0.5},
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "attention_factor": 0.5 * (0.1 * np.log(4.0) + 1),
            },
        ),
    ],
)
def test_rotary_scaling_is_transformers(tmp_path: Path, model: Any, metadata: Any, parameters: Any) -> None:
    got, factor = frequencies(write(tmp_path / "m.gguf", model, **metadata))
    want, scaling = expected(**parameters)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    assert factor == pytest.approx(scaling)


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ({"rope__scaling__yarn_attn_factor": 2.0}, "yarn_attn_factor is 2.0; llama.cpp computes .* = 1.13863"),
        ({"rope__scaling__yarn_ext_factor": 0.5}, "yarn_ext_factor is 0.5; supported: 1 or -1, or none"),
        ({"rope__scaling__yarn_log_multiplier": 0.1}, "yarn_log_multiplier is 0.1.*; supported outside deepseek2: 0"),
        ({"rope__scaling__factor": -4.0}, "factor is -4.0; it must be above 0"),
        ({"rope__scaling__factor": float("nan")}, "rope.scaling.factor is nan, where a finite number is needed"),
        ({"rope__scaling__yarn_beta_fast": -1.0}, "yarn_beta_fast is -1; it must be above 0"),
        ({"rope__scaling__original_context_length": 0}, "original_context_length is 0; it must be at least 1"),
    ],
)
def test_yarn_that_narrows_cannot_obey(tmp_path: Path, model: Any, metadata: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        load_model_config(write(tmp_path / "m.gguf", model, **YARN | metadata))


def test_deepseeks_yarn_needs_its_multiplier(tmp_path: Path) -> None:
    model = lab.model_of(lab.configs()["deepseek v2"])
    for metadata, problem in (
        ({"rope.scaling.yarn_log_multiplier": None}, "by YaRN without deepseek2.rope.scaling.yarn_log_multiplier"),
        ({"rope.scaling.type": "linear"}, "supported for deepseek2: YaRN"),
        ({"rope.scaling.attn_factor": 2.0}, "attn_factor is 2.0; supported: 1"),
    ):
        with pytest.raises(ConfigError, match=problem):
            gguf_config(GgufHeader(lab.write_model(tmp_path / "m.gguf", model, metadata=metadata)))


# -- recommendations --------------------------------------------------------------------------------------------------


def test_unsupported_sampling_settings_are_noted(tmp_path: Path, model: Any) -> None:
    sampling = {"general.sampling.mirostat": 2, "general.sampling.mirostat_tau": 5.0, "general.sampling.temp": 0.5}
    path = write(tmp_path / "m.gguf", model, **sampling)
    (note,) = load_model_config(path).notes
    assert note == "the file recommends sampling that narrows does not have, left out: mirostat 2"
    assert load_model_text(path).generation.temperature == 0.5
    quiet = {"general.sampling.mirostat": 0, "general.sampling.mirostat_tau": 5.0}
    assert load_model_config(write(tmp_path / "q.gguf", model, **quiet)).notes == ()
