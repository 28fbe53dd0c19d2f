"""Results as the engines' own benchmarks write them, by hand, for tests that read them back."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["SGLANG", "TRTLLM", "VLLM"]

LATENCIES = {
    f"{statistic}_{which}_ms": value
    for which, value in (("ttft", 200.0), ("tpot", 10.0), ("itl", 11.0))
    for statistic in ("mean", "median", "p99")
}
SGLANG: dict[str, Any] = LATENCIES | {
    "backend": "sglang",
    "request_rate": math.inf,
    "max_concurrency": 4,
    "completed": 10,
    "total_input_tokens": 1000,
    "total_output_tokens": 500,
    "request_throughput": 2.0,
    "output_throughput": 100.0,
    "total_throughput": 300.0,
    "mean_e2e_latency_ms": 700.0,
    "p90_ttft_ms": 250.0,
}
VLLM: dict[str, Any] = LATENCIES | {
    "backend": "vllm",
    "endpoint_type": "vllm",
    "request_rate": 2.5,
    "max_concurrency": None,
    "completed": 10,
    "failed": 0,
    "total_input_tokens": 1000,
    "total_output_tokens": 500,
    "request_throughput": 2.0,
    "output_throughput": 100.0,
    "total_token_throughput": 300.0,
    "mean_e2el_ms": 700.0,
}
TRTLLM: dict[str, Any] = {
    "engine": {"model": "m", "backend": "Pytorch"},
    "world_info": {"tp_size": 8, "world_size": 8},
    "request_info": {
        "num_requests": 10,
        "avg_num_concurrent_requests": 3.9,
        "avg_input_length": 100.0,
        "avg_output_length": 50.0,
    },
    "performance": {
        "avg_request_latency_ms": 700.0,
        "request_throughput_req_s": 2.0,
        "system_output_throughput_tok_s": 100.0,
        "system_total_throughput_tok_s": 300.0,
    },
    "streaming_metrics": {
        "avg_ttft_ms": 200.0,
        "avg_tpot_ms": 10.0,
        "ttft_percentiles": {"p50": 200.0, "p90": 250.0, "p99": 200.0, "average": 200.0},
        "tpot_percentiles": {"p50": 10.0, "p99": 10.0},
    },
}
