"""How many rows of prompts a step may have beside the texts that it continues."""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["PromptBudget", "fixed_budget"]

PromptBudget = Callable[[Sequence[int], int], int]
"""(decode rows of each attention group, rows that the step has left) -> most rows of prompts in the step.

A pure function, called once per step after its decode rows are known. It returns 1 or more where nothing decodes, and
``prefill_chunk`` or more where prompts are cut at fixed positions: else prompts would never run."""


def fixed_budget(prompt_rows: int) -> PromptBudget:
    """At most ``prompt_rows`` in a step that also decodes; all rows that are left in others, and for 0 in every step.

    >>> budget = fixed_budget(512)
    >>> budget((3, 0), 2045), budget((0, 0), 2048), fixed_budget(0)((3, 0), 2045)
    (512, 2048, 2045)
    """

    def budget(decoding: Sequence[int], left: int) -> int:
        return min(left, prompt_rows) if prompt_rows and any(decoding) else left

    return budget
