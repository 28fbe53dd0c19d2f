"""Writes the traces of the engines of one command to one file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from narrows.engine.core import Engine
from narrows.errors import ConfigError
from narrows.instruments.trace_events import TraceRun, check_trace_file, write_trace
from narrows.instruments.tracer import DEFAULT_STEPS, Tracer

__all__ = ["MOST_STEPS", "TraceFile", "trace_about", "written_line"]

MOST_STEPS = 100_000


@dataclass(slots=True, kw_only=True)
class TraceFile:
    """Where a trace goes and how many steps of each engine it may hold.

    Raises:
        ConfigError: a number of steps out of range, or nothing can be written there.
    """

    file: str
    num_steps: int = DEFAULT_STEPS
    _open: list[tuple[str, Tracer]] = field(default_factory=list)
    _runs: list[TraceRun] = field(default_factory=list)
    _about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 1 <= self.num_steps <= MOST_STEPS:
            raise ConfigError(f"--trace-steps is {self.num_steps}; it must be between 1 and {MOST_STEPS}")
        check_trace_file(self.file)

    def start(self, name: str, engine: Engine) -> None:
        """Record an engine from its next step on; ``name`` is what its rows are called."""
        self._open.append((name, Tracer(engine, self.num_steps)))
        self._about = self._about or trace_about(engine)

    def collect(self) -> None:
        """Take what the engines' ranks have recorded; before they are closed."""
        for name, tracer in self._open:
            self._runs.append(tracer.run(tracer.end().result(), name))
        self._open.clear()

    def write(self) -> str:
        """Write the file; a line for people that says what it holds, and what it does not.

        Raises:
            ConfigError: the file cannot be written.
        """
        self.collect()
        return written_line(self.file, self._runs, write_trace(self.file, self._runs, self._about))


def trace_about(engine: Engine) -> dict[str, Any]:
    """What a trace was made of, as text."""
    resolved = engine.resolved
    return {
        "model": resolved.config.name,
        "mesh": str(resolved.mesh),
        "dtype": str(resolved.dtype).removeprefix("torch."),
        "priced_for": resolved.deployment.device.name,
        "ranks": f"{resolved.engine_config.ranks}, {resolved.engine_config.threads} thread(s) each",
        "collectives": engine.ranks.transport,
    }


def written_line(file: str, runs: list[TraceRun], num_events: int) -> str:
    """What was written, and what was cut."""
    steps, cut = sum(len(run.steps) for run in runs), sum(run.num_cut for run in runs)
    line = (
        f"trace: {steps} steps, {num_events} events in {file}; open it in https://ui.perfetto.dev or chrome://tracing"
    )
    if not cut:
        return line
    return f"{line}; the {cut} steps after them are not in it (--trace-steps {max(len(run.steps) for run in runs)})"
