"""A model's tasks on one rank and under layouts, and whether they agree: the entry point of `evaluate`.

One rank runs first, in the same dtype; if that is not float32, one rank in float32 too, since it shows how much the
dtype itself rounds. Every layout then runs the same items, batched and one at a time, and the same rows for its
distributions, in its dtype and in float32, where a wrong layout has no rounding to hide in. Engines run one after the
other, so memory holds one model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from narrows.engine.config import EngineConfig, Resolved, at_hand, resolve
from narrows.engine.llm import LLM
from narrows.engine.model_text import load_model_text
from narrows.errors import ConfigError
from narrows.evaluate.batches import ForcedStep, forced_steps, pick_texts
from narrows.evaluate.compare import Outcome, Score, score_of
from narrows.evaluate.divergence import Baseline, Distance, measure, run_rows
from narrows.evaluate.tasks import FILES, Setting, Task, make_task, spread
from narrows.files import file_in
from narrows.sched.scheduler import Limits

__all__ = ["Evaluation", "LayoutResult", "Measured", "default_files", "evaluate"]

_KL_LOGITS = 1 << 26
"""Logits that are kept of one rank: 256 MB in float32."""
_LEAST_CONTEXT = 16
_HOW = (False, True)  # batched, alone


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Distributions of one layout in one dtype, batched or one text at a time."""

    dtype: str
    alone: bool
    distance: Distance


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutResult:
    """The results of one layout; one rank has no distances."""

    layout: str
    scores: tuple[Score, ...]
    distances: tuple[Measured, ...] = ()
    encodings: tuple[str, ...] = ()
    """The encodings of rows before gathers, where not plain."""
    quantization: str = "none"
    """The encoding of weights, which the one rank does not use."""

    @property
    def is_rounded(self) -> bool:
        """Whether rows or weights were rounded on purpose."""
        return bool(self.encodings) or self.quantization != "none"

    @property
    def failures(self) -> tuple[str, ...]:
        """Results out of bounds, each in one line; none if all is well.

        Distributions with encoded rows or weights have no bound: only the tasks judge them. A replay must always have
        the bits of op by op.
        """
        words = {False: "batched", True: "one at a time"}
        lines = [f"{s.task}, {words[s.alone]}: {s.failure}" for s in self.scores if s.failure]
        for found in self.distances:
            where = f"distributions in {found.dtype}, {words[found.alone]}"
            if found.distance.failure and not self.is_rounded:
                lines.append(f"{where}: {found.distance.failure}")
            if found.distance.served.fault is not None:
                lines.append(f"{where}: {found.distance.served.fault}")
        return tuple(lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """``one_rank`` is the reference of all ``layouts``; ``exact``, if requested, is one rank in float32."""

    resolved: Resolved
    files: dict[str, Path]
    one_rank: LayoutResult
    exact: LayoutResult | None
    layouts: tuple[LayoutResult, ...]

    @property
    def ok(self) -> bool:
        return not any(layout.failures for layout in self.layouts)


def default_files(model: str) -> dict[str, Path]:
    """The tasks whose files the model's folder brings along, in ``eval``."""
    found = {task: file_in(Path(model), f"eval/{name}") for task, name in FILES.items()}
    return {task: file for task, file in found.items() if file is not None}


def evaluate(
    engine_config: EngineConfig,
    files: Mapping[str, Path],
    layouts: Sequence[str],
    *,
    setting: Setting | None = None,
    num_alone: int = 32,
    kl_rows: int | None = None,
    with_float32: bool = True,
    float32_tasks: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> Evaluation:
    """Run the tasks of ``files`` under ``layouts`` on the mesh of ``engine_config``, against one rank.

    Args:
        files: file by task name.
        num_alone: items of each task that are run again one at a time.
        kl_rows: rows whose distributions are compared, half of them batched and half one text at a time; None: 2048,
            or as many as 256 MB of logits hold; 0: none.
        with_float32: compare distributions in float32 too; without, a dtype's own rounding is a crude bound.
        float32_tasks: run the tasks on one rank in float32 as well.
        progress: called with what runs next.

    Raises:
        ConfigError: a model without a tokenizer, a task or file that cannot be, a mesh or layout that cannot be.
    """
    # Rows are judged as they are computed, and rows of ours are written where the scheduler's cached pages would be.
    engine_config = at_hand(replace(engine_config, prefix_cache=False))
    resolved = resolve(engine_config)
    limits = resolved.limits
    if not files:
        raise ConfigError("nothing to evaluate: give at least one task with its file")
    if limits.max_context < _LEAST_CONTEXT:
        raise ConfigError(f"--max-context is {limits.max_context}; eval needs at least {_LEAST_CONTEXT}")
    tokenizer = load_model_text(engine_config.model).tokenizer
    if tokenizer is None:
        raise ConfigError(f"{engine_config.model} has no tokenizer.json, and tasks are text")
    setting = setting or Setting()
    tasks = [make_task(name, file, tokenizer, limits.max_context, setting) for name, file in files.items()]
    rows = min(2048, _KL_LOGITS // resolved.config.vocab_size) if kl_rows is None else kl_rows
    steps = _steps(tasks, rows, limits)
    one = _one_rank(engine_config, limits)
    is_float32 = resolved.dtype is torch.float32
    runs = _Runs(tasks, num_alone, progress)

    exact: dict[bool, Baseline] = {}
    exact_scores = None
    if not is_float32 and ((with_float32 and steps) or float32_tasks):
        with runs.engine(replace(one, dtype="float32"), "one rank, float32") as llm:
            exact = _baselines(llm, steps, None) if with_float32 else {}
            exact_scores = runs.tasks(llm) if float32_tasks else None
    with runs.engine(one, "one rank") as llm:
        baselines = _baselines(llm, steps, exact or None)
        outcomes = runs.tasks(llm)
    exact_result = None
    if exact_scores is not None:
        exact_result = LayoutResult(layout="one rank, float32", scores=_scores(exact_scores, outcomes))
    results = []
    for layout in layouts:
        config = replace(engine_config, layout=layout)
        with runs.engine(config, layout) as llm:
            distances = _distances(llm, baselines)
            scores = _scores(runs.tasks(llm), outcomes)
            encodings = tuple(sorted(llm.engine.plans.encodings))
        if exact and resolved.engine_config.quantization == "none":
            with runs.engine(replace(config, dtype="float32"), f"{layout}, float32") as llm:
                distances += _distances(llm, exact)
        results.append(
            LayoutResult(
                layout=layout,
                scores=scores,
                distances=distances,
                encodings=encodings,
                quantization=resolved.engine_config.quantization,
            )
        )
    return Evaluation(
        resolved=resolved,
        files=dict(files),
        one_rank=LayoutResult(layout="one rank", scores=_scores(outcomes, None)),
        exact=exact_result,
        layouts=tuple(results),
    )


_Outcomes = dict[tuple[str, bool], list[Outcome]]


class _Runs:
    """The work that runs on every engine."""

    def __init__(self, tasks: Sequence[Task], num_alone: int, progress: Callable[[str], None]) -> None:
        self._tasks, self._num_alone, self._progress = tasks, num_alone, progress
        self._name = ""

    @contextmanager
    def engine(self, config: EngineConfig, name: str) -> Iterator[LLM]:
        self._name = name
        self._progress(f"{name}: loading")
        options = {field: getattr(config, field) for field in EngineConfig.__dataclass_fields__ if field != "model"}
        with LLM(config.model, **options) as llm:
            self._progress(f"{name}: distributions")
            yield llm

    def tasks(self, llm: LLM) -> _Outcomes:
        """Every task's outcomes, batched, and of some items one at a time."""
        outcomes: _Outcomes = {}
        for task in self._tasks:
            self._progress(f"{self._name}: {task.name}, {len(task)} items batched")
            outcomes[task.name, False] = task.run(llm, range(len(task)), alone=False)
            if some := spread(len(task), self._num_alone):
                self._progress(f"{self._name}: {task.name}, {len(some)} items one at a time")
                outcomes[task.name, True] = task.run(llm, some, alone=True)
        return outcomes


def _one_rank(engine_config: EngineConfig, limits: Limits) -> EngineConfig:
    """The reference of the ranks: the same weights in the same dtype, without the other options."""
    return EngineConfig(
        model=engine_config.model,
        dtype=engine_config.dtype,
        quantization="none",
        run_on=engine_config.run_on,
        device=engine_config.device,
        load_format=engine_config.load_format,
        seed=engine_config.seed,
        rows_per_step=engine_config.rows_per_step,
        page_size=engine_config.page_size,
        max_context=limits.max_context,
        kv_tokens=limits.tokens_per_group * limits.num_groups,
    )


def _steps(tasks: Sequence[Task], num_rows: int, limits: Limits) -> dict[bool, list[ForcedStep]]:
    """Half the rows batched, the other half one text at a time; nothing where no text fits."""
    if num_rows < 0:
        raise ConfigError(f"--kl-rows is {num_rows}; it must be at least 0")
    texts = [task.texts() for task in tasks]
    if num_rows and not pick_texts(texts, num_rows // 2, limits.max_context):
        raise ConfigError(f"--kl-rows is {num_rows}, and half of that holds no text; raise it, or give 0 for none")
    picked = pick_texts(texts, num_rows // 2, limits.max_context)
    return {alone: list(forced_steps(picked, limits, alone=alone)) for alone in _HOW} if picked else {}


def _baselines(
    llm: LLM, steps: Mapping[bool, list[ForcedStep]], exact: Mapping[bool, Baseline] | None
) -> dict[bool, Baseline]:
    return {
        alone: Baseline(
            steps=these,
            logits=list(run_rows(llm.engine, these)),
            exact=exact[alone].logits if exact else None,
            dtype=llm.resolved.dtype,
        )
        for alone, these in steps.items()
    }


def _distances(llm: LLM, baselines: Mapping[bool, Baseline]) -> tuple[Measured, ...]:
    dtype = str(llm.resolved.dtype).removeprefix("torch.")
    return tuple(
        Measured(dtype=dtype, alone=alone, distance=measure(llm.engine, baseline))
        for alone, baseline in baselines.items()
    )


def _scores(outcomes: _Outcomes, one_rank: _Outcomes | None) -> tuple[Score, ...]:
    return tuple(
        score_of(name, found, None if one_rank is None else one_rank[name, alone], alone=alone)
        for (name, alone), found in outcomes.items()
    )
