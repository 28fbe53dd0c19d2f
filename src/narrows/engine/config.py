"""A user's configuration of an engine, and the resolved one: 'auto' values are resolved into a new object, once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Literal

import torch

from narrows.arch.config import ModelConfig
from narrows.arch.presets import load_model_config
from narrows.arch.quantization import check_loadable
from narrows.arch.weight_sharding import WeightSharding
from narrows.checkpoints import local_model
from narrows.convert.gguf_header import find_gguf
from narrows.cost.pricer import StepShape
from narrows.cost.profile import check_device_name, choose_device
from narrows.engine.machine import Machine, Needs, check_memory, slow_bf16
from narrows.engine.machine_fit import fit
from narrows.engine.rank_environment import rank_fingerprint
from narrows.errors import ConfigError
from narrows.layout import Mesh, Topology, split_evenly
from narrows.models.registry import check_executable
from narrows.ops.compiled import kernels
from narrows.ops.int8 import Quantization
from narrows.plan.deploy import (
    DEFAULT_REQUESTS,
    DEFAULT_ROWS,
    PAGE_SIZE,
    STORED,
    limits_of,
    loaded_dtype,
    longest_context,
    priced_context,
    step_mix,
    stored_words,
)
from narrows.plan.named import named_layout
from narrows.plan.plan import Plan
from narrows.plan.planner import Deployment, Planner, known_sharding
from narrows.plan.report.saved import read_plan
from narrows.ranks.launch import Launch
from narrows.sched.scheduler import Limits
from narrows.weights.checkpoint_fit import fit_checkpoint
from narrows.weights.dummy import DummyWeights
from narrows.weights.safetensors_folder import SafetensorsFolder
from narrows.weights.source import WeightSource

__all__ = ["LOAD_FORMATS", "QUANTIZATIONS", "RANKS", "RUN_ON", "EngineConfig", "Resolved", "at_hand", "resolve"]

LOAD_FORMATS = ("auto", "safetensors", "gguf", "dummy")
RANKS = ("threads", "processes")
RUN_ON = ("cpu", "cuda")
AUTO = "auto"
QUANTIZATIONS = (AUTO, *(kind.value for kind in Quantization))
_DTYPES = {"float32": (torch.float32, "fp32"), "bfloat16": (torch.bfloat16, "bf16")}

INVARIANT_CHUNK = 256
"""Rows after which ``batch_invariant`` cuts prompts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """An engine as configured.

    ``model``: a checkpoint folder, a built-in one's name, a ``.gguf`` file, ``org/name`` of the hub, or a preset;
    :func:`at_hand` gives the folder of a name, and fetches missing files. ``run_on``: the kind of device of the ranks.
    ``device``: the device that steps are priced for, by its name in the catalogue or by a profile's file; ``auto`` is
    the one they run on, by this user's profile of it where there is one. ``ranks``: ``threads`` of this process, or
    ``processes``, with ``threads`` torch threads each. ``timeout_s``: how long a rank that lives may keep the others
    waiting. ``rows_per_step``: most rows (tokens) in one step, all groups together. ``requests_per_group``: most that
    run at once in an attention group. ``kv_tokens``: tokens of KV cache per attention group. ``checked``: collectives
    and shapes are compared between ranks at every step.
    """

    model: str
    revision: str = ""
    """Of a model of the hub: a branch, a tag or a commit; empty: its main branch."""
    dp: int = 1
    tp: int | None = 1
    """None: as many ranks per group as the machine has cores or GPUs for (see :mod:`narrows.engine.machine_fit`)."""
    layout: str = "auto"
    plan_file: str = ""
    """A plan saved by ``narrows plan --save``, run at every step in place of the planner's."""
    dtype: str = "auto"
    run_on: str = "cpu"
    device: str = "auto"
    load_format: str = "auto"
    rows_per_step: int = DEFAULT_ROWS
    prompt_rows: int = 0
    """Most rows of prompts in a step that decodes; 0: as many as rows."""
    requests_per_group: int = DEFAULT_REQUESTS
    max_context: int | None = None
    kv_tokens: int | None = None
    page_size: int = PAGE_SIZE
    warmup_rows: int = 64
    """Rows of the largest warm-up step of an idle service (`warmup.py`); with more rows, a capture saves little. 0: no
    warm-up."""
    seed: int = 0
    ranks: str = "threads"
    threads: int | None = 1
    """torch threads per rank; None: the cores, divided among the ranks."""
    timeout_s: float = 60.0
    fork_self: bool = False
    """Ranks may come from a fork of this process (`ranks/fork_server.py`): set by a process whose own main program is
    narrows."""
    launch: Launch | None = None
    """This process's part, if ranks run on several hosts or were started by torchrun; then they are processes."""
    prefix_cache: bool = True
    """KV of tokens that another request has at the same positions is used again; never with ``batch_invariant``."""
    checked: bool = False
    batch_invariant: bool = False
    """Tokens do not depend on other requests: one plan for every step, and each row computed alone."""
    want_logits: bool = False
    """Every rank gets whole rows of logits, and results carry them."""
    quantization: str = AUTO
    """How linear and expert weights are held, one of QUANTIZATIONS: ``int8``: rounded at loading; ``stored``: in the
    blocks of a GGUF file; ``auto``: so where such products are compiled and no dtype is asked for, else ``none``."""
    encode_rows: str = "none"
    """The encoding of rows before a gather: one of ``plan.planner.ENCODE_ROWS``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """An engine's decisions, all of them made."""

    engine_config: EngineConfig
    config: ModelConfig
    mesh: Mesh
    deployment: Deployment
    sharding: WeightSharding
    plan: Plan | None
    """The one plan that runs at every step: saved, or the only one for ``batch_invariant``; None: plans are cached."""
    dtype: torch.dtype
    limits: Limits
    notes: tuple[str, ...]
    facts: tuple[str, ...] = ()
    """Those of the notes that a service logs as it starts: of the checkpoint's files and of this host."""

    @property
    def threads(self) -> int:
        """torch threads per rank."""
        assert self.engine_config.threads is not None, "resolve() decides how many"
        return self.engine_config.threads

    @property
    def num_slots(self) -> int:
        """Slots of KV cache per rank, the null page's among them."""
        return self.limits.pages_per_group * self.limits.page_size

    def weights(self) -> WeightSource:
        """The checkpoint, or random weights for ``--load-format dummy``.

        Raises:
            CheckpointError: the checkpoint is missing or incomplete.
        """
        if self.engine_config.load_format == "dummy":
            return DummyWeights(seed=self.engine_config.seed, dtype=self.dtype)
        path = Path(self.engine_config.model)
        if (file := find_gguf(path)) is not None:
            # Imported only for such files: the gguf package takes a tenth of a second.
            source: WeightSource = import_module("narrows.weights.gguf_source").GgufWeights(file, dtype=self.dtype)
            return source
        if not path.is_dir():
            what = (
                f"is a file: give its folder, {path.parent}" if path.is_file() else "is a preset, which has no weights"
            )
            raise ConfigError(
                f"{self.engine_config.model} {what}; a checkpoint folder or a .gguf file is needed, or --load-format "
                "dummy to run with random weights"
            )
        return SafetensorsFolder(path, quantization=self.config.quantization, dtype=self.dtype)


