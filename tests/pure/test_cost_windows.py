"""What a window saves: pairs of rows and tokens, bytes of keys and values, and the price of a plan."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrows.arch.config import GQA, ModelConfig, read_config
from narrows.arch.weight_sharding import WeightSharding
from narrows.bench.roofline import decode_bound, decode_kv_bytes, prefill_flops
from narrows.cost import device
from narrows.cost.pricer import StepShape
from narrows.layout import Mesh
from narrows.plan.planner import Deployment, Planner

MESH = Mesh.of(dp=1, tp=1)
MISTRAL = {
    "model_type": "mistral",
    "hidden_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 2048,
    "vocab_size": 1000,
}


def model(window: int | None, layers: frozenset[int] = frozenset(range(4))) -> ModelConfig:
    """A Mistral, of which only some ``layers`` slide."""
    config = read_config(MISTRAL | {"sliding_window": window})
    assert isinstance(config.attention, GQA)
    return replace(config, attention=replace(config.attention, sliding_layers=layers))


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 400))
def test_rows_attend_to_their_windows(rows: int, context: int, window: int) -> None:
    """The last rows of a context one by one, to the half token that the mean of a triangle is off by."""
    shape = StepShape.of(MESH, (rows,), phase="prefill", context=context)
    seen = [min(position + 1, window) for position in range(max(0, context - rows), context)]
    assert shape.attended(rows, window) == pytest.approx(sum(seen) / len(seen), abs=0.51)
    assert shape.attended(rows, context) == shape.attended(rows)
    decode = StepShape.of(MESH, (rows,), phase="decode", context=context)
    assert decode.attended(rows, window) == min(context, window)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_window_makes_attention_cheaper_and_nothing_else(phase: str) -> None:
    shape = StepShape.of(MESH, (64,), phase=phase, context=8192)

    def priced(config: ModelConfig) -> dict[str, int]:
        deployment = Deployment(config=config, mesh=MESH, device=device("h100"), dtype="bf16")
        found: dict[str, int] = {}
        for _, op in Planner(deployment, WeightSharding()).plan(shape).ops():
            found[op.price_class] = found.get(op.price_class, 0) + op.ps
        return found

    whole, all_slide, two_slide = priced(model(None)), priced(model(512)), priced(model(512, frozenset({0, 2})))
    assert {name for name in whole if whole[name] != all_slide[name]} == {"attention"}
    saved = whole["attention"] - all_slide["attention"]
    assert saved > 0 and whole["attention"] - two_slide["attention"] == pytest.approx(saved / 2, rel=1e-6)
    assert priced(model(8192)) == whole


def test_bytes_and_flops_of_windowed_attention() -> None:
    per_token = 2 * 2 * 128 * 2
    assert decode_kv_bytes(model(None), 2, rows=3, context=100) == 4 * 3 * 100 * per_token
    assert decode_kv_bytes(model(16, frozenset({1})), 2, rows=3, context=100) == 3 * (3 * 100 + 16) * per_token
    pairs = sum(min(position + 1, 16) for position in range(100))
    fewer = prefill_flops(model(None), 100) - prefill_flops(model(16), 100)
    assert fewer == 4 * 2 * (100 * 101 // 2 - pairs) * 8 * 2 * 128
    given = {"rows": 1, "experts_hit": 0.0, "bytes_per_s": 1e3, "flop_per_s": 1e30}
    bounds = [decode_bound(model(window), 2, context=100, **given) for window in (None, 16)]
    assert bounds[0] - bounds[1] == pytest.approx(4 * 84 * per_token / 1e3)
