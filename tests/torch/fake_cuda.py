"""Ranks on fake CUDA tensors: whole steps of every family as a GPU would be given them, without one.

torch's FakeTensorMode propagates shapes, dtypes and devices and computes nothing, so these run at the published sizes.
Every rank of a mesh runs alone, through the real Worker, bind, Program and Communicator, whose NCCL is torch's fake
process group. A test module takes the fixtures ``cuda_device_guard``, ``nccl`` and ``prefixes`` by importing
them.
"""

import ctypes
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torchgen.gen
from torch import Tensor
from torch._C._distributed_c10d import FakeProcessGroup
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
)
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchgen.model import DispatchKey

from narrows.arch.presets import PRESETS
from narrows.arch.weight_sharding import WeightSharding
from narrows.arch.weights import Weight
from narrows.comm import Communicator
from narrows.comm.buffers import Buffers
from narrows.comm.process_groups import NcclTransport
from narrows.engine.config import EngineConfig, Resolved, resolve
from narrows.engine.program import Frame, Operation, Registers, Wrap
from narrows.engine.worker import Worker
from narrows.layout import Mesh
from narrows.models.decoder import RankContext
from narrows.ops import causal_attention
from narrows.plan.cache import PlanCache, PlanKey
from narrows.plan.plan import Op
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
_MISTRAL = {
    "model_type": "mistral",
    "hidden_size": 4096,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "sliding_window": None,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {**PRESETS["deepseek-v2"], **_FEWER},
    "deepseek_v2 without q_lora_rank": {**PRESETS["deepseek-v2-lite"], **_FEWER},
    "deepseek_v3": {**PRESETS["deepseek-v3"], **_FEWER},
    "llama": {**PRESETS["llama-3.1-8b"], "num_hidden_layers": 1},
    "qwen2": {**_QWEN2, "num_hidden_layers": 1},
    "qwen3": {**_QWEN3, "num_hidden_layers": 1},
    "qwen3_moe": {**PRESETS["qwen3-30b-a3b"], "num_hidden_layers": 1, "num_experts": 64},
    "mistral with windows": {**_MISTRAL, "sliding_window": 8, "hidden_act": "relu2"},
    "mistral by length": {
        **_MISTRAL,
        "max_position_embeddings": 4,
        "rope_scaling": {"type": "dynamic", "factor": 2000.0},
    },
    "glm4_moe": {**PRESETS["glm-4.5"], "num_hidden_layers": 1, "first_k_dense_replace": 0, "n_routed_experts": 64},
}

MESH = Mesh.of(dp=2, tp=2)


class StepError(AssertionError):
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


