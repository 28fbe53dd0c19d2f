"""Whole steps of every family on fake CUDA tensors: finds errors and synchronisations of a GPU without one.

torch's FakeTensorMode propagates shapes, dtypes and devices and computes nothing, so these run at the published sizes.
Every rank of a 2 x 2 mesh runs alone, through the real Worker, bind, Program and Communicator, whose
NCCL is torch's fake process group. A step has three parts, and each has its rules:

- before the plan (ids, page tables, row counts, sampling parameters): host work and copies to the device; no reading of
  device tensors, and no op that mixes devices;
- the plan (every stage and move of the plan, sampling too): no tensor outside the device, not even an index or a 0-dim
  one (``x[0] = 1`` makes one, ``fill_`` does not), nothing whose result or shape the host must wait for, no op without
  a CUDA kernel;
- after the plan: the host reads the sampled ids and the log-probabilities of rows whose request wants them, at once.

Of sampling, so, the random numbers (from seed and position), temperatures and filters are host work before the plan;
penalties, filters and draws run in the plan; log-probabilities are cut out and read after it.

The planted faults at the end show that each rule bites.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import (
    DECODE,
    FAMILIES,
    KEY,
    MESH,
    PREFILL,
    SAMPLED,
    SAMPLED_AGAIN,
    STEPS,
    Ranks,
    StepError,
    cuda_device_guard,
    nccl,
    prefixes,
)
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorDeviceMismatchError,
)

from narrows.arch.config import read_config
from narrows.arch.weight_sharding import WeightSharding, sharding_choices
from narrows.engine.program import Frame, Program
from narrows.engine.sampler import RowSampler
from narrows.engine.worker import Worker
from narrows.models import moe
from narrows.models.registry import EXECUTABLE
from narrows.ops import mlp
from narrows.plan.cache import PlanCache
from narrows.plan.named import applicable_layouts, named_layout

AUTO_IN_CI = {
    "chosen": set(FAMILIES) - {"deepseek_v2"},  # its parts are those of two others
    "furthest from the published": {
        "deepseek_v3",
        "llama",
        "qwen3_moe",
    },  # they have every part that is sharded in several ways
}
LAYOUTS_IN_CI = {"deepseek_v3", "llama", "glm4_moe"}  # each has other stages


__all__ = ["cuda_device_guard", "nccl", "prefixes"]


def full(*case: object) -> Any:
    """A case of ``make test-full``."""
    return pytest.param(*case, marks=pytest.mark.full)


RANKS = [(0, 3), pytest.param((1, 2), marks=pytest.mark.full)]  # each: both groups, both places in a group


def test_every_executable_family_is_here() -> None:
    assert {raw["model_type"] for raw in FAMILIES.values()} == set(EXECUTABLE)


@pytest.mark.parametrize("ranks", RANKS, ids=str)
@pytest.mark.parametrize("family", [name if name in LAYOUTS_IN_CI else full(name) for name in FAMILIES])
def test_every_named_layout_stays_on_the_device_and_never_waits(
    family: str, ranks: tuple[int, ...], tmp_path: Path
) -> None:
    config = read_config(FAMILIES[family])
    names = [name for name in applicable_layouts(config, MESH) if name != "auto"]
    assert names
    run = Ranks(FAMILIES[family], tmp_path, named_layout(names[0], config, MESH).sharding, ranks)
    for name in names:
        assert named_layout(name, config, MESH).sharding == run.resolved.sharding
        run.run(STEPS, name)


@pytest.mark.parametrize("ranks", RANKS, ids=str)
@pytest.mark.parametrize(
    ("family", "sharding"),
    [
        (name, sharding) if name in AUTO_IN_CI[sharding] else full(name, sharding)
        for name in FAMILIES
        for sharding in ("chosen", "furthest from the published")
    ],
)
def test_auto_stays_on_the_device_and_never_waits(
    family: str, sharding: str, ranks: tuple[int, ...], tmp_path: Path
) -> None:
    config = read_config(FAMILIES[family])
    run = Ranks(FAMILIES[family], tmp_path, None if sharding == "chosen" else sharding_choices(config, MESH)[-1], ranks)
    run.run((*STEPS, SAMPLED, SAMPLED_AGAIN), "auto")


@pytest.mark.parametrize("ranks", RANKS, ids=str)
@pytest.mark.parametrize("family", ["deepseek_v2 without q_lora_rank", "qwen3_moe"])
def test_batch_invariant_steps_stay_on_the_device_and_never_wait(
    family: str, ranks: tuple[int, ...], tmp_path: Path
) -> None:
    Ranks(FAMILIES[family], tmp_path, None, ranks, batch_invariant=True).run(STEPS, "auto")


@pytest.mark.parametrize("ranks", RANKS, ids=str)
@pytest.mark.parametrize(
    ("family", "encode_rows"),
    [
        ("deepseek_v3", "int8-always"),
        full("deepseek_v3", "fp8-always"),
        full("deepseek_v2 without q_lora_rank", "int8-always"),
        ("deepseek_v2 without q_lora_rank", "fp8-always"),
    ],
)
def test_encoded_rows_stay_on_the_device_and_never_wait(
    family: str, encode_rows: str, ranks: tuple[int, ...], tmp_path: Path
) -> None:
    run = Ranks(FAMILIES[family], tmp_path, WeightSharding(), ranks, encode_rows=encode_rows)
    for layout in ("sequence-parallel", "norm-before-gather"):
        assert run.planners[False].plan(PlanCache(run.planners[False], layout, 1024).shape(KEY), layout).encodings
        run.run(STEPS, layout)


# Planted faults. Each is put into an op, or where the step hands tensors to ops, and must be found in a llama.

FAULTS: dict[str, tuple[Callable[[Tensor], object], type[Exception]]] = {
    # tensors of different devices
    "a CPU tensor in a sum": (lambda x: x + torch.arange(x.shape[-1]), StepError),
    "a CPU tensor as an index": (lambda x: x[torch.arange(x.shape[0])], StepError),
    "a CPU scalar": (lambda x: x * torch.tensor(2.0), StepError),
    "a list copied to the device": (lambda x: x * torch.tensor([2.0], device=x.device), StepError),
    "a copy to the host": (lambda x: x.cpu(), StepError),
    # ops that only a CPU has
    "a CPU-only op": (lambda x: torch.histogram(x.float(), 4), StepError),
    "numpy": (lambda x: x.numpy(), RuntimeError),
    # results and shapes that the host must wait for
    "item": (lambda x: x[0, 0].item(), DataDependentOutputException),
    "tolist": (lambda x: x[0].tolist(), DataDependentOutputException),
    "an if": (lambda x: 1 if (x > 0).any() else 0, DataDependentOutputException),
    "nonzero": (lambda x: x.nonzero(), DynamicOutputShapeException),
    "rows by a boolean mask": (lambda x: x[x[:, 0] > 0], StepError),
    "writing by a boolean mask": (lambda x: x.clone().index_put_((x[:, 0] > 0,), x[0]), StepError),
    "bincount": (lambda x: torch.bincount(x[0].long()), DynamicOutputShapeException),
    "unique": (lambda x: x.unique(), DynamicOutputShapeException),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return Ranks(FAMILIES["llama"], tmp_path_factory.mktemp("llama"), None, ranks=(0,))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_an_op_is_found_and_its_stage_named(
    fault: str, llama: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant, error = FAULTS[fault]
    act_mul = mlp.act_mul

    def faulty(x: Tensor, hidden_act: str) -> Tensor:
        plant(x)
        return act_mul(x, hidden_act)

    llama.run([PREFILL], "auto")
    monkeypatch.setattr(mlp, "act_mul", faulty)
    with pytest.raises(error) as found:
        llama.run([PREFILL], "auto")
    assert "in mlp, layer 0, rank 0" in found.value.__notes__


def test_experts_counted_on_the_host_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`experts_mlp` as on CPU, where reading the segments' lengths is free."""

    def counted(x_TH: Tensor, topk_ids_TK: Tensor, *_: Any, **options: Any) -> Tensor:
        counts = torch.bincount(topk_ids_TK.flatten(), minlength=64).tolist()
        raise AssertionError(f"not reached: {counts}")

    monkeypatch.setattr(moe, "experts_mlp", counted)
    with pytest.raises(DynamicOutputShapeException) as found:
        Ranks(FAMILIES["qwen3_moe"], tmp_path, None, ranks=(0,)).run([PREFILL], "auto")
    assert "in experts, layer 0, rank 0" in found.value.__notes__


