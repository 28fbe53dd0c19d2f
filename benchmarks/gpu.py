"""What one NVIDIA card says about narrows, in three commands of under ten minutes each, which need nobody.

    python benchmarks/gpu.py facts         # ceilings, costs of launches and copies, what a graph may hold, tests/cuda
    python benchmarks/gpu.py kernels       # each op at real sizes in a graph: its share of its floor, its distance
    python benchmarks/gpu.py end-to-end    # bench latency of several models, walked and with graphs

A check that fails is a line that says so, and the next one runs; one that the time does not suffice for is left out,
and said. Results are in ``--out``, written anew after each check. The exit code is 0 if all checks passed, 1 if not, 2
without a card. ``kernels`` takes the ceilings that ``facts`` has left in ``--out``, else those of an H200.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from narrows.comm.device import DeviceGraph, gpu_name
from narrows.engine.worker import GRAPHS
from narrows.errors import ConfigError
from narrows.ops.causal_attention import causal_attention
from narrows.ops.experts import experts_mlp_grouped
from narrows.ops.gqa_attention import gqa_attention, gqa_attention_reference
from narrows.ops.mla_attention import mla_attention, mla_attention_reference
from narrows.ops.paged import PagedRows, stage_paged_rows
from narrows.ops.rms_norm import rms_norm, rms_norm_reference
from narrows.ops.route import router
from narrows.ops.step_block import StepBlock
from narrows.ops.wide_product import wide_mm

BF16, PAGE = torch.bfloat16, 16
ROOT = Path(__file__).parents[1]
H200 = {"copied_bytes_per_s": 4.3e12, "flops": 7.9e14}
LIMIT_S = 570
MODELS = ("dsv3-mini", "llama-3.1-8b", "deepseek-v2-lite")


@dataclass
class Report:
    """The results of one command's checks so far; ``until``: when the next one may no longer begin."""

    file: Path
    until: float
    results: dict[str, Any] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    @property
    def left_s(self) -> float:
        return self.until - time.monotonic()

    def check(self, name: str, run: Callable[[], Any], *, least_s: float = 5.0) -> None:
        """Runs one check, unless less than ``least_s`` is left, and writes down what it gives or why it gives none."""
        start = time.monotonic()
        try:
            if self.left_s < least_s:
                raise TimeoutError("no time was left for it")
            self.results[name] = run()
        except Exception as error:
            self.failed.append(name)
            where = traceback.format_exc().splitlines()[-3:]
            self.results[name] = {"failed": f"{type(error).__name__}: {str(error)[:300]}", "where": where}
        print(f"[{time.monotonic() - start:6.1f} s] {name}: {json.dumps(self.results[name])}", flush=True)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(self.results, indent=1), encoding="utf-8")

    def end(self) -> int:
        """The last line, and the exit code."""
        told = f"failed: {', '.join(self.failed)}" if self.failed else "all passed"
        print(json.dumps({"checks": len(self.results), "failed": self.failed, "file": str(self.file)}))
        print(f"{len(self.results)} checks, {told}", flush=True)
        return 1 if self.failed else 0


