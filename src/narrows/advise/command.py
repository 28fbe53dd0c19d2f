"""Command lines of serving engines: one for each host, every flag checked against the engine's own list."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from narrows.advise.flags import FlagList, flag_list
from narrows.advise.ways import Flags, Way
from narrows.arch.config import ModelConfig
from narrows.errors import ConfigError
from narrows.layout import Mesh, Topology

__all__ = ["HUB_NAMES", "ServerLimits", "command_lines", "num_hosts", "weights_flags"]

HUB_NAMES = {
    "deepseek-v2": "deepseek-ai/DeepSeek-V2",
    "deepseek-v2-lite": "deepseek-ai/DeepSeek-V2-Lite",
    "deepseek-v3": "deepseek-ai/DeepSeek-V3",
    "deepseek-r1": "deepseek-ai/DeepSeek-R1",
    "kimi-k2": "moonshotai/Kimi-K2-Instruct",
    "glm-4.5": "zai-org/GLM-4.5",
    "qwen3-235b-a22b": "Qwen/Qwen3-235B-A22B",
    "qwen3-30b-a3b": "Qwen/Qwen3-30B-A3B",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "llama-3.1-70b": "meta-llama/Llama-3.1-70B-Instruct",
}
"""What a server is to load for a preset; other models are called as they were given."""

_GPUS_PER_HOST = {"gb200": 4, "gb300": 4}
"""Where NVLink connects several hosts to one node; elsewhere a node is a host."""
_TRTLLM_CONFIG = "narrows-trtllm.yaml"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    """What a server is given beside its ways: rows of a step, requests at once, tokens of a sequence, the KV cache.

    ``rows``: as the engine counts them: of each attention group in vLLM and TensorRT-LLM, of all groups together in
    SGLang. ``requests_per_group``: in each attention group.
    """

    engine: str
    rows: int
    requests_per_group: int
    max_context: int
    kv_dtype: str = "bf16"
    prefix_cache: bool = True

    def rows_per_step(self, mesh: Mesh) -> int:
        """Most rows of a step, all attention groups together."""
        return self.rows if self.engine == "sglang" else self.rows * mesh.num_groups


def command_lines(
    model: str,
    way: Way,
    limits: ServerLimits,
    *,
    weights: Flags = (),
    revision: str = "",
    hosts: int = 1,
) -> tuple[str, ...]:
    """What to run, one line for each host in order; ``HOST0`` in them stands for the address of the first.

    TensorRT-LLM on several hosts has one line, which the scheduler of the cluster runs with a process for each GPU.

    Raises:
        ConfigError: the engine has no such flag, or not with this value.
    """
    engine, known = limits.engine, flag_list(limits.engine)
    name = HUB_NAMES.get(model, model)
    flags: list[tuple[str, object]] = [*way.flags, *weights, *_limit_flags(engine, way, limits)]
    if revision:
        flags.append(("--revision", revision))
    head = [*known.command.split(), *(["--model-path", name] if engine == "sglang" else [name])]
    lines = []
    for host in range(hosts if engine != "trtllm" else 1):
        here = [*flags, *(_host_flags(engine, way, hosts, host) if hosts > 1 else ())]
        lines.append(_line(known, head, here))
    before = "trtllm-llmapi-launch " if engine == "trtllm" and hosts > 1 else ""
    lines = [before + line for line in lines]
    if engine == "trtllm" and not limits.prefix_cache:
        file = "kv_cache_config:\\n  enable_block_reuse: false\\n"
        lines[0] = f"printf '{file}' > {_TRTLLM_CONFIG}; {lines[0]} --config {_TRTLLM_CONFIG}"
    return tuple(lines)


def num_hosts(device: str, nodes: Topology) -> int:
    """Hosts of so many nodes: each runs its own command line.

    >>> num_hosts("h20", Topology(2, 8)), num_hosts("gb200", Topology(1, 16)), num_hosts("gb200", Topology(1, 2))
    (2, 4, 1)
    """
    per_host = _GPUS_PER_HOST.get(device)
    return nodes.num_nodes if per_host is None else nodes.num_nodes * -(-nodes.ranks_per_node // per_host)


def _line(known: FlagList, head: Sequence[str], flags: Sequence[tuple[str, object]]) -> str:
    words = list(head)
    for name, value in flags:
        if fault := known.fault(name, value):
            raise ConfigError(f"{fault}; this narrows cannot write command lines for it")
        words += [name] if value is None else [name, str(value)]
    return shlex.join(words)


def _limit_flags(engine: str, way: Way, limits: ServerLimits) -> Flags:
    groups = way.mesh.num_groups
    if engine == "sglang":
        fp8: Flags = (("--kv-cache-dtype", "fp8_e4m3"),) if limits.kv_dtype == "fp8" else ()
        cache: Flags = () if limits.prefix_cache else (("--disable-radix-cache", None),)
        return (
            ("--context-length", limits.max_context),
            ("--chunked-prefill-size", limits.rows),  # it shares this out over the groups
            ("--max-running-requests", limits.requests_per_group * groups),
            *fp8,
            *cache,
        )
    fp8 = (("--kv-cache-dtype" if engine == "vllm" else "--kv_cache_dtype", "fp8"),) if limits.kv_dtype == "fp8" else ()
    if engine == "vllm":
        cache = () if limits.prefix_cache else (("--no-enable-prefix-caching", None),)
        return (
            ("--max-model-len", limits.max_context),
            ("--max-num-batched-tokens", max(limits.rows, limits.requests_per_group)),
            ("--max-num-seqs", limits.requests_per_group),
            *fp8,
            *cache,
        )
    return (
        ("--max_seq_len", limits.max_context),
        ("--max_num_tokens", max(limits.rows, limits.requests_per_group)),
        ("--max_batch_size", limits.requests_per_group),
        ("--enable_chunked_prefill", None),
        *fp8,
    )


def _host_flags(engine: str, way: Way, hosts: int, host: int) -> Flags:
    if engine == "sglang":
        return (("--nnodes", hosts), ("--node-rank", host), ("--dist-init-addr", "HOST0:5000"))
    groups = way.mesh.num_groups
    if engine == "trtllm":
        return (("--gpus_per_node", way.mesh.size // hosts),)
    if groups == 1:
        headless: Flags = (("--headless", None),) if host else ()
        return (("--nnodes", hosts), ("--node-rank", host), ("--master-addr", "HOST0"), *headless)
    local = groups // hosts
    shared: Flags = (
        ("--data-parallel-size-local", local),
        ("--data-parallel-address", "HOST0"),
        ("--data-parallel-rpc-port", 13345),
    )
    return (*shared, *((("--data-parallel-start-rank", host * local), ("--headless", None)) if host else ()))


def weights_flags(engine: str, config: ModelConfig, dtype: str) -> Flags:
    """The flags with which the server holds weights as ``dtype``, where the checkpoint has them otherwise.

    Raises:
        ConfigError: the engine does not, or no engine does.
    """
    stored = "fp8" if config.quantization is not None else "bf16"
    if dtype == stored:
        return ()
    if dtype == "fp8" and engine in ("sglang", "vllm"):
        return (("--quantization", "fp8"),)
    if dtype == "fp8":
        raise ConfigError(
            "trtllm-serve takes weights as the checkpoint has them, and these are not FP8: give an FP8 checkpoint, or "
            "--dtype bf16"
        )
    raise ConfigError(f"--dtype {dtype}: engines are advised on with the checkpoint's dtype ({stored}), or fp8")
