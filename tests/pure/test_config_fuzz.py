"""Configs with wrong, missing, odd and unknown fields: one line, or a model that can be planned."""

from __future__ import annotations

import io
import json
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from effort import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from narrows.arch.chain import build_chain
from narrows.arch.config import CONFIG_SCHEMAS, ModelConfig, read_config
from narrows.arch.configs.rope import ROPE_FIELDS, ROPE_TYPES
from narrows.arch.weight_sharding import WeightSharding, sharding_choices
from narrows.arch.weights import layer_weights
from narrows.cli.main import main
from narrows.errors import ConfigError
from narrows.layout import Mesh

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 40,
    "vocab_size": 67,
    "head_dim": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 16,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
MESHES = [Mesh.of(dp=dp, tp=tp) for dp, tp in ((1, 1), (1, 3), (2, 2))]


def base(name: str) -> dict[str, Any]:
    """The smallest config of a family: the required fields only."""
    schema = CONFIG_SCHEMAS[name]
    needed = {field for field, info in schema.model_fields.items() if info.is_required()} | {"intermediate_size"}
    more = {"num_key_value_heads"} if "num_key_value_heads" in schema.model_fields else set()
    return (
        {"model_type": name}
        | {field: SIZES[field] for field in sorted(needed | more) if field in SIZES}
        | {field: 64 for field in needed if field not in SIZES}
    )


