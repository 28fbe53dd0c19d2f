"""The ways in which an engine can run a model on a mesh: its flags, the layouts of its steps, how it holds experts.

What is here was read in the engines' source (the versions of :mod:`narrows.advise.flags`). Experts that exchange rows
by all-to-all have no price, and are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from narrows.advise.flags import flag_list
from narrows.arch.config import MLA, ModelConfig
from narrows.arch.weight_sharding import check_mesh
from narrows.errors import ConfigError
from narrows.layout import Mesh

__all__ = ["Way", "ways"]

Flags = tuple[tuple[str, object], ...]
"""Flags with their values; None: a switch."""

_BOTH = ("prefill", "decode")
_TRTLLM_AUTODEPLOY = ("deepseek_v2",)
"""Model types that TensorRT-LLM runs by its AutoDeploy backend alone, whose layouts are its compiler's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to run a model. ``layouts``: by phase. ``experts``: ``split``, ``whole``, or empty where there are none.

    ``refusal``: why this engine cannot run it so; then there are no flags.
    """

    title: str
    mesh: Mesh
    layouts: Mapping[str, str] = field(default_factory=dict)
    experts: str = ""
    flags: Flags = ()
    refusal: str = ""


def ways(engine: str, config: ModelConfig, num_ranks: int, num_hosts: int = 1) -> tuple[Way, ...]:
    """Every way that ``engine`` has on so many ranks, on so many hosts, and those that it has not, with the reason.

    Raises:
        ConfigError: the engine does not run this model, or the model cannot be split over the ranks.
    """
    if engine == "trtllm" and config.model_type in _TRTLLM_AUTODEPLOY:
        raise ConfigError(
            f"TensorRT-LLM runs {config.model_type} by its AutoDeploy backend alone, whose layouts are not known here; "
            "ask for --engine sglang or vllm"
        )
    found: list[Way] = []
    refused = ""
    for dp in (n for n in range(1, num_ranks + 1) if num_ranks % n == 0):
        mesh = Mesh.of(dp=dp, tp=num_ranks // dp)
        try:
            check_mesh(config, mesh)
        except ConfigError as error:
            refused = str(error)
            continue
        if engine == "vllm" and dp > 1 and dp % num_hosts:
            refusal = f"{dp} data-parallel groups do not lie on {num_hosts} hosts evenly"
            found.append(Way(title="data parallel", mesh=mesh, refusal=refusal))
        else:
            found += _on(engine, config, mesh)
    if all(way.refusal for way in found):
        reasons = dict.fromkeys(filter(None, (refused, *(way.refusal for way in found))))
        title = flag_list(engine).title
        raise ConfigError(f"{title} cannot run {config.name} on {num_ranks} GPUs: {'; '.join(reasons)}")
    return tuple(found)


def _on(engine: str, config: ModelConfig, mesh: Mesh) -> Iterator[Way]:
    if mesh.num_groups > 1 and config.moe is None:
        yield Way(
            title="attention data parallel",
            mesh=mesh,
            refusal="searched for models with experts alone; of a dense model run several servers",
        )
        return
    whole = config.moe is not None and 1 < mesh.size <= config.moe.n_routed_experts
    for experts in ("",) if config.moe is None else ("split", "whole") if whole else ("split",):
        if uneven := _uneven(config, mesh, experts):
            title = "tensor parallel" if mesh.num_groups == 1 else "attention data parallel"
            yield Way(title=title, mesh=mesh, experts=experts, refusal=uneven)
        else:
            yield from {"sglang": _sglang, "vllm": _vllm, "trtllm": _trtllm}[engine](config, mesh, experts)


def _uneven(config: ModelConfig, mesh: Mesh, experts: str) -> str:
    """What does not divide evenly, as these engines need it; empty if all does."""
    attention, tp, size = config.attention, mesh.group_size, mesh.size
    parts = [("attention heads", config.num_attention_heads, tp)]
    if not isinstance(attention, MLA) and attention.num_key_value_heads > tp:
        parts.append(("key-value heads", attention.num_key_value_heads, tp))
    block = config.quantization.weight_block_size if config.quantization is not None else None
    unit = block[0] if block else 1
    if config.moe is None:
        parts.append(("columns of the MLP", config.intermediate_size, size * unit))
    elif experts == "split":
        parts.append(("columns of an expert", config.moe.moe_intermediate_size, size * unit))
    else:
        parts.append(("experts", config.moe.n_routed_experts, size))
    for what, count, pieces in parts:
        if count % pieces:
            blocks = f" in blocks of {unit}" if unit > 1 and pieces > size else ""
            return f"{count} {what} do not divide over {pieces // (unit if blocks else 1)} ranks{blocks}"
    return ""


def _same(layout: str) -> dict[str, str]:
    return dict.fromkeys(_BOTH, layout)


def _sglang(config: ModelConfig, mesh: Mesh, experts: str) -> Iterator[Way]:
    flags: Flags = (("--tp-size", mesh.size), *((("--ep-size", mesh.size),) if experts == "whole" else ()))
    if mesh.num_groups > 1:
        yield Way(
            title="attention data parallel",
            mesh=mesh,
            layouts=_same("sglang-dp"),
            experts=experts,
            flags=(*flags, ("--attn-dp-size", mesh.num_groups)),
        )
        return
    yield Way(title="tensor parallel", mesh=mesh, layouts=_same("all-reduce"), experts=experts, flags=flags)
    attention = config.attention
    if mesh.size > 1 and isinstance(attention, MLA) and attention.q_lora_rank is not None:
        yield Way(
            title="tensor parallel, scattered attention input",
            mesh=mesh,
            layouts={"prefill": "attn-tp-input-scattered", "decode": "all-reduce"},
            experts=experts,
            flags=(*flags, ("--enable-attn-tp-input-scattered", None)),
        )
    if mesh.size > 1 and config.model_type == "qwen3":
        yield Way(
            title="tensor parallel, norms on scattered rows",
            mesh=mesh,
            layouts={"prefill": "sequence-parallel", "decode": "all-reduce"},
            flags=(*flags, ("--enable-layernorm-sp", None)),
        )


def _vllm(config: ModelConfig, mesh: Mesh, experts: str) -> Iterator[Way]:
    dp, tp = mesh.num_groups, mesh.group_size
    expert: Flags = (("--enable-expert-parallel", None),) if experts == "whole" else ()
    if dp == 1:
        flags: Flags = (("--tensor-parallel-size", tp), *expert)
        yield Way(title="tensor parallel", mesh=mesh, layouts=_same("all-reduce"), experts=experts, flags=flags)
    elif tp > 1 and experts == "split":
        yield Way(
            title="data parallel",
            mesh=mesh,
            experts=experts,
            refusal="groups of several ranks are described with --enable-expert-parallel alone",
        )
    else:
        flags = (("--tensor-parallel-size", tp), ("--data-parallel-size", dp), *expert)
        exchange: Flags = (("--all2all-backend", "allgather_reducescatter"),)
        yield Way(
            title="data parallel",
            mesh=mesh,
            layouts=_same("vllm-dp"),
            experts=experts,
            flags=(*flags, *exchange),
        )


def _trtllm(config: ModelConfig, mesh: Mesh, experts: str) -> Iterator[Way]:
    flags: Flags = (("--tp_size", mesh.size), *((("--ep_size", mesh.size),) if experts == "whole" else ()))
    if mesh.num_groups == 1:
        yield Way(title="tensor parallel", mesh=mesh, layouts=_same("all-reduce"), experts=experts, flags=flags)
    elif mesh.group_size == 1:
        yield Way(
            title="attention data parallel",
            mesh=mesh,
            layouts=_same("trtllm-dp"),
            experts=experts,
            flags=(*flags, ("--enable_attention_dp", None)),
        )
    else:
        yield Way(
            title="attention data parallel",
            mesh=mesh,
            experts=experts,
            refusal="its attention groups have one rank each",
        )
