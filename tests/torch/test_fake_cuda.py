"""Whole steps of every family on fake CUDA tensors: what a GPU would refuse, or wait for, is found without one.

torch's FakeTensorMode propagates shapes, dtypes and devices and computes nothing, so these run at the published sizes.
Every rank of a 2 x 2 mesh runs alone, through the real Worker, bind and Program, against a World that checks what it is
handed and returns tensors of the right shape. A step has three parts, and each has its rules:

- before the walk (ids, page tables, row counts, sampling parameters): host work and copies to the device; no reading of
  device tensors, and no op that mixes devices;
- the walk (every stage and move of the plan, sampling too): no tensor outside the device, not even a 0-dim one or an
  index, nothing whose result or shape the host must wait for, no op without a CUDA kernel;
- after the walk: the host reads the sampled ids, once, and the log-probabilities of rows whose request asked for them.

The planted faults at the end show that each rule bites.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torchgen.gen
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchgen.model import DispatchKey

from narrows.arch.config import read_config
from narrows.arch.forms import Forms, form_choices
from narrows.arch.presets import PRESETS
from narrows.comm.world import World
from narrows.engine.config import EngineConfig, Resolved, resolve
from narrows.engine.program import Frame, Operation, Registers, Wrap
from narrows.engine.worker import Worker
from narrows.layout import Mesh
from narrows.models import deepseek, moe, parts
from narrows.models.parts import Place
from narrows.models.registry import EXECUTABLE
from narrows.plan.book import PlanBook
from narrows.plan.named import applicable_layouts, named_layout
from narrows.plan.plan import Step
from narrows.plan.planner import Planner
from narrows.sched.batch import Batch, Chunk, sample_ref
from narrows.sched.sampling import SamplingParams

CUDA = torch.device("cuda:0")
PAGE = 16
SLOTS = 4096

_FEWER = {"num_hidden_layers": 2, "first_k_dense_replace": 1, "n_routed_experts": 64}  # a dense layer, one with experts
_QWEN2 = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
}
_QWEN3 = {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 12288,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000.0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {**PRESETS["deepseek-v2"], **_FEWER},
    "deepseek_v2 without q_lora_rank": {**PRESETS["deepseek-v2-lite"], **_FEWER},
    "deepseek_v3": {**PRESETS["deepseek-v3"], **_FEWER},
    "llama": {**PRESETS["llama-3.1-8b"], "num_hidden_layers": 1},
    "qwen2": {**_QWEN2, "num_hidden_layers": 1},
    "qwen3": {**_QWEN3, "num_hidden_layers": 1},
    "qwen3_moe": {**PRESETS["qwen3-30b-a3b"], "num_hidden_layers": 1, "num_experts": 64},
}
MESH = Mesh.of(dp=2, tp=2)


class StepFault(AssertionError):
    """Something inside a step that a GPU would refuse, or that would make the host wait for it."""


@cache
def ops_with_cuda_kernels() -> frozenset[str]:
    """Names of the aten ops that a CUDA build of this torch can run, by its own table of kernels."""
    folder = Path(torchgen.gen.__file__).parent / "packaged/ATen/native"
    parsed = torchgen.gen.parse_native_yaml(str(folder / "native_functions.yaml"), str(folder / "tags.yaml"))
    index = parsed.backend_indices[DispatchKey.CUDA].index
    return frozenset(
        f"aten::{f.func.name}"
        for f in parsed.native_functions
        if f.has_composite_kernel or (f.structured_delegate or f.func.name) in index
    )


class StepGuard(TorchDispatchMode):
    """Sees every op of a step, before FakeTensorMode does, and refuses what only a real GPU would show."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = ""
        """The stage or move that is being walked; empty before and after the walk."""
        self.walked: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return func(*args, **kwargs)
        with self:  # in inference mode composite ops come whole: look at what they are made of
            result = func.decompose(*args, **kwargs)
        if result is NotImplemented:
            result = func(*args, **kwargs)
            self._look(func, [args, kwargs], result)
        return result

    def _look(self, func: Any, inputs: list[Any], result: Any) -> None:
        where = f"{self.stage or 'outside the walk'}: {func}"
        read, left = _devices(inputs), _devices(result)
        if CUDA in read and left - {CUDA}:
            raise StepFault(f"{where} reads the device on the host")
        if not self.stage:
            return
        self.walked.add(self.stage)
        if (read | left) - {CUDA}:
            raise StepFault(f"{where} has tensors on {sorted(map(str, read | left))}, in a step of {CUDA}")
        if func.namespace == "aten" and func.name() not in ops_with_cuda_kernels():
            raise StepFault(f"{where} has no CUDA kernel")
        if func.overloadpacket in _INDEXING and any(index.dtype == torch.bool for index in _tensors(inputs[0][1])):
            raise StepFault(f"{where} takes a boolean mask, whose rows the host must count; masked_fill does not")