NAMES = sorted({*SIZES, *ROPE_FIELDS, *(field for schema in CONFIG_SCHEMAS.values() for field in schema.model_fields)})
OTHERS = ["dtype", "quantization_config", "architectures", "index_topk", "logits_scaling", "foo", "_bar", "is_causal"]
SMALL = st.integers(0, 40)
ROPE = st.fixed_dictionaries(
    {},
    optional={
        "rope_type": st.sampled_from(["default", *ROPE_TYPES, "su"]),
        "type": st.sampled_from(["default", *ROPE_TYPES]),
        "rope_theta": st.sampled_from([1e4, 5e5, 0, "x", None]),
        **{
            name: st.one_of(SMALL, st.floats(), st.none(), st.lists(st.floats(0.5, 4), max_size=3), st.text(max_size=2))
            for name in sorted({field for kind in ROPE_TYPES.values() for field in kind.model_fields})
        },
    },
)
JUNK = st.recursive(
    st.none() | st.booleans() | SMALL | st.integers() | st.floats() | st.text(max_size=4) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
CHANGES = st.dictionaries(st.sampled_from(NAMES + OTHERS) | st.text(max_size=5), SMALL | JUNK | ROPE, max_size=3)


def outcome(raw: dict[str, Any]) -> ModelConfig | None:
    """The model, or None if it was refused in one line that begins with the file's name."""
    try:
        return read_config(raw, "fuzz.json")
    except ConfigError as error:
        words = str(error)
        assert words.startswith("fuzz.json: ") and "\n" not in words and len(words) < 700
        assert words.isprintable()
        return None


def planned(config: ModelConfig) -> None:
    """Chains and slices of weights on every mesh that the model can be split over."""
    for mesh in MESHES:
        try:
            build_chain(config, mesh)
        except ConfigError as error:
            assert "\n" not in str(error)
            continue
        for sharding in sharding_choices(config, mesh):
            build_chain(config, mesh, sharding)
        for layer in {0, config.num_hidden_layers - 1}:
            for weight in layer_weights(config, mesh, WeightSharding(), layer).values():
                assert all(weight.num_values(mesh, rank) >= 0 for rank in range(mesh.size))


@pytest.mark.parametrize("name", CONFIG_SCHEMAS)
def test_the_smallest_config_is_read(name: str) -> None:
    config = read_config(base(name) | ({"sliding_window": None} if name == "mistral" else {}))
    planned(config)


@pytest.mark.parametrize("name", CONFIG_SCHEMAS)
@given(changes=CHANGES, without=st.sets(st.sampled_from(NAMES), max_size=2))
@settings(max_examples=examples(30), deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_config_is_a_model_or_a_one_line_error(name: str, changes: dict[str, Any], without: set[str]) -> None:
    raw = {field: value for field, value in (base(name) | changes).items() if field not in without}
    config = outcome(raw | {"model_type": name})
    if config is not None:
        planned(config)


@given(raw=st.dictionaries(st.text(max_size=4) | st.just("model_type"), JUNK | st.sampled_from(sorted(CONFIG_SCHEMAS))))
@settings(max_examples=examples(50), deadline=None)
def test_any_object_is_a_model_or_a_one_line_error(raw: dict[str, Any]) -> None:
    outcome(raw)


PLAUSIBLE = st.fixed_dictionaries(
    {},
    optional={
        **{name: st.integers(1, 9) for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")},
        **{name: st.integers(1, 70) for name in ("hidden_size", "intermediate_size", "vocab_size", "kv_lora_rank")},
        **{name: st.integers(1, 9) for name in ("n_routed_experts", "num_experts", "num_experts_per_tok", "n_group")},
        **{name: st.sampled_from([2, 4, 6]) for name in ("head_dim", "qk_rope_head_dim")},
        **{name: st.integers(0, 3) for name in ("n_shared_experts", "first_k_dense_replace", "max_window_layers")},
        "tie_word_embeddings": st.booleans(),
        "use_sliding_window": st.booleans(),
    },
)


@given(
    name=st.sampled_from(sorted(CONFIG_SCHEMAS)), changes=PLAUSIBLE, mesh=st.sampled_from(["--tp 1", "--dp 2 --tp 2"])
)
@settings(max_examples=examples(8), deadline=None)
def test_every_config_that_is_read_can_be_planned(name: str, changes: dict[str, Any], mesh: str) -> None:
    fields = CONFIG_SCHEMAS[name].model_fields.keys() | base(name).keys()
    raw = base(name) | {field: value for field, value in changes.items() if field in fields}
    out, err = io.StringIO(), io.StringIO()
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(out), redirect_stderr(err):
        (Path(folder) / "config.json").write_text(json.dumps(raw), encoding="utf-8")
        code = main(["plan", folder, *mesh.split(), "--device", "h200", "--rows", "32", "--json"])
    if code:
        assert code == 2 and err.getvalue().startswith("narrows: error: ") and err.getvalue().count("\n") == 1
    else:
        assert json.loads(out.getvalue())["layouts"]


ODD_TEXTS = {
    "empty": b"",
    "no object": b"[1]",
    "null": b"null",
    "not UTF-8": b'{"model_type": "\xff"}',
    "half of one": b'{"model_type": "llama"',
    "NaN": b'{"model_type": "llama", "rms_norm_eps": NaN}',
    "infinity": b'{"model_type": "llama", "rope_theta": -Infinity}',
    "twice": b'{"hidden_size": 8, "model_type": "llama", "hidden_size": 16}',
    "twice, deeper": b'{"model_type": "llama", "rope_scaling": {"type": "yarn", "type": "linear"}}',
    "thousands of digits": b'{"model_type": "llama", "hidden_size": ' + b"9" * 5000 + b"}",
    "nested": b'{"model_type": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "half a pair of surrogates": b'{"model_type": "\\ud800"}',
}


@pytest.mark.parametrize("content", ODD_TEXTS.values(), ids=ODD_TEXTS)
def test_a_file_that_is_no_config_is_a_one_line_error(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_config(tmp_path)
    assert str(caught.value).startswith(f"{file}: ") and "\n" not in str(caught.value)


def test_a_byte_order_mark_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(base("llama")).encode())
    assert read_config(tmp_path).hidden_size == 32


ODD_MODELS = {
    "one of everything": ("qwen3_moe", {"num_hidden_layers": 1, "num_experts": 1, "num_experts_per_tok": 1}),
    "one head": ("llama", {"num_attention_heads": 1, "num_key_value_heads": 1, "hidden_size": 2, "vocab_size": 1}),
    "odd widths": ("qwen2", {"hidden_size": 33, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 10}),
    "all dense": ("deepseek_v3", {"first_k_dense_replace": 1024}),
    "more heads than width": ("qwen3", {"num_attention_heads": 64, "num_key_value_heads": 64, "hidden_size": 3}),
    "one expert a group": ("deepseek_v3", {"n_group": 16, "topk_group": 4, "n_shared_experts": 0}),
    "the most layers": ("llama", {"num_hidden_layers": 1024}),
    "the most experts": ("deepseek_v2", {"n_routed_experts": 8192, "num_experts_per_tok": 8192}),
    "the most of all": ("llama", {"hidden_size": 1 << 20, "vocab_size": 1 << 24, "num_attention_heads": 8192}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", ODD_MODELS.values(), ids=ODD_MODELS)
def test_odd_models_are_planned_or_refused_in_one_line(
    case: tuple[str, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, changes = case
    (tmp_path / "config.json").write_text(json.dumps(base(name) | changes), encoding="utf-8")
    load = "--tp 1 --num-requests 2 --input-length 9 --output-length 2 --rate 1"
    for command in ("plan {} --tp 1 --rows 64", "plan {} --dp 2 --tp 2 --rows 64", f"simulate {{}} {load}"):
        code = main([*command.format(tmp_path).split(), "--device", "h200", "--json"])
        out, err = capsys.readouterr()
        if code:
            assert code == 2 and err.startswith("narrows: error: ") and err.count("\n") == 1
        else:
            json.loads(out)