def milliseconds(call: Callable[[], object], rounds: int = 20) -> float:
    """The median by the card's own clock, after three calls that warm it up."""
    for _ in range(3):
        call()
    times: list[float] = []
    for _ in range(rounds):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return sorted(times)[rounds // 2]


def captured(call: Callable[[], Tensor]) -> tuple[DeviceGraph, Callable[[], Tensor]]:
    """A graph of ``call``, which has run before, and what gives its result after a replay."""
    found: list[Tensor] = []
    for _ in range(2):
        call()
    graph = DeviceGraph(torch.cuda.graph_pool_handle())
    graph.capture(lambda: found.append(call()))
    return graph, lambda: found[-1]


def distance(got: Tensor, want: Tensor) -> float:
    """The norm of the difference in norms of what is wanted."""
    return float((got.double() - want.double()).norm() / want.double().norm())


def drawn(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=BF16).mul_(scale)


def ceilings() -> dict[str, float]:
    source, a, b = drawn(1 << 30), drawn(8192, 8192), drawn(8192, 8192)
    target = torch.empty_like(source)
    copied = milliseconds(lambda: target.copy_(source), 10)
    multiplied = milliseconds(lambda: a @ b, 10)
    return {"copied_bytes_per_s": 2 * source.nbytes / copied * 1e3, "flops": 2 * 8192**3 / multiplied * 1e3}


def launch_costs() -> dict[str, float]:
    x = drawn(64, 1024)

    def many() -> Tensor:
        for _ in range(1000):
            x.add_(1)
        return x

    many()
    torch.cuda.synchronize()
    start = time.perf_counter()
    many()
    host_s = time.perf_counter() - start
    torch.cuda.synchronize()
    graph, _ = captured(many)
    return {"host_us_each": host_s * 1e3, "graph_us_each": milliseconds(graph.replay, 10)}


def copy_waits() -> dict[str, float]:
    """How long the host is held by a copy that is queued behind work of the card."""
    a, target = drawn(8192, 8192), torch.empty(64, device="cuda")
    kinds = {"pageable": torch.zeros(64), "pinned": torch.zeros(64).pin_memory()}
    held = {}
    for name, source in kinds.items():
        torch.cuda.synchronize()
        for _ in range(20):
            a @ a
        start = time.perf_counter()
        target.copy_(source, non_blocking=True)
        held[f"{name}_ms"] = (time.perf_counter() - start) * 1e3
        torch.cuda.synchronize()
    return held


def block_arrives() -> dict[str, bool]:
    """Two blocks sent in turn, the first's memory handed back at once: each arrives whole."""
    right = True
    for turn in range(50):
        block = StepBlock(torch.device("cuda"))
        parts = [block.put([turn] * 1000), block.put([turn / 7.0] * 10, float)]
        block.send()
        right &= bool((parts[0].tensor == turn).all()) and bool((parts[1].tensor == turn / 7.0).all())
    assert right, "a block came with other numbers"
    return {"right": right}


def grouped_replays() -> dict[str, float]:
    """A captured grouped product, replayed with other offsets and empty groups (pytorch#169970)."""
    experts, inputs, outputs, pairs = 64, 2048, 1408, 48
    weights, x = drawn(experts, outputs, inputs, scale=inputs**-0.5), drawn(pairs, inputs)
    ends = torch.zeros(experts, device="cuda", dtype=torch.int32)
    graph, result = captured(lambda: functional.grouped_mm(x, weights.transpose(1, 2), offs=ends))
    worst = 0.0
    for seed in range(20):
        torch.manual_seed(seed)
        chosen = torch.randint(0, experts, (pairs,), device="cuda").sort().values
        ends.copy_(torch.searchsorted(chosen, torch.arange(experts, device="cuda"), right=True))
        x.normal_()
        graph.replay()
        want = torch.bmm(x[:, None].float(), weights[chosen].float().transpose(1, 2))[:, 0]
        worst = max(worst, distance(result(), want))
    assert worst < 1e-2, f"replays are off by {worst}"
    return {"worst_distance": worst}


def wide_router() -> dict[str, Any]:
    found = {}
    for rows in (1, 64, 8192):
        x, gate = drawn(rows, 7168), drawn(256, 7168)
        wide = gate.float()
        found[str(rows)] = {
            "distance": distance(wide_mm(x, gate.t()), x.float() @ wide.t()),
            "ms": milliseconds(partial(wide_mm, x, gate.t())),
            "float32_ms": milliseconds(partial(torch.mm, x.float(), wide.t())),
        }
    return found


def prefill_kernels() -> dict[str, Any]:
    """The rate of prompts' attention, whole and behind a prefix, as narrows calls it."""
    found = {}
    for name, heads, dim, value_dim, rows, context in (
        ("mla", 128, 192, 128, 4096, 4096),
        ("mla behind a prefix", 128, 192, 128, 1024, 4096),
        ("gqa", 32, 128, 128, 8192, 8192),
        ("gqa behind a prefix", 32, 128, 128, 2048, 8192),
    ):
        q, k, v = drawn(heads, 1, rows, dim), drawn(heads, context, dim), drawn(heads, context, value_dim)
        flops = 2 * heads * (dim + value_dim) * (rows * context - rows * rows / 2)
        ms = milliseconds(partial(causal_attention, q, k, v, dim**-0.5), 5)
        found[name] = {"ms": ms, "tflops": flops / ms / 1e9}
    return found


def cuda_tests(left_s: float) -> dict[str, str]:
    line = [sys.executable, "-m", "pytest", "-q", "tests/cuda"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=left_s)
    last = (done.stdout.strip().splitlines() or [""])[-1]
    assert done.returncode == 0, "\n".join([*done.stdout.splitlines()[-20:], *done.stderr.splitlines()[-5:]])
    return {"pytest": last}


@dataclass(frozen=True)
class Case:
    """An op at one size: what to call, what it should give if a twin says that, bytes and FLOPs that it has to take."""

    call: Callable[[], Tensor]
    reference: Callable[[], Tensor] | None
    nbytes: float
    flops: float

    def measure(self, ceiling: Mapping[str, float]) -> dict[str, float]:
        graph, result = captured(self.call)
        graph.replay()
        found: dict[str, float] = {}
        if self.reference is not None:
            found["distance"] = distance(result(), self.reference())
            assert found["distance"] < 2e-2, f"off by {found['distance']}"
        ms = milliseconds(graph.replay)
        floor = max(self.nbytes / ceiling["copied_bytes_per_s"], self.flops / ceiling["flops"]) * 1e3
        return found | {"ms": ms, "floor_ms": floor, "share": floor / ms}


def measured(make: Callable[[], Case], ceiling: Mapping[str, float]) -> dict[str, float]:
    return make().measure(ceiling)


def product(rows: int, inputs: int, outputs: int) -> Case:
    x, weight = drawn(rows, inputs), drawn(outputs, inputs)
    return Case(lambda: x @ weight.t(), None, weight.nbytes + x.nbytes, 2 * rows * inputs * outputs)


def norm(rows: int, width: int) -> Case:
    x, weight = drawn(rows, width), drawn(width)
    return Case(lambda: rms_norm(x, weight, 1e-6), lambda: rms_norm_reference(x, weight, 1e-6), 2 * x.nbytes, 0)


def routed(rows: int, experts: int, top_k: int, hidden: int, inner: int) -> Case:
    """Experts with their router; at few rows its floor is the weights of the chosen."""
    x, gate = drawn(rows, hidden), drawn(experts, hidden, scale=hidden**-0.5)
    gate_up = drawn(experts, 2 * inner, hidden, scale=hidden**-0.5)
    down = drawn(experts, hidden, inner, scale=inner**-0.5)
    rule: dict[str, Any] = {
        "top_k": top_k,
        "scoring": "softmax",
        "method": "greedy",
        "num_groups": None,
        "topk_group": None,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
    }

    def call() -> Tensor:
        return experts_mlp_grouped(x, *router(x, gate, **rule), gate_up, down, first_expert=0)

    expected = experts * (1 - (1 - top_k / experts) ** rows)
    return Case(call, None, expected * 6 * inner * hidden, 6 * rows * top_k * inner * hidden)


def decode_rows(rows: int, length: int) -> tuple[PagedRows, int]:
    """Decode rows of equal contexts in pages of no order, and how many slots there are."""
    pages = -(-length // PAGE)
    order = (np.random.default_rng(0).permutation(rows * pages) + 1).reshape(rows, pages).tolist()
    block = StepBlock(torch.device("cuda"))
    make = stage_paged_rows([(length - 1, 1, of_row) for of_row in order], PAGE, block, BF16)
    block.send()
    return make(), PAGE * (1 + rows * pages)


def latent_decode(rows: int, length: int, heads: int) -> Case:
    nope, rope, rank, value = 128, 64, 512, 128
    paged, slots = decode_rows(rows, length)
    cache, q = drawn(slots, rank + rope), drawn(rows, heads, nope + rope)
    w_uk, w_uv = drawn(heads, nope, rank, scale=rank**-0.5), drawn(heads, value, rank, scale=rank**-0.5)
    args = q[..., :nope], q[..., nope:], cache, paged, w_uk, w_uv, (nope + rope) ** -0.5
    nbytes = rows * length * (rank + rope) * 2 + w_uk.nbytes + w_uv.nbytes
    flops = 2 * rows * heads * (length * (2 * rank + rope) + rank * (nope + value))
    return Case(lambda: mla_attention(*args), lambda: mla_attention_reference(*args), nbytes, flops)


def head_decode(rows: int, length: int, heads: int, kv_heads: int) -> Case:
    paged, slots = decode_rows(rows, length)
    keys, values, q = drawn(slots, kv_heads, 128), drawn(slots, kv_heads, 128), drawn(rows, heads, 128)
    args = q, keys, values, paged, tuple(head // (heads // kv_heads) for head in range(heads)), 128**-0.5
    nbytes = 2 * rows * length * kv_heads * 128 * 2
    return Case(
        lambda: gqa_attention(*args),
        lambda: gqa_attention_reference(*args),
        nbytes,
        4 * rows * heads * length * 128,
    )


def cases() -> dict[str, Callable[[], Case]]:
    """Every op at the sizes of published models; a case takes its memory when it is made."""
    found: dict[str, Callable[[], Case]] = {}
    for rows in (1, 8, 64, 512):
        found[f"norm, {rows} rows of 7168"] = partial(norm, rows, 7168)
        found[f"product, {rows} rows, llama gate and up"] = partial(product, rows, 4096, 28672)
        found[f"product, {rows} rows, v3 output"] = partial(product, rows, 16384, 7168)
        found[f"experts, {rows} rows, v2-lite"] = partial(routed, rows, 64, 6, 2048, 1408)
        found[f"experts, {rows} rows, qwen3-30b"] = partial(routed, rows, 128, 8, 2048, 768)
    for rows, length in ((1, 1024), (8, 1024), (64, 1024), (8, 8000)):
        for heads in (16, 128):
            name = f"latent decode, {rows} rows of {length}, {heads} heads"
            found[name] = partial(latent_decode, rows, length, heads)
        found[f"grouped-query decode, {rows} rows of {length}"] = partial(head_decode, rows, length, 32, 8)
    return found


def latency_line(model: str, left_s: float) -> list[str]:
    """The command that measures prompts and decode steps of one model with random weights."""
    options = "--load-format dummy --run-on cuda --dtype bfloat16 --rounds 3 --batches 1,8,64 --prompt-lengths 512,2048"
    room = f"--max-context 9000 --kv-tokens 100000 --rank-timeout {max(30, round(left_s))}"
    return [sys.executable, "-m", "narrows", "bench", "latency", model, *options.split(), *room.split()]


def latency(model: str, graphs: bool, out: Path, left_s: float) -> list[str]:
    environment = os.environ | {GRAPHS: "1" if graphs else "0"}
    done = subprocess.run(
        latency_line(model, left_s), env=environment, capture_output=True, text=True, timeout=min(left_s, 180)
    )
    name = f"latency_{model}_{'graphs' if graphs else 'walked'}.txt"
    (out / name).write_text(done.stdout + done.stderr, encoding="utf-8")
    lines = [*done.stdout.splitlines(), *done.stderr.splitlines()]
    assert done.returncode == 0, f"exit code {done.returncode}: {lines[-3:]}"
    return lines[-12:]


def facts(report: Report) -> None:
    checks: dict[str, Callable[[], Any]] = {
        "machine": lambda: {"gpu": gpu_name(), "torch": torch.__version__, "cuda": torch.version.cuda},
        "ceilings": ceilings,
        "a launch": launch_costs,
        "a copy behind other work": copy_waits,
        "a step's block": block_arrives,
        "grouped products replayed": grouped_replays,
        "router scores of 16-bit products": wide_router,
        "attention of prompts": prefill_kernels,
    }
    for name, run in checks.items():
        report.check(name, run)
    report.check("tests/cuda", lambda: cuda_tests(report.left_s), least_s=60)


def kernels(report: Report) -> None:
    ceiling: dict[str, float] = dict(H200)
    before = report.file.with_name("facts.json")
    if before.exists():
        ceiling |= {
            name: value for name, value in json.loads(before.read_text()).get("ceilings", {}).items() if name in H200
        }
    for name, make in cases().items():
        report.check(name, partial(measured, make, ceiling))
        torch.cuda.empty_cache()


def end_to_end(report: Report) -> None:
    for model in MODELS:
        for graphs in (False, True):
            name = f"{model}, {'graphs' if graphs else 'walked'}"
            report.check(name, partial(latency, model, graphs, report.file.parent, report.left_s), least_s=60)


COMMANDS = {"facts": facts, "kernels": kernels, "end-to-end": end_to_end}


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "runs/gpu")), help="folder of results")
    parser.add_argument("--limit", type=float, default=LIMIT_S, metavar="S", help="seconds (default %(default)s)")
    asked = parser.parse_args(args)
    try:
        gpu_name()
    except ConfigError as error:
        print(f"nothing was measured: {error}")
        return 2
    report = Report(asked.out / f"{asked.command}.json", time.monotonic() + asked.limit)
    with torch.inference_mode():
        COMMANDS[asked.command](report)
    return report.end()


if __name__ == "__main__":
    sys.exit(main())