@cache
def is_composite(func: Any) -> bool:
    """Whether an op is other ops on every device, and has no kernels of its own."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


class Called(NamedTuple):
    """One op that a step gave to the device: the stage or move that called it (empty before the plan) and its layer."""

    stage: str
    layer: int | None
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any

    @property
    def launches(self) -> bool:
        """Whether it is work of the device: neither a view, nor memory without contents, nor of no elements."""
        if self.func.is_view or self.func.overloadpacket in _NO_WORK:
            return False
        return any(tensor.fake_device == CUDA and tensor.numel() for tensor in _tensors(self.result))

    @property
    def copies_from(self) -> FakeTensor | None:
        """The tensor of one device that it copies to another."""
        sources = [tensor for tensor in _tensors([self.args, self.kwargs]) if tensor.fake_device != CUDA]
        return sources[0] if sources and CUDA in _devices([self.args, self.result]) else None


class StepGuard(TorchDispatchMode):
    """Sees every op of a step before FakeTensorMode does, and refuses those that fail only on a real GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = ""
        """The stage or move that is running; empty before and after the plan."""
        self.layer: int | None = None
        self.seen: set[str] = set()
        self.calls: list[Called] | None = None
        """Every op of the steps since a list was put here, in order; attention that is one kernel on a GPU is one."""
        self._inside = False

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return func(*args, **kwargs)
        if is_composite(func):  # in inference mode composite ops arrive whole: look at their parts
            whole, was_inside = func.overloadpacket in _ONE_KERNEL, self._inside
            self._inside |= whole
            with self:
                result = func.decompose(*args, **kwargs)
            self._inside = was_inside
            if whole:
                self._note(func, args, kwargs, result)
            return result
        where = f"{self.stage or 'outside the plan'}: {func}"
        if self.stage:
            self.seen.add(self.stage)
            if func.namespace == "aten" and func.name() not in ops_with_cuda_kernels():
                raise StepError(f"{where} has no CUDA kernel")
            if func.overloadpacket in _INDEXING and any(index.dtype == torch.bool for index in _tensors(args[1])):
                raise StepError(f"{where} takes a boolean mask, whose rows the host must count; masked_fill does not")
        result = func(*args, **kwargs)
        read, left = _devices([args, kwargs]), _devices(result)
        if CUDA in read and left - {CUDA}:
            raise StepError(f"{where} reads the device on the host")
        if self.stage and (read | left) - {CUDA}:
            raise StepError(f"{where} has tensors on {sorted(map(str, read | left))}, in a step of {CUDA}")
        self._note(func, args, kwargs, result)
        return result

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if self.calls is not None and not self._inside:
            self.calls.append(Called(self.stage, self.layer, func, args, kwargs, result))


_ONE_KERNEL = (torch.ops.aten.scaled_dot_product_attention, torch.ops.aten._fused_rms_norm)
_NO_WORK = (
    torch.ops.aten.empty,
    torch.ops.aten.empty_like,
    torch.ops.aten.empty_strided,
    torch.ops.aten.new_empty,
    torch.ops.aten.new_empty_strided,
    torch.ops.aten.detach_,
    torch.ops.aten.lift_fresh,
    torch.ops.aten._unsafe_view,
)

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


class FakeNccl:
    """NcclTransport's group without NCCL: a group without peers."""

    Options = staticmethod(lambda: None)

    def __new__(cls, store: None, me: int, size: int, options: None) -> Any:
        return FakeProcessGroup._create_internal(me, size)


class FakeBuffers(Buffers):
    """Buffers are identified by address, which fake tensors lack, so each counts as new."""

    def lend(self, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        return torch.empty((rows, width), dtype=dtype, device=self._device)

    def give_back(self, tensors: Sequence[Tensor]) -> None:
        pass

    def owned(self, x: Tensor) -> Tensor:
        return x


class FakeCommunicator(Communicator):
    """A process among GPUs, alone. Checked mode: tensors are checked against the row counts, but with no other rank."""

    def __init__(self, mesh: Mesh, rank: int) -> None:
        spans = [(first, last) for first in range(mesh.num_axes) for last in range(first + 1, mesh.num_axes + 1)]
        groups = {mesh.group(rank, first, last) for first, last in spans}
        host: Any = None  # nothing in main memory is exchanged
        transports = {ranks: NcclTransport(None, ranks.index(rank), len(ranks), host) for ranks in groups}
        super().__init__(mesh, rank, transports, checked=True, buffers=FakeBuffers(CUDA), device=CUDA)

    def _compare(self, *_: Any) -> None:
        pass


class FakeWeights:
    """A checkpoint of fake tensors in host memory."""

    def take(self, weight: Weight, span: tuple[int, int] | None, expert: int | None = None) -> Tensor:
        shape = list(weight.shape)
        if span is not None:
            shape[weight.dim or 0] = span[1] - span[0]
        return torch.empty(shape, dtype=torch.bfloat16)


class FakeWorker(Worker):
    """A Worker without sampled ids, since fake tensors hold no values."""

    num_reads = 0

    def _read(self, *_: Any) -> Any:
        self.num_reads += 1
        return None


@pytest.fixture(scope="module", autouse=True)
def cuda_device_guard() -> Iterator[None]:
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


@pytest.fixture(scope="module", autouse=True)
def nccl() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "ProcessGroupNCCL", FakeNccl, raising=False)
        yield