_INDEXING = (
    torch.ops.aten.index,
    torch.ops.aten.index_put,
    torch.ops.aten.index_put_,
    torch.ops.aten._index_put_impl_,
    torch.ops.aten._unsafe_index,
    torch.ops.aten._unsafe_index_put,
)


def _tensors(tree: Any) -> list[FakeTensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, FakeTensor)]


def _devices(tree: Any) -> set[torch.device]:
    return {tensor.fake_device for tensor in _tensors(tree)}


class FakeWorld:
    """One rank's World without the others: checks that what it is handed fits the counts and lies on the device."""

    checked = True

    def __init__(self, rank: int) -> None:
        self.rank, self.mesh = rank, MESH

    def all_gather(
        self, xs: Sequence[Tensor], ranks: tuple[int, ...], counts: Sequence[int], label: str
    ) -> list[Tensor]:
        rows = counts[ranks.index(self.rank)]
        return [self._fresh(x, (rows, x.shape[1]), (sum(counts), x.shape[1]), label) for x in xs]

    def reduce_scatter(
        self, x: Tensor, ranks: tuple[int, ...], counts: Sequence[int], label: str, addends: Sequence[Tensor] = ()
    ) -> Tensor:
        piece = (counts[ranks.index(self.rank)], x.shape[1])
        for addend in addends:
            self._fresh(addend, piece, piece, label)
        return self._fresh(x, (sum(counts), x.shape[1]), piece, label)

    def all_reduce(
        self, x: Tensor, ranks: tuple[int, ...], counts: Sequence[int], label: str, addends: Sequence[Tensor] = ()
    ) -> Tensor:
        self.reduce_scatter(x, ranks, counts, label, addends)
        return self._fresh(x, tuple(x.shape), tuple(x.shape), label)

    def column_gather(self, x: Tensor, ranks: tuple[int, ...], widths: Sequence[int], label: str) -> Tensor:
        rows = x.shape[0]
        return self._fresh(x, (rows, widths[ranks.index(self.rank)]), (rows, sum(widths)), label)

    def broadcast(self, x: Tensor, ranks: tuple[int, ...], root: int, label: str) -> Tensor:
        return self._fresh(x, tuple(x.shape), tuple(x.shape), label)

    def barrier(self, ranks: tuple[int, ...], label: str) -> None:
        pass

    def send_buffer(self, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        return torch.empty((rows, width), dtype=dtype, device=CUDA)

    def _fresh(self, x: Tensor, expected: tuple[int, ...], shape: tuple[int, ...], label: str) -> Tensor:
        assert x.device == CUDA, f"{label}: a tensor on {x.device}"
        assert tuple(x.shape) == expected, f"{label}: a tensor of {tuple(x.shape)}, where the counts say {expected}"
        return x.new_empty(shape)


class FakeWorker(Worker):
    """A Worker whose sampled ids nobody can read: there are none."""

    num_reads = 0

    def _read(self, *_: Any) -> Any:
        self.num_reads += 1
        return None


@pytest.fixture(scope="module", autouse=True)
def _cuda_device_guard() -> Iterator[None]:
    """Indexing, ``to`` and ``item`` ask C++ for the device's guard, which a CPU build of torch has not got for CUDA.

    A CUDA build without a GPU gets one that does nothing from torch itself (``_ensureCUDADeviceGuardSet``); here the
    CUDA entry of the same table becomes the meta device's, which does nothing either.
    """
    cuda, meta, num_devices = 1, 14, 16  # c10/core/DeviceType.h
    (library,) = (Path(torch.__file__).parent / "lib").glob("libc10.*")
    table = (ctypes.c_void_p * num_devices).in_dll(
        ctypes.CDLL(str(library)), "_ZN3c104impl26device_guard_impl_registryE"
    )
    before = table[cuda]
    if before is None:
        table[cuda] = table[meta]
    yield
    table[cuda] = before


class Ranks:
    """All ranks of one family, one after the other, with weights held as ``forms`` say."""

    def __init__(self, raw: dict[str, Any], folder: Path, forms: Forms | None, layout: str = "auto") -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(raw), encoding="utf-8")
        asked = EngineConfig(
            model=str(file),
            dp=2,
            tp=2,
            layout=layout,
            dtype="bfloat16",
            device="h100",
            load_format="dummy",
            max_context=2048,
            kv_tokens=SLOTS,
            page_size=PAGE,
        )
        self.resolved = resolve(asked, forms)
        self.guard = StepGuard()
        self.fake = FakeTensorMode()
        self.planners = {
            want_logits: Planner(replace(self.resolved.deployment, want_logits=want_logits), self.resolved.forms)
            for want_logits in (False, True)
        }
        with torch.inference_mode(), self.fake:
            self.workers = [self._worker(rank) for rank in range(MESH.size)]

    def _worker(self, rank: int) -> FakeWorker:
        resolved: Resolved = self.resolved
        place = Place(
            mesh=MESH,
            rank=rank,
            forms=resolved.forms,
            dtype=resolved.dtype,
            device=CUDA,
            num_slots=resolved.num_slots,
            num_positions=resolved.limits.max_context,
        )
        world: World = FakeWorld(rank)
        return FakeWorker(
            world,
            resolved.config,
            resolved.weights(),
            place,
            self.planners[False].chain.fields,
            page_size=PAGE,
            wrap=self._wrap,
        )

    def _wrap(self, worker: Worker) -> Wrap:
        def around(
            layer: int | None, step: Step, reads: tuple[int, ...], writes: tuple[int, ...], operation: Operation
        ) -> Operation:
            stage = f"{step.name} before {step.boundary}" if step.stage is None else step.name

            def watched(regs: Registers, frame: Frame) -> None:
                self.guard.stage = stage
                try:
                    operation(regs, frame)
                except Exception as error:
                    error.add_note(f"in {stage}, layer {layer}, rank {worker.place.rank}")
                    raise
                finally:
                    self.guard.stage = ""

            return watched

        return around

    def walk(self, batches: Sequence[Batch], layout: str) -> None:
        """Run the batches, in order, on every rank."""
        books = {want: PlanBook(planner, layout, 1024) for want, planner in self.planners.items()}
        for worker in self.workers:
            for batch in batches:
                plan = books[batch.needs_logits].plan_for(batch.phase, batch.group_rows, batch.num_logit_rows)
                before = worker.num_reads
                with torch.inference_mode(), self.fake, self.guard:
                    worker.step(batch, plan)
                assert worker.num_reads == before + 1
                ids = worker._samples
                assert ids.device == CUDA and ids.shape == (batch.num_logit_rows,) and ids.dtype == torch.int64


