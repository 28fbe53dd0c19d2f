"""Sampling settings of a checkpoint: read unchanged, and refused where they are impossible."""

import json

import pytest

from narrows.errors import CheckpointError
from narrows.text import GenerationConfig
from narrows.text.generation_config import parse_generation_config, read_generation_config


def write(folder, generation=None, config=None):
    for name, content in (("generation_config.json", generation), ("config.json", config)):
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    return folder


def test_all_fields(tmp_path):
    raw = {
        "bos_token_id": 1,
        "eos_token_id": [7, 3, 7],
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 1,
        "min_p": 0,
        "repetition_penalty": 1.05,
        "transformers_version": "5.0.0",
    }
    found = read_generation_config(write(tmp_path, raw))
    assert found == GenerationConfig(
        eos_token_id=(7, 3),
        do_sample=True,
        temperature=0.6,
        top_k=20,
        top_p=1.0,
        min_p=0.0,
        repetition_penalty=1.05,
    )
    assert isinstance(found.top_p, float) and isinstance(found.top_k, int)


def test_missing_and_null_fields_give_the_defaults(tmp_path):
    assert read_generation_config(tmp_path) == GenerationConfig()
    nulls = dict.fromkeys(("eos_token_id", "temperature", "top_k", "top_p", "do_sample"))
    assert read_generation_config(write(tmp_path, nulls)) == GenerationConfig()


def test_ends_of_text_come_from_both_files(tmp_path):
    assert read_generation_config(write(tmp_path, {"eos_token_id": 2}, {"eos_token_id": [5, 2]})).eos_token_id == (2, 5)
    assert read_generation_config(write(tmp_path, {}, {"text_config": {"eos_token_id": 9}})).eos_token_id == (9,)


def test_top_k_0_and_minus_1_mean_no_limit():
    assert parse_generation_config({"top_k": -1}, "x").top_k == 0
    assert parse_generation_config({"top_k": 0}, "x").top_k == 0


WRONG = [
    ("eos_token_id", "2"),
    ("eos_token_id", [2, -1]),
    ("eos_token_id", True),
    ("do_sample", 1),
    ("temperature", -0.1),
    ("temperature", "hot"),
    ("temperature", True),
    ("temperature", float("nan")),
    ("temperature", float("inf")),
    ("top_k", 1.5),
    ("top_k", -2),
    ("top_k", True),
    ("top_p", 0),
    ("top_p", 1.1),
    ("min_p", -0.1),
    ("min_p", 2),
    ("repetition_penalty", 0),
    ("repetition_penalty", [1.0]),
]


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_a_value_that_makes_no_sense_is_named(tmp_path, field, value):
    with pytest.raises(CheckpointError, match=f"{field} is .*; it must be ") as caught:
        read_generation_config(write(tmp_path, {field: value}))
    assert str(tmp_path / "generation_config.json") in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["{", "[]", "\x00"])
def test_a_file_that_is_no_json_object(tmp_path, content):
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        read_generation_config(tmp_path)


def test_a_generation_config_is_frozen():
    with pytest.raises(AttributeError):
        GenerationConfig().temperature = 1.0
