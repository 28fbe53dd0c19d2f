"""What serving engines add to, and save of, the time of isolated kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from narrows.errors import ConfigError

__all__ = ["ENGINES", "KERNELS_ALONE", "EngineStyle", "engine_style"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStyle:
    """How an engine runs the kernels of a step. Seconds.

    ``launch_overlap_s``: how much earlier a kernel begins than the one before it ends (programmatic dependent launch,
    a second stream); at most half of a kernel is saved. ``parallel_shared_expert``: the shared expert runs beside the
    routed ones on a second stream, so that the longer of the two counts. ``host_s`` and ``host_row_s``: what each step
    takes beside its kernels, and for each row with logits (scheduling, sampling, detokenizing). ``arrival_s``: from
    when a request is sent until the scheduler has it (HTTP, tokenizing). ``source``: where they come from.
    """

    name: str
    launch_overlap_s: float = 0.0
    parallel_shared_expert: bool = False
    host_s: float = 0.0
    host_row_s: float = 0.0
    arrival_s: float = 0.0
    source: str = ""

    @property
    def note(self) -> str:
        """One line for people who read prices of this engine; empty if there is none."""
        return "" if self is KERNELS_ALONE else f"engine {self.name}: host and overlap of {self.source}"


KERNELS_ALONE = EngineStyle(name="none", source="isolated kernels, one after the other")
"""No engine: the sum of its kernels."""

_FITTED = "fitted to the published runs of docs/published.md"

SGLANG = EngineStyle(
    name="sglang",
    parallel_shared_expert=True,
    host_row_s=52e-6,
    arrival_s=185e-3,
    source=f"SGLang 0.5.6 and 0.5.9, 17 runs, {_FITTED}",
)
TRTLLM = EngineStyle(
    name="trtllm",
    launch_overlap_s=4e-6,
    parallel_shared_expert=True,
    host_s=2.8e-3,
    host_row_s=20e-6,
    arrival_s=10e-3,
    source=f"TensorRT-LLM 1.0 to 1.2, 25 runs, {_FITTED}",
)
VLLM = EngineStyle(
    name="vllm",
    host_s=1.1e-3,
    host_row_s=28e-6,
    arrival_s=10e-3,
    source=f"vLLM to 0.12, 13 runs, {_FITTED}",
)

ENGINES: Mapping[str, EngineStyle] = MappingProxyType(
    {style.name: style for style in (KERNELS_ALONE, SGLANG, TRTLLM, VLLM)}
)


def engine_style(name: str) -> EngineStyle:
    """The style called ``name``.

    Raises:
        ConfigError: there is none; the text lists those that there are.
    """
    if name not in ENGINES:
        raise ConfigError(f"engine {name!r} is not known; engines: {', '.join(ENGINES)}")
    return ENGINES[name]
