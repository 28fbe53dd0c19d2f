"""Each family's schema beside its class in transformers: fields, defaults, and the configs of other classes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from typing import Any

import pytest
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from narrows.arch.config import CONFIG_SCHEMAS, read_config
from narrows.arch.configs.harmless import HARMLESS
from narrows.arch.configs.rope import ROPE_TYPES
from narrows.arch.configs.schema import ELSEWHERE, EVERYWHERE, Schema
from narrows.errors import ConfigError

PUBLISHED = [name for name in CONFIG_SCHEMAS if name in CONFIG_MAPPING]
OTHER_DEFAULTS = {
    "bos_token_id": "a token id is its tokenizer's; narrows takes none that no file names",
    "eos_token_id": "a token id is its tokenizer's; narrows takes none that no file names",
    "num_nextn_predict_layers": "counts layers to skip, and says so: none where the file names none",
}
SIZES = {
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"),
    *("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    *("n_routed_experts", "num_experts", "num_experts_per_tok", "moe_intermediate_size"),
}
"""Fields that a file must have."""
ALIKE = {
    *(
        "arcee",
        "bitnet",
        "ernie4_5",
        "gemma",
        "granite",
        "helium",
        "hunyuan_v1_dense",
        "internlm3",
        "olmo",
        "olmo2",
        "phi3",
        "seed_oss",
    ),
    "iquestcoder",
}
"""Other architectures whose default config has no distinguishing field except ``architectures``.

transformers itself loads two of them as a Llama."""
NEEDED = {  # without which the class's own default model computes nothing
    "deepseek_v2": {"num_experts_per_tok": 6},
    "glm4_moe": {"head_dim": 128},
}


def fields_of(name: str) -> dict[str, Any]:
    """The fields of the class and their defaults, those of every config left out; names as files have them."""
    cls, common = CONFIG_MAPPING[name], {field.name for field in dataclasses.fields(PreTrainedConfig)}
    return {field.name: field.default for field in dataclasses.fields(cls) if field.name not in common}


def own_name(schema: type[Schema], field: str) -> str:
    return schema.aliases.get(field, field)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_field_of_the_class_is_read_refused_or_harmless(name: str) -> None:
    schema = CONFIG_SCHEMAS[name]
    known = {*schema.model_fields, *schema.only, *schema.harmless, *HARMLESS, *EVERYWHERE, *ELSEWHERE}
    assert {own_name(schema, field) for field in fields_of(name)} - known == set()


def test_every_field_of_all_classes_is_read_refused_or_harmless() -> None:
    common = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    assert common - {*HARMLESS, *EVERYWHERE, *ELSEWHERE} == set()


@pytest.mark.parametrize("name", PUBLISHED)
def test_defaults_are_those_of_the_class(name: str) -> None:
    schema, published = CONFIG_SCHEMAS[name], fields_of(name)
    ours = schema.defaults()
    assert SIZES & ours.keys() <= {"intermediate_size"}
    for field, default in published.items():
        own = own_name(schema, field)
        if own in ours and own not in OTHER_DEFAULTS and own != "intermediate_size":
            assert ours[own] == default, f"{name}.{field} is {default} in transformers"


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_saved_config_reads_back(name: str) -> None:
    """The class's own default model, through the file that transformers writes."""
    theirs = CONFIG_MAPPING[name](**NEEDED.get(name, {}))
    saved = json.loads(theirs.to_json_string(use_diff=True))
    ours = read_config(saved, name)
    for field in ("hidden_size", "num_hidden_layers", "vocab_size", "rms_norm_eps", "max_position_embeddings"):
        assert getattr(ours, field) == getattr(theirs, field)
    assert ours.rope.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.rope.partial_rotary_factor == theirs.rope_parameters.get("partial_rotary_factor", 1.0)
    assert not [note for note in ours.notes if "does not know" in note]


def other_configs() -> dict[str, dict[str, Any]]:
    """The default config of every other class with a language model."""
    others = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - CONFIG_SCHEMAS.keys() - {"gemma4_assistant"}  # has no default
    return {other: json.loads(CONFIG_MAPPING[other]().to_json_string(use_diff=False)) for other in sorted(others)}


def accepting(raw: dict[str, Any]) -> list[str]:
    """The families as which ``raw`` is read."""
    found = []
    for name in CONFIG_SCHEMAS:
        with contextlib.suppress(ConfigError):
            read_config({**raw, "model_type": name}, name)
            found.append(name)
    return found


def test_foreign_architectures_under_supported_names_are_refused() -> None:
    """A file whose model_type was edited, by its fields alone."""
    assert {other for other, raw in other_configs().items() if accepting({**raw, "architectures": None})} == ALIKE


def test_the_architectures_field_rules_out_the_rest() -> None:
    for other in ALIKE - {"internlm3", "iquestcoder"}:
        raw = json.loads(CONFIG_MAPPING[other]().to_json_string(use_diff=False))
        assert accepting({**raw, "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[other]]}) == []


def test_the_known_rope_types_equal_transformers() -> None:

    assert set(ROPE_INIT_FUNCTIONS) - {"proportional"} == set(ROPE_TYPES)  # proportional: Gemma 4's