def resolve(
    engine_config: EngineConfig, sharding: WeightSharding | None = None, machine: Machine | None = None
) -> Resolved:
    """Decide everything that ``engine_config`` leaves open; ``sharding`` and ``machine``: in place of its own.

    Raises:
        ConfigError: an impossible model, mesh, layout, device, dtype or size; the message has the alternative.
    """
    engine_config = at_hand(engine_config)
    config = load_model_config(engine_config.model)
    check_executable(config)
    config, facts = _checkpoint(engine_config, config)
    if engine_config.run_on not in RUN_ON:
        raise ConfigError(f"--run-on {engine_config.run_on!r} is not known; ranks run on {' or '.join(RUN_ON)}")
    tp, threads = fit(
        config,
        dp=engine_config.dp,
        tp=engine_config.tp,
        threads=engine_config.threads,
        run_on=engine_config.run_on,
        launch=engine_config.launch,
    )
    engine_config = replace(engine_config, tp=tp, threads=threads)
    if engine_config.load_format not in LOAD_FORMATS:
        raise ConfigError(f"load format {engine_config.load_format!r} is not known; formats: {', '.join(LOAD_FORMATS)}")
    is_file = find_gguf(Path(engine_config.model)) is not None
    if engine_config.load_format == ("safetensors" if is_file else "gguf"):
        raise ConfigError(
            f"load format {engine_config.load_format!r}, but {engine_config.model} is {'' if is_file else 'not '}a "
            ".gguf file; leave --load-format out, and the path decides"
        )
    for name, size, least in (
        ("--max-rows", engine_config.rows_per_step, 1),
        ("page size", engine_config.page_size, 1),
        ("--threads", threads, 1),
        ("--warmup-rows", engine_config.warmup_rows, 0),
        ("--prompt-rows", engine_config.prompt_rows, 0),
    ):
        if size < least:
            raise ConfigError(f"{name} is {size}; it must be at least {least}")
    mesh = Mesh.of(dp=engine_config.dp, tp=tp)
    _check_ranks(engine_config, mesh)
    notes = list(config.notes)
    if engine_config.load_format != "dummy":
        check_loadable(config.quantization, engine_config.model)
    dtype, gemm_dtype = _dtype(engine_config, config, notes)
    engine_config = replace(engine_config, quantization=_quantization(engine_config, config))
    gemm_dtype = _quantized(engine_config, config, gemm_dtype, notes)
    setting = partial(
        rank_fingerprint,
        run_on=engine_config.run_on,
        ranks=engine_config.ranks,
        hosts=1 if engine_config.launch is None else engine_config.launch.num_nodes,
        num_ranks=mesh.size,
        threads=threads,
    )
    device, price_notes = choose_device(
        engine_config.device, setting, dtype=gemm_dtype, model=engine_config.model, runs=True
    )
    notes += price_notes
    deployment = Deployment(
        config=config,
        mesh=mesh,
        device=device,
        dtype=gemm_dtype,
        graph=False,  # steps are launched one by one
        want_logits=engine_config.want_logits,
        encode_rows=engine_config.encode_rows,
        nodes=_nodes(engine_config.launch),
    )
    config = deployment.config
    rules = named_layout(engine_config.layout, config, mesh)
    limits = _limits(engine_config, config, mesh)
    plan = None
    if engine_config.plan_file:
        plan, sharding = read_plan(Path(engine_config.plan_file), config, mesh)
        notes.append(f"the plan in {engine_config.plan_file} (layout {plan.layout_name}) runs at every step")
    elif sharding is None:
        rows = DEFAULT_ROWS if engine_config.batch_invariant else limits.rows_per_step
        sharding = rules.sharding or known_sharding(deployment, tuple(step_mix(mesh, rows, limits.max_context)))
    if engine_config.batch_invariant and plan is None:
        plan = _pinned_plan(deployment, sharding, engine_config.layout, limits)
    facts = (
        *facts,
        *_fit_machine(engine_config, deployment, sharding, plan, limits, dtype.itemsize, machine or Machine.here()),
    )
    return Resolved(
        engine_config=engine_config,
        config=config,
        mesh=mesh,
        deployment=deployment,
        sharding=sharding,
        plan=plan,
        dtype=dtype,
        limits=limits,
        notes=(*notes, *facts),
        facts=facts,
    )


