"""CPU attention beside what else could compute it, and beside a large product and memory in the same run.

    python benchmarks/attention.py [--threads N] [--heads N] [--rounds N]

dsv3-mini's latent attention (``--heads`` of its 16 heads) and grouped-query attention of three shapes, prefill and
decode: the compiled kernels, those with torch's brgemm, the torch path, and (prefill) scaled_dot_product_attention. The
ways take turns; shown is the best round, since other work on a machine only ever adds time. One thread is timed by its
own CPU clock. FLOPs are those of the form that is chosen, with half of the square; bytes those of each context's slots,
once, and of the weights. Prints tables and ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from types import ModuleType
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional

from narrows.ops import gqa_attention as gqa_module
from narrows.ops import mla_attention as mla_module
from narrows.ops.compiled import torch_brgemm
from narrows.ops.gqa_attention import gqa_attention
from narrows.ops.kv_b import plain_halves, split_kv_b
from narrows.ops.linear import linear
from narrows.ops.mla_attention import mla_attention
from narrows.ops.packed import empty_linear, fill
from narrows.ops.paged import PagedRows, build_paged_rows

BF16, PAGE = torch.bfloat16, 16
NOPE, ROPE, RANK, VALUE = 128, 64, 512, 128
SLOTS = PAGE * 1200
GEMM = 2048, 1024, 4096
GQA = {"32 / 8 x 128": (32, 8, 128), "16 / 8 x 128": (16, 8, 128), "9 / 3 x 64": (9, 3, 64)}
DECODES = [(1, 16), (1, 512), (1, 2048), (1, 8192), (8, 512), (16, 512), (16, 1024)]

COLUMNS = (("brgemm", 11), ("torch", 10), ("sdpa", 9))
Ways = dict[str, Callable[[], object]]


def best(ways: Ways, rounds: int) -> dict[str, float]:
    """Seconds of one call of each way."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds = dict.fromkeys(ways, float("inf"))
    for turn in range(rounds + 1):
        for name, way in ways.items():
            start = clock()
            way()
            if turn:  # the first warms up
                seconds[name] = min(seconds[name], clock() - start)
    return seconds


