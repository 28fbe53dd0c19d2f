"""The limits of a step and of the cache, and the numbers in the rules of the scheduler."""

from __future__ import annotations

from dataclasses import dataclass

from narrows.errors import ConfigError

__all__ = ["MOST_PRIORITY", "Limits"]

MOST_PRIORITY = 100
"""Priorities lie between -100 and 100, so that the longest wait is bounded (see :attr:`Limits.aging_steps`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of a step and of the cache. ``pages_per_group`` includes the null page.

    ``prefill_chunk``: if not 0, prompts are cut at its multiples and nowhere else, whatever else is in a step; tokens
    that were generated before a preemption run again one row at a time, as they did the first time.
    ``scored_rows_per_step``: most rows of scored prompts in a step, at least one such chunk; 0: as many as rows.
    ``prompt_rows``: most rows of prompts in a step in which texts go on, so that long prompts do not hold them
    up; 0: as many as rows.
    ``prefix_cache``: pages whose tokens another request has at the same positions are used again.
    ``aging_steps``: a request goes before one of the next more urgent priority that came so many steps after it.
    ``decode_weight``: rows of prompts that a running request counts for, beside those it has left, where the group with
    the least to compute is looked for.
    ``align_steps``: most steps that a prompt waits for one of another group, while others decode.

    Raises:
        ConfigError: a step that cannot hold one such chunk.
    """

    num_groups: int = 1
    rows_per_step: int = 2048
    requests_per_group: int = 256
    page_size: int = 16
    pages_per_group: int = 512
    max_context: int = 2048
    prefill_chunk: int = 0
    scored_rows_per_step: int = 0
    prompt_rows: int = 0
    prefix_cache: bool = True
    aging_steps: int = 256
    decode_weight: int = 256
    align_steps: int = 2

    def __post_init__(self) -> None:
        if self.rows_per_step < self.prefill_chunk:
            raise ConfigError(
                f"prompts are cut into chunks of {self.prefill_chunk} rows, but a step may hold {self.rows_per_step}; "
                f"raise --max-rows to at least {self.prefill_chunk}"
            )
        if 0 < self.prompt_rows < self.prefill_chunk:
            raise ConfigError(
                f"prompts are cut into chunks of {self.prefill_chunk} rows, but beside other texts they may have "
                f"{self.prompt_rows}; raise --prompt-rows to at least {self.prefill_chunk}"
            )

    @property
    def tokens_per_group(self) -> int:
        """Tokens of KV cache that one group can hold."""
        return (self.pages_per_group - 1) * self.page_size

    @property
    def most_decoding(self) -> int:
        """Rows of the largest decode step."""
        return min(self.requests_per_group * self.num_groups, self.rows_per_step)

    @property
    def scored_rows(self) -> int:
        """Most rows of scored prompts in a step."""
        return self.scored_rows_per_step or self.rows_per_step