def at_hand(engine_config: EngineConfig) -> EngineConfig:
    """The same, its model a path on this machine: a built-in name becomes its folder, and a model of the hub is
    fetched. A config whose model is a path is not changed.

    Raises:
        ConfigError: neither hub nor cache has it, or ``device`` is a kind of device, which is ``run_on``.
    """
    check_device_name(engine_config.device, runs=True)  # before anything is fetched
    needed: Literal["text", "weights"] = "text" if engine_config.load_format == "dummy" else "weights"
    return replace(
        engine_config,
        model=local_model(engine_config.model, revision=engine_config.revision, needed=needed),
        revision="",
    )


def _checkpoint(engine_config: EngineConfig, config: ModelConfig) -> tuple[ModelConfig, tuple[str, ...]]:
    """The config that agrees with a folder's tensors, and notes about them; raises for a broken folder."""
    folder = Path(engine_config.model)
    if engine_config.load_format == "dummy" or not folder.is_dir() or find_gguf(folder) is not None:
        return config, ()
    return fit_checkpoint(SafetensorsFolder(folder, quantization=config.quantization), config)


def _check_ranks(engine_config: EngineConfig, mesh: Mesh) -> None:
    if engine_config.ranks not in RANKS:
        raise ConfigError(f"--ranks {engine_config.ranks!r} is not known; ranks are {' or '.join(RANKS)}")
    if not engine_config.timeout_s > 0:
        raise ConfigError(f"--rank-timeout is {engine_config.timeout_s:g} s; it must be more than 0")
    if engine_config.launch is None:
        return
    if engine_config.ranks != "processes":
        raise ConfigError("ranks on several hosts, or started by torchrun, are processes: leave out --ranks threads")
    if engine_config.launch.world_size != mesh.size:
        raise ConfigError(
            f"the launch has {engine_config.launch.world_size} ranks, but the mesh {mesh} has {mesh.size}"
        )


