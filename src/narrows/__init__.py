"""narrows: LLM inference whose activations cross ranks where they are narrowest, by plan.

    from narrows import plan_step            # price a model's layouts, without torch
    from narrows import LLM, SamplingParams  # generate text; needs narrows[engine]

Each name is imported when it is first needed, so that planning needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from narrows.engine.llm import LLM, Completion, Piece
    from narrows.errors import ConfigError, NarrowsError
    from narrows.plan.report.plan_report import PlanReport
    from narrows.plan.report.plan_step import plan_step
    from narrows.sched.sampling import SamplingParams

__all__ = ["LLM", "Completion", "ConfigError", "NarrowsError", "Piece", "PlanReport", "SamplingParams", "plan_step"]

_MODULES = {
    "LLM": "narrows.engine.llm",
    "Completion": "narrows.engine.llm",
    "ConfigError": "narrows.errors",
    "NarrowsError": "narrows.errors",
    "Piece": "narrows.engine.llm",
    "PlanReport": "narrows.plan.report.plan_report",
    "SamplingParams": "narrows.sched.sampling",
    "plan_step": "narrows.plan.report.plan_step",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'narrows' has no attribute {name!r}")
    try:
        return getattr(import_module(_MODULES[name]), name)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("narrows"):
            raise
        raise ImportError(
            f"narrows.{name} needs {error.name}, which is not installed: pip install 'narrows[engine]'"
        ) from None
