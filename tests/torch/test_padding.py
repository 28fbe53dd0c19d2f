"""Decode steps padded with dead rows, and steps walked again as graphs would run them, change nothing. On CPU.

`Rewalk` stands in for a CUDA graph: what it replays is the walk of the first step with that step's own Python objects,
so whatever a graph would hold for ever is held here too, and only the memory of the block has other numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from narrows.engine import sampler
from narrows.engine.capture import Ran
from narrows.engine.config import EngineConfig, resolve
from narrows.engine.core import Engine
from narrows.engine.padding import padded
from narrows.engine.program import Program
from narrows.engine.step_record import StepRecord
from narrows.engine.worker import Worker
from narrows.models import moe
from narrows.ops import paged
from narrows.ops.experts import experts_mlp_grouped
from narrows.ops.sample import sample_reference
from narrows.sched.batch import Batch
from narrows.sched.sampling import SamplingParams

TinyModel = Callable[..., Path]
KINDS = ("v3", "v2", "v2-lite", "llama", "llama-9", "qwen2", "qwen3", "qwen3-moe")
GENERATOR = torch.Generator().manual_seed(3)
PROMPTS = [
    tuple(torch.randint(0, 67, (n,), generator=GENERATOR).tolist()) for n in (5, 19, 1, 33, 12, 7, 8, 2, 21, 3, 4)
]
DRAWN = SamplingParams(temperature=0.8, top_k=20, top_p=0.95, min_p=0.01, seed=7, logprobs=2)
SAMPLINGS = [SamplingParams(repetition_penalty=1.2), DRAWN, None, SamplingParams(temperature=1.0, seed=3), None]


def texts(folder: Path, dp: int = 1, tp: int = 1, *, drawn: bool = True, **options: Any) -> list[tuple[Any, ...]]:
    """Tokens and log-probabilities of requests of several lengths, which end one after the other."""
    asked = EngineConfig(model=str(folder), dp=dp, tp=tp, dtype="float32", max_context=64, page_size=4, **options)
    with Engine(resolve(asked)) as engine:
        requests = [
            engine.add(prompt, 4 + 2 * i, sampling=SAMPLINGS[i] if drawn and i < 5 else None)
            for i, prompt in enumerate(PROMPTS)
        ]
        for _ in engine.run():
            pass
        return [(request.output, [value for value, _ in request.logprobs]) for request in requests]


def check_same(got: list[tuple[Any, ...]], want: list[tuple[Any, ...]]) -> None:
    for (tokens, logprobs), (want_tokens, want_logprobs) in zip(got, want, strict=True):
        assert tokens == want_tokens
        assert logprobs == pytest.approx(want_logprobs, abs=1e-4)


def walked(patch: pytest.MonkeyPatch) -> None:
    """No capture of the CPU's has a part in it."""
    patch.setattr(Worker, "_run_captured", lambda *_, **__: None)


def pad_all(patch: pytest.MonkeyPatch) -> list[int]:
    """Pads every decode step that can be; the dead rows of each come into the list."""
    run: Any = Worker._run
    dead: list[int] = []

    def run_padded(self: Worker, program: Program, batch: Batch, record: StepRecord | None) -> Ran:
        if batch.phase != "decode" or batch.num_logit_rows != batch.num_rows:
            return run(self, program, batch, record)
        made = padded(batch)
        dead.append(made.batch.num_rows - batch.num_rows)
        return run(self, program, made.batch, record, made)

    walked(patch)
    patch.setattr(Worker, "_run", run_padded)
    return dead


