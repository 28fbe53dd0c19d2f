"""What a body comes to, in few bytes: a process that reads bodies hands it over. Texts are begun from it elsewhere."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, replace
from typing import Any

from narrows.api import Generation
from narrows.sched.sampling import SamplingParams
from narrows.server.allowed import AllowedTokens
from narrows.server.forms import Constraint
from narrows.server.schema.common import GenerationFields

__all__ = ["Asked", "Wishes", "of_choice"]

_MASK63 = 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What of a body matters while it is answered. ``logprobs``: best ones of each token; None: no log-probabilities.

    ``most_tokens``: what ``max_tokens`` was, by whichever of its names.
    """

    stream: bool
    wants_usage: bool
    num_choices: int
    logprobs: int | None
    priority: int
    most_tokens: int | None
    stops: tuple[str, ...]
    keeps_stop: bool
    skips_special: bool

    @classmethod
    def of(cls, body: GenerationFields, *, logprobs: int | None) -> Wishes:
        """Those of a body."""
        return cls(
            stream=bool(body.stream),
            wants_usage=body.wants_usage,
            num_choices=body.num_choices,
            logprobs=logprobs,
            priority=body.priority or 0,
            most_tokens=body.most_tokens,
            stops=body.stops,
            keeps_stop=body.keeps_stop,
            skips_special=body.skip_special_tokens is not False,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a body comes to. ``head``: what every piece of the answer begins with. ``prompts``: as token ids."""

    wishes: Wishes
    head: dict[str, Any]
    prompts: tuple[array[int], ...]
    max_tokens: int
    end_ids: frozenset[int]
    sampling: SamplingParams
    allowed: AllowedTokens | None
    constraint: Constraint | None

    def generation(self, prompt: tuple[int, ...], choice: int) -> Generation:
        """The ``choice``-th text of a prompt."""
        return Generation(
            prompt=prompt,
            max_tokens=self.max_tokens,
            end_ids=self.end_ids,
            sampling=of_choice(self.sampling, choice),
            priority=self.wishes.priority,
            guide=self.allowed,
        )


def of_choice(sampling: SamplingParams, index: int) -> SamplingParams:
    """The parameters of the ``index``-th of ``n`` texts: a seed of its own, so that they differ."""
    if sampling.seed is None or not index:
        return sampling
    return replace(sampling, seed=(sampling.seed + index) & _MASK63)
