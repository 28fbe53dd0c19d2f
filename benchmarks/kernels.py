"""CPU products and row-wise ops beside their alternatives: torch, oneDNN's packed weights, our packed weights, brgemm.

    python benchmarks/kernels.py [--threads N] [--rows 1,8,...] [--rounds N]

The ways take turns within each round, over enough copies of a weight that none stays in the cache; what is shown is the
best round, since other work on a machine only ever adds time. One thread is timed by its own CPU clock. Prints tables
and ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from narrows.ops.argmax import pick, shard_argmax
from narrows.ops.compiled import kernels, torch_brgemm
from narrows.ops.encode_rows import decode_rows, decode_rows_reference, encode_rows, encode_rows_reference
from narrows.ops.experts import experts_mlp
from narrows.ops.int8 import Quantization
from narrows.ops.linear import _packed_linear, linear
from narrows.ops.packed import PackedLinear, empty_experts, empty_gate_up, empty_linear, fill
from narrows.ops.rms_norm import add_rms_norm, latent_norm, rms_norm
from narrows.ops.route import router

BF16, CPU = torch.bfloat16, torch.device("cpu")
PRODUCTS = {  # inputs, outputs of dsv3-mini, and of its halves on two ranks
    "qkv_a": (1024, 960),
    "q_b": (384, 3072),
    "q_b / 2": (384, 1536),
    "o": (2048, 1024),
    "o / 2": (1024, 1024),
    "gate_up": (1024, 5632),
    "down": (2816, 1024),
    "down / 2": (1408, 1024),
    "head": (1024, 32000),
}
BEYOND_THE_CACHE = 96 << 20
"""Bytes of weights that are gone through before one is used again."""


def best(ways: dict[str, Callable[[int], object]], rounds: int, repeats: int) -> dict[str, float]:
    """Seconds of one call of each way; a call gets a rising number."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds = dict.fromkeys(ways, float("inf"))
    for turn in range(rounds + 1):
        for name, way in ways.items():
            start = clock()
            for i in range(repeats):
                way(i)
            if turn:  # the first warms up
                seconds[name] = min(seconds[name], (clock() - start) / repeats)
    return seconds


def packed(weight_OI: Tensor, quantization: Quantization = Quantization.NONE) -> PackedLinear:
    ready = empty_linear(*weight_OI.shape, BF16, CPU, quantization)
    assert isinstance(ready, PackedLinear)
    fill(ready, 0, weight_OI)
    return ready