@pytest.mark.parametrize(("dp", "tp"), [(1, 1), (2, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_dead_rows_change_no_text(
    tiny_model: TinyModel, kind: str, dp: int, tp: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        walked(patch)
        want = texts(tiny_model(kind), dp, tp)
    dead = pad_all(monkeypatch)
    check_same(texts(tiny_model(kind), dp, tp), want)
    assert sum(dead) > 0


@pytest.mark.parametrize("kind", ["v3", "qwen3-moe"])
def test_dead_rows_reach_no_expert_and_no_page(
    tiny_model: TinyModel, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The choice of dead rows is -1, and what they write is in the first slot of the null page."""
    chosen, experts_mlp = [], moe.experts_mlp

    def experts(x_TH: Tensor, topk_ids_TK: Tensor, *args: Any, **options: Any) -> Tensor:
        chosen.append(topk_ids_TK.clone())
        return experts_mlp(x_TH, topk_ids_TK, *args, **options)

    monkeypatch.setattr(moe, "experts_mlp", experts)
    made: list[Worker] = []
    build = Worker.__init__

    def keep(self: Worker, *args: Any, **options: Any) -> None:
        build(self, *args, **options)
        made.append(self)

    monkeypatch.setattr(Worker, "__init__", keep)
    dead = pad_all(monkeypatch)
    texts(tiny_model(kind))
    of_none = [int((ids_TK == -1).all(dim=1).sum()) for ids_TK in chosen]
    assert 0 < sum(of_none) == (2 if kind == "v3" else 3) * sum(dead), "a layer with experts sees each dead row once"
    assert all(((ids_TK >= 0) == (ids_TK[:, :1] >= 0)).all() for ids_TK in chosen)
    for cache in made[0].caches():
        null = cache[:4].flatten(1)
        assert null[0].any() and not null[1:].any()


class Trace(TorchDispatchMode):
    """The torch ops of a walk, with shapes and scalars."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def held(value: Any) -> Any:
            return (tuple(value.shape), value.stride(), value.dtype) if isinstance(value, Tensor) else value

        self.ops.append(f"{func} {tree_map(held, (args, kwargs))}")
        return func(*args, **(kwargs or {}))


class Rewalk:
    """Stands in for a graph: walks again, and compares the ops with those of the capture."""

    def __init__(self) -> None:
        self.replays = 0

    def _traced(self) -> list[str]:
        with Trace() as trace:
            self._walk()
        return trace.ops

    def capture(self, walk: Callable[[], None]) -> None:
        self._walk = walk
        self._ops = self._traced()

    def replay(self) -> None:
        self.replays += 1
        assert self._traced() == self._ops, "a replay would give the device other ops"


def graphs(patch: pytest.MonkeyPatch) -> list[Rewalk]:
    """Has every rank alone make stand-ins, and run the ops of GPUs where the CPU's ask for values; what was made."""
    made: list[Rewalk] = []

    def new() -> Rewalk:
        made.append(Rewalk())
        return made[-1]

    def experts(*args: Any, batch_invariant: bool, **options: Any) -> Tensor:
        return experts_mlp_grouped(*args, **options)

    walked(patch)
    patch.setattr(Worker, "_new_graph", lambda self: new)
    patch.setattr(moe, "experts_mlp", experts)
    patch.setattr(sampler, "sample", sample_reference)
    return made


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_replayed_steps_are_walked_ones(
    tiny_model: TinyModel, kind: str, drawn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        walked(patch)
        want = texts(tiny_model(kind), drawn=drawn)
    made = graphs(monkeypatch)
    check_same(texts(tiny_model(kind), drawn=drawn), want)
    assert any(graph.replays > 1 for graph in made), "each is replayed once when it is captured"


@pytest.mark.parametrize("change", [{"sliding_window": 6}, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}])
def test_windows_and_angles_by_length_are_replayed(
    tiny_model: TinyModel, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_model("llama", model_type="mistral", max_position_embeddings=64, tie_word_embeddings=False, **change)
    with monkeypatch.context() as patch:
        walked(patch)
        want = texts(folder, drawn=False)
    made = graphs(monkeypatch)
    check_same(texts(folder, drawn=False), want)
    assert any(graph.replays > 1 for graph in made)


def test_a_number_of_the_host_in_a_graph_is_found(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bias made of the first step's lengths, as a graph would keep it: the texts differ."""
    bias = paged._bias

    def stale(lens_B: Tensor, most: int, dtype: torch.dtype) -> Tensor:
        key = tuple(lens_B.shape), most
        if key not in held:
            held[key] = lens_B.clone()
        return bias(held[key], most, dtype)

    held: dict[Any, Tensor] = {}
    with monkeypatch.context() as patch:
        walked(patch)
        want = texts(tiny_model("v3"), drawn=False)
    graphs(monkeypatch)
    monkeypatch.setattr(paged, "_bias", stale)
    assert texts(tiny_model("v3"), drawn=False) != want


def test_a_capture_that_fails_or_lies_ends_graphs_and_changes_nothing(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        walked(patch)
        want = texts(tiny_model("llama"))

    def fails(self: Rewalk, walk: Callable[[], None]) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    def lies(self: Rewalk) -> None:
        self._walk()
        registers = self._walk.__self__.registers  # type: ignore[attr-defined]
        for tensor in registers:
            if isinstance(tensor, Tensor) and tensor.dtype == torch.int64:
                tensor += 1

    made = graphs(monkeypatch)
    for name, fault, why in (("capture", fails, "not permitted"), ("replay", lies, "other tokens")):
        with monkeypatch.context() as patch:
            patch.setattr(Rewalk, name, fault)
            before = len(made)
            check_same(texts(tiny_model("llama")), want)
            assert len(made) == before + 1 and why in caplog.text
