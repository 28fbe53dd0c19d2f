"""Devices: figures are plausible and have sources; the error of an unknown name lists the known ones."""

import dataclasses
import pickle

import pytest

from narrows.cost import DEVICES, Device, collective_price, device
from narrows.cost.collectives import _curves
from narrows.cost.gemm import _tables
from narrows.cost.grids import grids
from narrows.errors import ConfigError

NAMES = [
    *("h20", "h20-3e", "h100", "h200", "h800", "a100", "b200", "gb200", "l40s", "mi300x"),
    *("xeon-8480", "xeon-8592", "xeon-6980p", "cpu-core"),
]


def test_the_known_devices() -> None:
    assert list(DEVICES) == NAMES
    assert all(found.name == name and device(name) is found for name, found in DEVICES.items())
    with pytest.raises(TypeError):
        DEVICES["h100"] = DEVICES["h20"]  # type: ignore[index]


def test_an_unknown_device_error_lists_the_known_devices() -> None:
    with pytest.raises(ConfigError) as error:
        device("h1000")
    assert "h1000" in str(error.value)
    assert all(name in str(error.value) for name in NAMES)


@pytest.mark.parametrize("found", DEVICES.values(), ids=NAMES)
def test_figures_are_plausible_and_have_sources(found: Device) -> None:
    for field in dataclasses.fields(found):
        value = getattr(found, field.name)
        if field.name.endswith("efficiency"):
            assert 0.25 <= value <= 1.0, field.name
        elif isinstance(value, float):
            assert value > 0, field.name
    assert found.tflops_fp8 is None or 1.9 < found.tflops_fp8 / found.tflops_bf16 < 2.1
    assert found.tflops_fp32 < found.tflops_bf16
    for group in ("peaks", "memory", "collectives", "gemm", "row work", "attention"):
        assert len(found.source(group)) > 5
    assert ("measured" if found.kernels else "assumed") in found.source("attention")


@pytest.mark.parametrize("found", DEVICES.values(), ids=NAMES)
def test_the_tables_that_a_device_names_exist(found: Device) -> None:
    if found.kernels is not None:
        assert grids(found.kernels, "gemm_bf16") and grids(found.kernels, "moe")
    if found.gemm is not None:
        assert found.gemm in {table for table, _ in _tables()}
    if found.collectives is not None:
        tables = {key[0] for key in _curves()}
        assert found.collectives.table in tables
        assert found.collectives.lender is None or found.collectives.lender in tables


def test_rates_by_dtype() -> None:
    assert device("h20").flops_per_s("fp8") == 296e12
    assert device("h20").flops_per_s("bf16") == 148e12
    with pytest.raises(ConfigError, match=r"a100 .* no fp8 .*312.* h20, h20-3e, h100"):
        device("a100").flops_per_s("fp8")
    with pytest.raises(ConfigError, match=r"'int4'.*bf16, fp8, int8, int8-weight-only, stored, fp32"):
        device("h100").flops_per_s("int4")


def test_a_changed_device_has_its_own_prices() -> None:
    h20 = device("h20")
    slow = dataclasses.replace(h20, collectives=None, link_bytes_per_s=1e9)
    assert slow != h20
    assert hash(slow) == hash(h20)
    before = collective_price(h20, "all_gather", 8, 1 << 24)
    assert collective_price(slow, "all_gather", 8, 1 << 24).seconds > 10 * before.seconds
    assert collective_price(h20, "all_gather", 8, 1 << 24) == before
    assert pickle.loads(pickle.dumps(h20)) == h20
