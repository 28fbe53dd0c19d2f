"""A real server with --trace: a trace by HTTP, rank processes on one clock; and the file that generate leaves."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
from patience import PATIENCE_S
from server_process import ServerProcess

from narrows.ops.compiled import kernels


def check(document: dict[str, Any], num_steps: int) -> None:
    """Both ranks run every step inside the time in which the host had handed it out."""
    assert "CLOCK_MONOTONIC" in document["otherData"]["clocks"] and "moved" not in document["otherData"]
    events = document["traceEvents"]
    steps = {e["args"]["step"]: e for e in events if e.get("cat") == "step"}
    executions = [e for e in events if e.get("cat") == "execution"]
    assert len(steps) == num_steps and len(executions) == 2 * num_steps
    handed_out = {e["id"]: e["ts"] for e in events if e["ph"] == "s"}
    for execution in executions:
        step = steps[execution["args"]["step"]]
        (arrow,) = (e for e in events if e["ph"] == "f" and (e["pid"], e["ts"]) == (execution["pid"], execution["ts"]))
        assert (
            handed_out[arrow["id"]] <= execution["ts"]
            and execution["ts"] + execution["dur"] <= step["ts"] + step["dur"]
        )
    assert {execution["args"]["ran"] for execution in executions} == {"op by op"} | (
        {"replayed"} if kernels() else set()
    )
    crossed = [e["args"]["bytes_all_ranks"] for e in events if e.get("cat") == "collective"]
    assert crossed and min(crossed) > 0


def test_a_trace_over_http(tmp_path: Path) -> None:
    file = tmp_path / "trace.json.gz"
    options = ("--tp", "2", "--trace", str(file), "--trace-steps", "64", "--api-key", "secret")
    headers = {"authorization": "Bearer secret"}
    with (
        ServerProcess(*options) as server,
        httpx.Client(base_url=server.url, headers=headers, timeout=PATIENCE_S) as client,
    ):
        assert httpx.post(f"{server.url}/start_profile").status_code == 401
        refused = client.post("/stop_profile")
        assert refused.status_code == 400 and "no trace is under way" in refused.json()["error"]["message"]
        assert client.post("/start_profile").json() == {"file": str(file), "steps": 64}
        body = {"prompt": "The sea", "max_tokens": 6, "temperature": 0, "ignore_eos": True}
        assert client.post("/v1/completions", json=body).status_code == 200
        assert client.post("/stop_profile").json()["steps"] == 6
        check(json.loads(gzip.decompress(file.read_bytes())), 6)
        info = client.get("/server_info").json()["backend"]
        assert len(info["plan_cache"]) > 20, "it has planned ahead"
        assert sum(plan["steps"] for plan in info["plan_cache"]) == 6
        metrics = client.get("/metrics").text
        assert "narrows_plan_measured_seconds_total" in metrics
        assert server.stop() == 0


def test_generate_writes_a_trace_and_a_profile_of_processes(tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    command = [sys.executable, "-m", "narrows", "generate", "narrows-demo", "--tp", "2", "--ranks", "processes"]
    more = ["--prompt", "The sea", "--max-tokens", "8", "--ignore-eos", "--trace", str(file), "--trace-steps", "5"]
    done = subprocess.run([*command, *more, "--profile"], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    assert "trace: 5 steps, " in done.stderr and "the 3 steps after them are not in it" in done.stderr
    assert "were predicted (x " in done.stdout
    assert "prefill: " in done.stdout and "decode: " in done.stdout and "mean of 2 rank(s)" in done.stdout
    assert re.search(r"communication +(reduce_scatter|all_reduce|all_gather|all_reduce_norm) ", done.stdout)
    check(json.loads(file.read_text()), 5)