def product(num_rows: int, num_inputs: int, num_outputs: int, rounds: int) -> dict[str, float]:
    copies = max(1, BEYOND_THE_CACHE // (2 * num_inputs * num_outputs))
    plain = [torch.randn((num_outputs, num_inputs)).to(BF16) for _ in range(copies)]
    ready = [packed(weight) for weight in plain]
    onednn = [torch.ops.mkldnn._reorder_linear_weight(weight, num_rows) for weight in plain]
    x, many = torch.randn((num_rows, num_inputs)).to(BF16), torch_brgemm()
    quantised = {
        kind.value: [packed(weight, kind) for weight in plain]
        for kind in (Quantization.INT8, Quantization.INT8_WEIGHT_ONLY)
        if kernels() is not None
    }
    ways: dict[str, Callable[[int], object]] = {
        "torch": lambda i: functional.linear(x, plain[i % copies]),
        "oneDNN packed": lambda i: torch.ops.mkldnn._linear_pointwise(x, onednn[i % copies], None, "none", [], ""),
        "own packed": lambda i: _packed_linear(x, ready[i % copies], None, None, None),
        "brgemm": lambda i: _packed_linear(x, ready[i % copies], None, None, many),
    }
    for name, held in quantised.items():
        ways[name] = lambda i, held=held: _packed_linear(x, held[i % copies], None, None, None)  # type: ignore[misc]
    repeats = max(1, min(copies, 4 * 10**8 // (num_rows * num_inputs * num_outputs)))
    return best(ways, rounds, repeats)


def experts(num_rows: int, rounds: int) -> dict[str, float]:
    """32 experts of 1024 x 256, 4 for each row, and the shared one: a layer of dsv3-mini."""
    gate_up, down = torch.randn((32, 512, 1024)).to(BF16) / 32, torch.randn((32, 1024, 256)).to(BF16) / 16
    ready = empty_experts(32, 256, 1024, BF16, CPU)
    for e in range(32):
        fill(ready[0][e], 0, gate_up[e, :256])
        fill(ready[0][e], 256, gate_up[e, 256:])
        fill(ready[1][e], 0, down[e])
    shared = (empty_gate_up(256, 1024, BF16, CPU), empty_linear(1024, 256, BF16, CPU))
    fill(shared[0], 0, gate_up[0, :256])
    fill(shared[0], 256, gate_up[0, 256:])
    fill(shared[1], 0, down[0])
    x, weights = torch.randn((num_rows, 1024)).to(BF16), torch.rand((num_rows, 4))
    ids = [torch.rand((num_rows, 32)).argsort(dim=1)[:, :4].contiguous() for _ in range(16)]
    plain = (gate_up[0], down[0])
    ways: dict[str, Callable[[int], object]] = {
        "torch": lambda i: experts_mlp(x, ids[i % 16], weights, gate_up, down, first_expert=0, shared=plain),
        "own packed": lambda i: experts_mlp(x, ids[i % 16], weights, *ready, first_expert=0, shared=shared),
    }
    seconds = best(ways, rounds, 16 if num_rows <= 32 else 1)
    hit = sum(len(set(chosen.flatten().tolist())) + 1 for chosen in (ids if num_rows <= 32 else ids[:1]))
    seconds["experts hit"] = hit / (16 if num_rows <= 32 else 1)
    return seconds


def row_wise(num_rows: int, rounds: int) -> dict[str, float]:
    x, residual = torch.randn((2, num_rows, 1024)).to(BF16)
    latent, logits = torch.randn((num_rows, 960)).to(BF16), torch.randn((num_rows, 32000)).to(BF16)
    weight, q_weight, kv_weight = (torch.rand(n).to(BF16) for n in (1024, 384, 512))
    gate, bias = torch.randn((32, 1024)) / 32, torch.randn(32) / 10
    embedding = torch.randn((32000, 1024)).to(BF16)
    proposals = shard_argmax(logits, 0)
    codes, scales = encode_rows(x, torch.int8)
    ways: dict[str, Callable[[int], object]] = {
        "rms_norm": lambda i: rms_norm(x, weight, 1e-6),
        "add_rms_norm": lambda i: add_rms_norm(x, residual, weight, 1e-6),
        "latent_norm": lambda i: latent_norm(latent, q_weight, kv_weight, 1e-6),
        "router": lambda i: router(
            x,
            gate,
            top_k=4,
            scoring="sigmoid",
            method="noaux_tc",
            num_groups=4,
            topk_group=2,
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
            correction_bias_E=bias,
        ),
        "shard_argmax": lambda i: shard_argmax(logits, 0),
        "pick": lambda i: pick(proposals),
        "encode_rows": lambda i: encode_rows(x, torch.int8),
        "encode_rows, torch": lambda i: encode_rows_reference(x, torch.int8),
        "decode_rows": lambda i: decode_rows(codes, scales, BF16),
        "decode_rows, torch": lambda i: decode_rows_reference(codes, scales, BF16),
        "a copy": lambda i: x.clone(),
    }
    if num_rows <= 4:
        ways["tied head, torch"] = lambda i: functional.linear(x, embedding)
        ways["tied head"] = lambda i: linear(x, embedding)
    return best(ways, rounds, 500 if num_rows <= 16 else 20)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", default="1,4,8,16,32,128,512")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    compiled = kernels() is not None
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {args.threads} thread(s)")
    if not compiled:
        raise SystemExit("products with packed weights are not compiled here: there is nothing to compare")
    memory = torch.ones(64 << 20)
    read = memory.nbytes / best({"read": lambda i: memory.sum()}, args.rounds, 1)["read"] / 1e9
    print(f"reading 256 MiB: {read:.1f} GB/s\n")
    results: dict[str, object] = {"threads": args.threads, "read_gb_s": read}
    rows = [int(number) for number in args.rows.split(",")]
    ways = f"{'torch':>9} {'oneDNN p.':>9} {'own':>9} {'brgemm':>9} {'int8':>9} {'int8 w.o.':>9} us"
    print(f"{'product':10} {'rows':>5} {ways} {'GB/s':>6} {'GFLOP/s':>8}")
    for name, (num_inputs, num_outputs) in PRODUCTS.items():
        for num_rows in rows:
            seconds = product(num_rows, num_inputs, num_outputs, args.rounds)
            own, size = seconds["own packed"], num_inputs * num_outputs
            shown = " ".join(f"{value * 1e6:9.0f}" for value in seconds.values())
            print(f"{name:10} {num_rows:5} {shown} {2 * size / own / 1e9:9.1f} {2 * size * num_rows / own / 1e9:8.0f}")
            results[f"{name} {num_rows}"] = seconds
    print(f"\n{'experts':10} {'rows':>5} {'torch':>9} {'own':>9} us {'GB/s':>6} {'GFLOP/s':>8}")
    for num_rows in rows:
        seconds = experts(num_rows, args.rounds)
        own, size = seconds["own packed"], 3 * 256 * 1024
        print(
            f"{'':10} {num_rows:5} {seconds['torch'] * 1e6:9.0f} {own * 1e6:9.0f} "
            f"{2 * size * seconds['experts hit'] / own / 1e9:9.1f} {2 * size * 5 * num_rows / own / 1e9:8.0f}"
        )
        results[f"experts {num_rows}"] = seconds
    print("\nrow-wise, us")
    for num_rows in rows:
        seconds = row_wise(num_rows, args.rounds)
        print(f"{num_rows:5}  " + "  ".join(f"{name} {value * 1e6:.1f}" for name, value in seconds.items()))
        results[f"row-wise {num_rows}"] = seconds
    print(json.dumps(results))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