def chunk(request: int, start: int, tokens: Sequence[int], num_logits: int = 0, **more: Any) -> Chunk:
    """Rows of a request whose pages follow each other, behind those of the requests before it."""
    num_pages = 1024 // PAGE
    first = 1 + request % 3 * num_pages
    return Chunk(
        request=request,
        start=start,
        tokens=tuple(tokens),
        pages=tuple(range(first, first + num_pages)),
        num_logits=num_logits,
        **more,
    )


PREFILL = Batch(
    groups=(
        (chunk(0, 0, range(90), 1), chunk(1, 640, range(2), 1)),  # a prompt; two rows behind a long context
        (chunk(3, 0, range(7)),),  # not its last: no logits
    )
)
DECODE = Batch(
    groups=(
        (chunk(0, 90, [sample_ref(0)], 1), chunk(1, 642, [sample_ref(1)], 1), chunk(2, 17, [5], 1)),
        (),  # a group without rows
    )
)
MIXED = Batch(
    groups=(
        (chunk(0, 91, [sample_ref(0)], 1), chunk(2, 18, range(40), 40), chunk(1, 643, [sample_ref(1)], 1)),
        (chunk(3, 7, range(3), 1), chunk(4, 3, [9], 1)),
    )
)
EVERY = SamplingParams(
    temperature=0.7,
    top_k=40,
    top_p=0.9,
    min_p=0.01,
    repetition_penalty=1.1,
    presence_penalty=0.5,
    frequency_penalty=0.5,
    seed=1,
    logprobs=3,
)
SAMPLED = Batch(
    groups=(
        (chunk(5, 0, range(6), 2, sampling=EVERY, num_prompt=6), chunk(0, 92, [sample_ref(0)], 1)),
        (chunk(3, 10, [4], 1, sampling=SamplingParams(temperature=1.0, seed=2)),),
    )
)
SAMPLED_AGAIN = Batch(
    groups=((chunk(5, 6, [sample_ref(1)], 1, sampling=EVERY, num_prompt=6), chunk(0, 93, [sample_ref(2)], 1)), ())
)
STEPS = (PREFILL, DECODE, MIXED)


def test_every_executable_family_is_here() -> None:
    assert {raw["model_type"] for raw in FAMILIES.values()} == set(EXECUTABLE)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_named_layout_stays_on_the_device_and_never_waits(family: str, tmp_path: Path) -> None:
    config = read_config(FAMILIES[family])
    names = [name for name in applicable_layouts(config, MESH) if name != "auto"]
    assert names
    ranks = Ranks(FAMILIES[family], tmp_path, named_layout(names[0], config, MESH).forms)
    for name in names:
        assert named_layout(name, config, MESH).forms == ranks.resolved.forms
        ranks.walk(STEPS, name)


@pytest.mark.parametrize("forms", ["chosen", "furthest from the published"])
@pytest.mark.parametrize("family", FAMILIES)
def test_auto_stays_on_the_device_and_never_waits(family: str, forms: str, tmp_path: Path) -> None:
    config = read_config(FAMILIES[family])
    ranks = Ranks(FAMILIES[family], tmp_path, None if forms == "chosen" else form_choices(config, MESH)[-1])
    ranks.walk((*STEPS, SAMPLED, SAMPLED_AGAIN), "auto")