def context(first_page: int, start: int, rows: int) -> tuple[int, int, tuple[int, ...]]:
    """A span whose pages begin at ``first_page``, going round in the cache."""
    num_pages = -(-(start + rows) // PAGE)
    return start, rows, tuple(1 + (first_page + page) % (SLOTS // PAGE - 1) for page in range(num_pages))


def decode_rows(num_rows: int, length: int) -> PagedRows:
    return build_paged_rows([context(b * -(-length // PAGE), length - 1, 1) for b in range(num_rows)], PAGE)


def large_product() -> Callable[[], Tensor]:
    rows, inputs, outputs = GEMM
    weight = empty_linear(outputs, inputs, BF16, torch.device("cpu"))
    fill(weight, 0, torch.randn(outputs, inputs))
    x = torch.randn(rows, inputs).to(BF16)
    return lambda: linear(x, weight)


def changed(op: Callable[[], Tensor], module: ModuleType, name: str, value: object) -> Callable[[], Tensor]:
    """``op`` with ``module.name()`` answering ``value``."""

    def way() -> Tensor:
        with patch.object(module, name, lambda: value):
            return op()

    return way


def prefill(cases: dict[str, tuple[float, Ways]], rounds: int) -> list[dict[str, float | str]]:
    """Table of cases: FLOPs, and the ways to compute them."""
    product, results = large_product(), []
    print(f"{'prefill':<28}{'ms':>9}{'GFLOP/s':>9}{'of GEMM':>9}{'brgemm ms':>11}{'torch ms':>10}{'sdpa ms':>9}")
    for name, (flops, ways) in cases.items():
        seconds = best({**ways, "product": product}, rounds)
        rate, gemm = flops / seconds["own"], 2 * GEMM[0] * GEMM[1] * GEMM[2] / seconds["product"]
        rest = "".join(f"{seconds[way] * 1e3:>{width}.1f}" for way, width in COLUMNS if way in ways)
        print(f"{name:<28}{seconds['own'] * 1e3:>9.1f}{rate / 1e9:>9.0f}{rate / gemm:>9.2f}{rest}")
        results.append({"case": name, "gemm": gemm, "flops": flops, **seconds})
    return results


def decode(cases: dict[str, tuple[int, Ways]], rounds: int) -> list[dict[str, float | str]]:
    """Table of cases: bytes, and the ways to read them."""
    much, results = torch.ones(64 << 20), []
    read = much.nbytes / best({"read": much.sum}, rounds)["read"]
    print(
        f"\n{'decode (rows x context)':<28}{'us':>9}{'GB/s':>9}{'torch us':>10}    read 256 MiB: {read / 1e9:.1f} GB/s"
    )
    for name, (num_bytes, ways) in cases.items():
        seconds = best({name: way for name, way in ways.items() if name != "brgemm"}, 4 * rounds)
        own, by_torch = seconds["own"], seconds["torch"]
        print(f"{name:<28}{own * 1e6:>9.0f}{num_bytes / own / 1e9:>9.1f}{by_torch * 1e6:>10.0f}")
        results.append({"case": name, "read": read, "bytes": num_bytes, **seconds})
    return results


def latent(heads: int) -> tuple[dict[str, tuple[float, Ways]], dict[str, tuple[int, Ways]]]:
    w_uk, w_uv = split_kv_b((torch.randn(heads, NOPE + VALUE, RANK) * 0.05).to(BF16), NOPE)
    plain_uk, plain_uv = plain_halves(w_uk, w_uv)
    cache = torch.randn(SLOTS, RANK + ROPE).to(BF16)

    def ways(rows: PagedRows, num_rows: int) -> Ways:
        q_nope, q_pe = torch.randn(num_rows, heads, NOPE + ROPE).to(BF16).split([NOPE, ROPE], dim=-1)
        own = lambda: mla_attention(q_nope, q_pe, cache, rows, w_uk, w_uv, 0.07)  # noqa: E731
        return {
            "own": own,
            "brgemm": changed(own, mla_module, "brgemm", torch_brgemm()),
            "torch": lambda: mla_attention(q_nope, q_pe, cache, rows, plain_uk, plain_uv, 0.07),
        }

    prefills: dict[str, tuple[float, Ways]] = {}
    for start, rows in ((0, 512), (0, 2048), (0, 8192), (6144, 2048), (2046, 2)):
        pairs, length = rows * (start + rows / 2), start + rows
        of_pair, expanded = (NOPE + ROPE + VALUE, length) if rows > 2 else (2 * RANK + ROPE, rows)
        flops = heads * 2 * (pairs * of_pair + expanded * RANK * (NOPE + VALUE))
        case = ways(build_paged_rows([context(0, start, rows)], PAGE), rows)
        if start == 0 and rows <= 2048:  # with expanded keys and values given, and values as wide as keys
            q, k, v = torch.randn(3, 1, heads, rows, NOPE + ROPE).to(BF16)
            case["sdpa"] = lambda q=q, k=k, v=v: functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        if rows > 2048:
            del case["torch"], case["brgemm"]
        prefills[f"latent, {heads} heads, {start} + {rows}"] = flops, case
    weights = heads * (NOPE + VALUE) * RANK * 2
    decodes = {
        f"latent, {heads} heads, {b} x {length}": (
            b * length * (RANK + ROPE) * 2 + weights,
            ways(decode_rows(b, length), b),
        )
        for b, length in DECODES
    }
    return prefills, decodes


def grouped(name: str) -> tuple[dict[str, tuple[float, Ways]], dict[str, tuple[int, Ways]]]:
    num_q, num_kv, dim = GQA[name]
    keys, values = torch.randn(2, SLOTS, num_kv, dim).to(BF16)
    kv_index = tuple(head * num_kv // num_q for head in range(num_q))

    def ways(rows: PagedRows, num_rows: int) -> Ways:
        q = torch.randn(num_rows, num_q, dim).to(BF16)
        own = lambda: gqa_attention(q, keys, values, rows, kv_index, dim**-0.5)  # noqa: E731
        return {
            "own": own,
            "brgemm": changed(own, gqa_module, "brgemm", torch_brgemm()),
            "torch": changed(own, gqa_module, "kernels", None),
        }

    prefills: dict[str, tuple[float, Ways]] = {}
    for rows in (512, 2048):
        case = ways(build_paged_rows([context(0, 0, rows)], PAGE), rows)
        q, k, v = torch.randn(3, 1, num_q, rows, dim).to(BF16)
        case["sdpa"] = lambda q=q, k=k, v=v: functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        prefills[f"{name}, {rows}"] = 2.0 * num_q * rows * rows * dim, case
    decodes = {
        f"{name}, {b} x {length}": (b * length * num_kv * dim * 4, ways(decode_rows(b, length), b))
        for b, length in DECODES
        if length != 1024
    }
    return prefills, decodes


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU attention beside its alternatives.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--heads", type=int, default=8, help="heads of latent attention on this rank")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with torch.inference_mode():
        tables = [latent(args.heads), *(grouped(name) for name in GQA)]
        prefills = prefill({name: case for table in tables for name, case in table[0].items()}, args.rounds)
        decodes = decode({name: case for table in tables for name, case in table[1].items()}, args.rounds)
    print(json.dumps({"threads": args.threads, "prefill": prefills, "decode": decodes}))


if __name__ == "__main__":
    main()
