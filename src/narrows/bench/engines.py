"""The variants of a benchmark and their engines. Layouts of one configuration share an engine and its weights."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

from narrows.arch.weight_sharding import WeightSharding
from narrows.calibrate.machine import proportional_memory
from narrows.engine.config import EngineConfig, Resolved, resolve
from narrows.engine.core import Engine
from narrows.errors import ConfigError
from narrows.instruments.trace_file import TraceFile
from narrows.ranks.processes import ProcessRanks

__all__ = ["RunningVariant", "Variant", "memory_of", "parse_variants", "running_variants"]

_YES = {"yes": True, "no": False}
_CHANGEABLE = (
    *("dp", "tp", "threads", "ranks", "dtype", "quantization", "encode_rows"),
    *("rows_per_step", "requests_per_group", "page_size", "checked", "batch_invariant", "plan_file"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One engine configuration under one layout."""

    name: str
    config: EngineConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningVariant:
    """A variant whose engine runs. Several may share an engine; :meth:`engine` switches it to this variant's layout."""

    name: str
    shared: Engine
    layout: str

    def engine(self) -> Engine:
        self.shared.plans.select(self.layout)
        return self.shared

    @property
    def resolved(self) -> Resolved:
        return self.shared.resolved


def parse_variants(config: EngineConfig, layouts: Sequence[str], against: Sequence[str]) -> tuple[Variant, ...]:
    """Every layout under ``config``, and then under ``config`` with the changes of each of ``against``.

    ``against``: for example ``tp=1,threads=2``.

    Raises:
        ConfigError: an option that is not known, or a value that it cannot have.
    """
    names = tuple(dict.fromkeys(layouts)) or (config.layout,)
    out = [Variant(name=name, config=replace(config, layout=name)) for name in names]
    for text in against:
        changed = replace(config, **_changes(text))
        out += [
            Variant(name=f"{name}, {text}" if len(names) > 1 else text, config=replace(changed, layout=name))
            for name in names
        ]
    return tuple(out)


def _changes(text: str) -> dict[str, Any]:
    kinds = {field.name: type(field.default) for field in fields(EngineConfig) if field.name in _CHANGEABLE}
    changes: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or name not in kinds:
            raise ConfigError(f"--against {text!r}: OPTION=VALUE[,OPTION=VALUE] is needed, with {', '.join(kinds)}")
        changes[name] = _value(text, kinds[name], value.strip())
    return changes


def _value(text: str, kind: type, value: str) -> object:
    if kind is str:
        return value
    try:
        return _YES[value.lower()] if kind is bool else int(value)
    except (KeyError, ValueError):
        want = "yes or no" if kind is bool else "a whole number"
        raise ConfigError(f"--against {text!r}: {value!r} must be {want}") from None


@contextmanager
def running_variants(
    variants: Sequence[Variant], trace: TraceFile | None = None
) -> Iterator[tuple[RunningVariant, ...]]:
    """Start the engines of the variants, and close them at the end. ``trace`` records them, warm-up included.

    Layouts that share an engine hold weights in the published sharding, which named layouts need; a single layout has
    the sharding that is best for it.
    """
    layouts: dict[EngineConfig, list[str]] = {}
    for variant in variants:
        layouts.setdefault(replace(variant.config, layout="auto"), []).append(variant.config.layout)
    with ExitStack() as stack:
        engines = {}
        for key, names in layouts.items():
            sharding = WeightSharding() if len(set(names)) > 1 else None
            engines[key] = stack.enter_context(
                Engine(resolve(replace(key, layout=names[0], prefix_cache=False), sharding))
            )
        if trace is not None:
            for key, engine in engines.items():
                trace.start(", ".join(v.name for v in variants if replace(v.config, layout="auto") == key), engine)
        yield tuple(
            RunningVariant(
                name=variant.name,
                shared=engines[replace(variant.config, layout="auto")],
                layout=variant.config.layout,
            )
            for variant in variants
        )
        if trace is not None:
            trace.collect()


def memory_of(engine: Engine) -> int:
    """Bytes of this process and of the engine's ranks, PSS: what they share is counted once."""
    own = proportional_memory([os.getpid()])
    return own + proportional_memory(engine.ranks.pids if isinstance(engine.ranks, ProcessRanks) else ())