@pytest.fixture(scope="module", autouse=True)
def prefixes() -> Iterator[None]:
    """torch's description of rows behind a prefix is no fake tensor: here the same kernel gets none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            causal_attention,
            "_behind_a_prefix",
            lambda q, k, v, scale: functional.scaled_dot_product_attention(q, k, v, scale=scale),
        )
        yield


class Ranks:
    """Ranks of one family, one after the other, with weights held as ``sharding`` says."""

    def __init__(
        self,
        raw: dict[str, Any],
        folder: Path,
        sharding: WeightSharding | None,
        ranks: Sequence[int] = (0, 3),
        *,
        batch_invariant: bool = False,
        encode_rows: str = "none",
        mesh: Mesh = MESH,
    ) -> None:
        self.mesh = mesh
        file = folder / "config.json"
        file.write_text(json.dumps(raw), encoding="utf-8")
        engine_config = EngineConfig(
            model=str(file),
            dp=mesh.num_groups,
            tp=mesh.group_size,
            dtype="bfloat16",
            device="h100",
            max_context=2048,
            kv_tokens=SLOTS,
            page_size=PAGE,
            encode_rows=encode_rows,
        )
        self.resolved, self.batch_invariant = resolve(engine_config, sharding), batch_invariant
        self.guard = StepGuard()
        self.fake = FakeTensorMode()
        self.planners = {
            want_logits: Planner(replace(self.resolved.deployment, want_logits=want_logits), self.resolved.sharding)
            for want_logits in (False, True)
        }
        with torch.inference_mode(), self.fake:
            self.workers = [self._worker(rank) for rank in ranks]
        self.plans: dict[str, dict[bool, PlanCache]] = {}

    def _worker(self, rank: int) -> FakeWorker:
        resolved: Resolved = self.resolved
        rank_context = RankContext(
            mesh=self.mesh,
            rank=rank,
            sharding=resolved.sharding,
            dtype=resolved.dtype,
            device=CUDA,
            num_slots=resolved.num_slots,
            num_positions=resolved.limits.max_context,
            batch_invariant=self.batch_invariant,
        )
        return FakeWorker(
            FakeCommunicator(self.mesh, rank),
            resolved.config,
            FakeWeights(),
            rank_context,
            self.planners[False].chain.fields,
            page_size=PAGE,
            wrap=self._wrap,
        )

    def _wrap(self, worker: Worker) -> Wrap:
        def around(
            layer: int | None, op: Op, reads: tuple[int, ...], writes: tuple[int, ...], operation: Operation
        ) -> Operation:
            stage = f"{op.name} before {op.boundary}" if op.stage is None else op.name

            def watched(regs: Registers, frame: Frame) -> None:
                self.guard.stage, self.guard.layer = stage, layer
                try:
                    operation(regs, frame)
                except Exception as error:
                    error.add_note(f"in {stage}, layer {layer}, rank {worker.rank_context.rank}")
                    raise
                finally:
                    self.guard.stage, self.guard.layer = "", None

            return watched

        return around

    def run(self, batches: Sequence[Batch], layout: str) -> None:
        """Run the batches, in order, on every one of the ranks."""
        if layout not in self.plans:
            self.plans[layout] = {want: PlanCache(planner, layout, 1024) for want, planner in self.planners.items()}
        caches = self.plans[layout]
        for worker in self.workers:
            for batch in batches:
                plan = caches[batch.needs_logits].plan_for(batch)
                before = worker.num_reads
                with torch.inference_mode(), self.fake, self.guard:
                    worker.step(batch, plan)
                assert worker.num_reads == before + 1
                assert {op.name for _, op in plan.ops() if op.stage is not None} <= self.guard.seen
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
KEY = PlanKey.of(PREFILL.phase, PREFILL.group_rows, PREFILL.num_logit_rows)
