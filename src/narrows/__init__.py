"""narrows: LLM inference whose activations cross ranks where they are narrowest, by plan.

``LLM`` and ``SamplingParams`` are imported when they are first asked for, so that planning needs no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from narrows.engine.llm import LLM, Completion
    from narrows.sched.sampling import SamplingParams

__all__ = ["LLM", "Completion", "SamplingParams"]


def __getattr__(name: str) -> Any:
    if name in ("LLM", "Completion"):
        from narrows.engine import llm  # noqa: PLC0415 - planning must not import torch

        return getattr(llm, name)
    if name == "SamplingParams":
        from narrows.sched.sampling import SamplingParams  # noqa: PLC0415

        return SamplingParams
    raise AttributeError(f"module 'narrows' has no attribute {name!r}")