def _nodes(launch: Launch | None) -> Topology | None:
    """How ranks lie on hosts, where each has as many; others are priced as one host's, and exchange flat."""
    if launch is None or launch.num_nodes == 1 or launch.world_size % launch.num_nodes:
        return None
    return Topology(launch.num_nodes, launch.world_size // launch.num_nodes)


def _dtype(engine_config: EngineConfig, config: ModelConfig, notes: list[str]) -> tuple[torch.dtype, str]:
    if engine_config.dtype == "auto":
        found, because = loaded_dtype(config)
        if config.quantization is not None or config.dtype not in _DTYPES:
            notes.append(f"dtype {found}: {because}")
        return next(both for both in _DTYPES.values() if both[1] == found)
    if engine_config.dtype not in _DTYPES:
        raise ConfigError(f"dtype {engine_config.dtype!r} is not known; dtypes: auto, {', '.join(_DTYPES)}")
    return _DTYPES[engine_config.dtype]


def _quantization(engine_config: EngineConfig, config: ModelConfig) -> str:
    """What ``auto`` means here."""
    if engine_config.quantization not in QUANTIZATIONS:
        raise ConfigError(
            f"--quantization {engine_config.quantization!r} is not known; it is {', '.join(QUANTIZATIONS)}"
        )
    if engine_config.quantization != AUTO:
        return engine_config.quantization
    multiplied = bool(config.blocks) and engine_config.run_on == "cpu" and kernels() is not None
    stored = multiplied and engine_config.dtype == "auto" and engine_config.load_format != "dummy"
    return str(Quantization.STORED.value if stored else Quantization.NONE.value)


def _quantized(engine_config: EngineConfig, config: ModelConfig, gemm_dtype: str, notes: list[str]) -> str:
    """The type that GEMMs are priced in."""
    quantization = Quantization(engine_config.quantization)
    if quantization is Quantization.NONE:
        return gemm_dtype
    if engine_config.run_on != "cpu":
        raise ConfigError(
            f"--quantization {engine_config.quantization} is for CPU ranks; leave it out, or --run-on cuda"
        )
    if quantization is Quantization.STORED:
        if gemm_dtype == "fp32":
            raise ConfigError("--quantization stored is for bfloat16 activations; leave out --dtype float32, or it")
        if config.blocks:
            notes.append(stored_words(config))
        if kernels() is None:
            notes.append("products with blocks are not compiled here: plain torch makes numbers of them at every step")
        return STORED
    rows = "rows are rounded to int8 too" if quantization is Quantization.INT8 else "rows stay as they are"
    notes.append(f"linear and expert weights are rounded to int8, a scale per output; {rows} (docs/kernels.md)")
    if kernels() is None or gemm_dtype == "fp32":
        why = "in float32" if gemm_dtype == "fp32" else "without compiled code"
        notes.append(f"int8 {why} is computed by plain torch, which is slower than no quantisation at all")
        return gemm_dtype
    return engine_config.quantization


def _limits(engine_config: EngineConfig, config: ModelConfig, mesh: Mesh) -> Limits:
    context = longest_context(config, engine_config.max_context)
    kv_tokens = 2 * context if engine_config.kv_tokens is None else engine_config.kv_tokens
    return limits_of(
        config,
        mesh,
        rows_per_step=engine_config.rows_per_step,
        max_context=context,
        kv_tokens=kv_tokens,
        requests_per_group=engine_config.requests_per_group,
        page_size=engine_config.page_size,
        prompt_rows=engine_config.prompt_rows,
        # The same tokens computed in rows cut elsewhere, or one by one, may differ in their last bits.
        prefix_cache=engine_config.prefix_cache and not engine_config.batch_invariant,
        prefill_chunk=INVARIANT_CHUNK if engine_config.batch_invariant else 0,
    )


def _fit_machine(
    engine_config: EngineConfig,
    deployment: Deployment,
    sharding: WeightSharding,
    plan: Plan | None,
    limits: Limits,
    itemsize: int,
    machine: Machine,
) -> list[str]:
    """Notes about CPU ranks on this machine; raises if they need more memory than it has."""
    if engine_config.run_on != "cpu" or (
        engine_config.load_format != "dummy" and not Path(engine_config.model).exists()
    ):
        return []  # a preset has no weights, which `Resolved.weights` says
    mesh = deployment.mesh
    planner = Planner(deployment, sharding)
    if plan is None:
        rows = min(limits.rows_per_step, limits.tokens_per_group * mesh.num_groups)  # each has a slot of the cache
        shape = StepShape.of(mesh, split_evenly(rows, mesh.num_groups), phase="prefill", context=limits.max_context)
        plan = planner.plan(shape, engine_config.layout)
    needs_of = partial(
        Needs.of,
        deployment,
        sharding,
        ranks=range(mesh.size) if engine_config.launch is None else engine_config.launch.ranks,
        in_threads=engine_config.ranks == "threads",
        kv_tokens=limits.tokens_per_group,
    )
    rounded = engine_config.quantization if engine_config.quantization != Quantization.NONE.value else ""
    step = planner.workspace(plan).total
    needs = needs_of(dtype=rounded or ("fp32" if itemsize == 4 else "bf16"), step=step)
    lines = [check_memory(needs, machine, kv_tokens=limits.tokens_per_group, rows=plan.shape.rows.total)]
    if engine_config.dtype == "auto" and itemsize == 2 and not rounded:
        lines.append(slow_bf16(needs, needs_of(dtype="fp32", step=2 * step), machine))
    return [line for line in lines if line]


def _pinned_plan(deployment: Deployment, sharding: WeightSharding, layout: str, limits: Limits) -> Plan:
    """The plan of ``batch_invariant``: of a step with one chunk of a prompt in every group, one of its rows sampled.

    It gives whole rows of logits, since any request of any step may need them.
    """
    mesh = deployment.mesh
    rows = (INVARIANT_CHUNK,) * mesh.num_groups
    context = priced_context(limits.max_context)
    shape = StepShape.of(mesh, rows, phase="prefill", context=context, logit_rows=mesh.num_groups)
    return Planner(replace(deployment, want_logits=True), sharding).plan(shape, layout)
