"""Notes about the host at the start: too little memory, and a CPU without bf16 products."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from narrows.arch.weight_sharding import WeightSharding
from narrows.cost.memory import kv_token_bytes, weight_bytes
from narrows.engine.config import EngineConfig, Resolved, resolve
from narrows.engine.free_memory import total_memory
from narrows.engine.machine import Machine
from narrows.errors import ConfigError
from narrows.plan.deploy import loaded_dtype
from narrows.ranks.launch import Launch

ROOMY = Machine(memory=10**12, free=10**12, cpu_features=("avx2", "avx512f", "avx512_bf16"))
SLOW = "no bf16 products"


def start(machine: Machine = ROOMY, **options: object) -> Resolved:
    fields = {"model": "dsv3-mini", "load_format": "dummy", "max_context": 512} | options
    return resolve(EngineConfig(**fields), WeightSharding(), machine)  # type: ignore[arg-type]


def facts(machine: Machine = ROOMY, **options: object) -> str:
    resolved = start(machine, **options)
    assert set(resolved.facts) <= set(resolved.notes)
    return "\n".join(resolved.facts)


# -- bf16 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("features", "target", "faster"),
    [
        (("avx2",), "", "prompts and batches are faster in float32"),
        (("avx2",), "avx2", ""),  # the kernels widen bf16 themselves
        (("avx2",), "baseline", "so prompts are faster in float32"),
        (("avx2", "avx512f", "avx512_vnni"), "", "prompts and batches"),
        (("avx2", "avx512f", "avx512_vnni"), "avx512", ""),
        (("avx2", "avx512f", "avx512_bf16"), "", ""),
        (("avx2", "avx512f", "amx_bf16"), "", ""),
        (("sve", "bf16"), "", ""),
        (("sve",), "", "prompts and batches"),
        ((), "", ""),  # the CPU's features are unknown
    ],
    ids=str,
)
def test_a_cpu_with_slow_bf16_is_named_with_the_alternative(
    features: tuple[str, ...], target: str, faster: str
) -> None:
    text = facts(replace(ROOMY, cpu_features=features, target=target))
    assert (SLOW in text) == bool(faster) and faster in text and text.count("\n") == 0
    assert ("--dtype float32" in text) == bool(faster)


def test_the_price_in_memory_is_named() -> None:
    resolved = start(replace(ROOMY, cpu_features=("avx2",)), tp=2)
    config, mesh = resolved.config, resolved.mesh
    wide, narrow = (
        sum(weight_bytes(config, mesh, WeightSharding(), dtype, rank) for rank in range(2)) / 1e9
        for dtype in ("fp32", "bf16")
    )
    assert loaded_dtype(config)[0] == "bf16" and 1 < 1.9 * narrow < wide
    assert f"{wide:.1f} GB of weights here in place of {1000 * narrow:.1f} MB" in resolved.facts[0]
    assert "free now" not in resolved.facts[0]
    tight = start(replace(ROOMY, free=int(0.9e9 * wide), cpu_features=("avx2",)), tp=2).facts[-1]
    assert re.search(r"it takes \d+\.\d GB in all, and \d+\.\d are free now", tight)


@pytest.mark.parametrize("options", [{"dtype": "float32"}, {"dtype": "bfloat16"}, {"quantization": "int8"}], ids=str)
def test_an_explicit_choice_gives_no_note(options: dict[str, str]) -> None:
    machine = replace(ROOMY, cpu_features=("avx2",))
    assert SLOW not in facts(machine, **options)
    assert str(start(machine, **options).dtype) == f"torch.{options.get('dtype', 'bfloat16')}"


def test_the_checkpoints_dtype_is_kept() -> None:
    slow, fast = (start(replace(ROOMY, cpu_features=has)) for has in (("avx2",), ("avx512_bf16",)))
    assert slow.dtype == fast.dtype and slow.deployment == fast.deployment


# -- memory -----------------------------------------------------------------------------------------------------------


def total(resolved: Resolved, dtype: str = "bf16") -> float:
    """Weights and cache alone, of all ranks."""
    config, mesh = resolved.config, resolved.mesh
    weights = sum(weight_bytes(config, mesh, resolved.sharding, dtype, rank) for rank in range(mesh.size))
    return weights + mesh.size * resolved.limits.tokens_per_group * kv_token_bytes(config, mesh)


def refused(machine: Machine, **options: object) -> str:
    with pytest.raises(ConfigError) as caught:
        start(machine, **options)
    text = str(caught.value)
    assert "\n" not in text and "this host has" in text
    return text


def test_weights_count_beside_the_cache() -> None:
    """Each of them fits alone, both do not."""
    options = {"tp": 2, "kv_tokens": 1 << 18}
    resolved = start(**options)
    needed = total(resolved)
    cache = 2 * (1 << 18) * kv_token_bytes(resolved.config, resolved.mesh)
    assert cache < 0.9 * needed and needed - cache < 0.9 * needed
    text = refused(replace(ROOMY, memory=int(0.95 * needed)), **options)
    assert "lower --kv-tokens" in text and "--max-rows" in text and f"{(1 << 18)} tokens" in text


@pytest.mark.parametrize(("ranks", "processes"), [("threads", 1), ("processes", 2)])
def test_a_step_and_the_processes_count_too(ranks: str, processes: int) -> None:
    options = {"tp": 2, "ranks": ranks, "rows_per_step": 4096, "kv_tokens": 8192}
    needed = total(start(**options))
    text = refused(replace(ROOMY, memory=int(needed)), **options)
    assert "lower --kv-tokens" in text and "steps of 4096 rows" in text
    step, own = (float(re.search(pattern, text)[1]) for pattern in (r"rows (\d+\.\d)", r"processes (\d+\.\d)"))  # type: ignore[index]
    assert step > 0 and own == pytest.approx(0.2 * processes, abs=0.1)
    refused(replace(ROOMY, memory=int(needed + (step + own - 0.15) * 1e9)), **options)
    assert facts(replace(ROOMY, memory=int(needed + (step + own + 0.2) * 1e9)), **options) == ""


def test_ranks_on_other_hosts_use_no_memory_here() -> None:
    launch = Launch(address="127.0.0.1", port=1, world_size=2, ranks=(0,), node=0, num_nodes=2)
    text = refused(replace(ROOMY, memory=10**8), tp=2, ranks="processes", launch=launch)
    assert "on 1 rank(s) here" in text


def test_more_rows_take_more_memory() -> None:
    few = total(start(rows_per_step=64, kv_tokens=1 << 16)) + 0.5e9
    machine = replace(ROOMY, memory=int(few))
    start(machine, rows_per_step=64, kv_tokens=1 << 16)
    assert "steps of 32768 rows" in refused(machine, rows_per_step=1 << 15, kv_tokens=1 << 16)


def test_no_step_has_more_rows_than_the_cache_has_places() -> None:
    """Nothing is refused for a --max-rows that can never be."""
    machine = replace(ROOMY, memory=int(total(start(kv_tokens=512)) + 1e9))
    start(machine, rows_per_step=10**9, kv_tokens=512)


def test_weights_that_exceed_memory_alone_are_refused() -> None:
    text = refused(replace(ROOMY, memory=10**8))
    assert "the weights alone are too much" in text and "--nnodes" in text and "lower --kv-tokens" not in text


def test_memory_that_is_not_free_now_is_named() -> None:
    text = facts(replace(ROOMY, free=10**8))
    assert text.startswith("full use takes ") and text.endswith("; 0.1 GB are free now")


def test_gpus_have_memory_of_their_own() -> None:
    small = Machine(memory=1, free=1, cpu_features=("avx2",))
    assert facts(small, run_on="cuda", device="h20") == ""


def test_a_container_s_limit_is_the_host_s_memory(tmp_path: Path) -> None:
    machine = total_memory(tmp_path)  # no limit to be read
    for limit, found in (("max", machine), ("123456", 123456), (str(10**18), machine), ("?", machine)):
        (tmp_path / "memory.max").write_text(f"{limit}\n", encoding="ascii")
        assert total_memory(tmp_path) == found