def test_selected_rows_on_the_host_are_found(llama: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = Program.frame

    def on_host(self: Program, *args: Any) -> Frame:
        made = frame(self, *args)
        made.selections = tuple(torch.zeros(len(rows), dtype=torch.int64) for rows in made.selections)
        return made

    monkeypatch.setattr(Program, "frame", on_host)
    with pytest.raises(FakeTensorDeviceMismatchError, match="cuda:0 and cpu"):
        llama.run([PREFILL], "auto")


def test_a_send_buffer_on_the_host_is_found(llama: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama.workers[0].comm._buffers, "_device", torch.device("cpu"))
    with pytest.raises(StepError, match=r"aten\.empty\.\w+ has tensors on \['cpu'\]"):
        llama.run([PREFILL], "auto")


def test_samples_read_before_the_plan_are_found(llama: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that refer to the previous step's samples stay on the device: the host is a step ahead of them."""
    ids = Worker._stage_ids

    def read(self: Worker, *args: Any) -> Callable[[], Tensor]:
        self._samples.cpu()
        return ids(self, *args)

    llama.run([PREFILL, DECODE], "auto")
    monkeypatch.setattr(Worker, "_stage_ids", read)
    with pytest.raises(StepError, match=r"outside the plan: .* reads the device on the host"):
        llama.run([DECODE], "auto")


def test_log_probabilities_read_within_the_plan_are_found(llama: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    call = RowSampler.__call__

    def at_once(self: RowSampler, logits_TV: Tensor) -> Tensor:
        ids_T = call(self, logits_TV)
        self.logprobs()
        return ids_T

    llama.run([PREFILL, SAMPLED], "auto")
    monkeypatch.setattr(RowSampler, "__call__", at_once)
    with pytest.raises(DataDependentOutputException):
        llama.run([SAMPLED], "auto")
