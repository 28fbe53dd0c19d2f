"""Sampling parameters, and the random stream of sampling.

The stream is a function of (seed, position) alone: a token does not depend on the rest of the batch,
on the order of steps, or on the number of ranks.

>>> uniform(7, 0) == uniform(7, 0), uniform(7, 0) == uniform(7, 1)
(True, False)
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import NamedTuple

from narrows.errors import ConfigError

__all__ = ["GREEDY", "Logprobs", "SamplingParams", "TokenScore", "uniform"]

Logprobs = tuple[float, tuple[tuple[int, float], ...]]
"""The chosen token's log-probability, and the best tokens with theirs."""

MAX_LOGPROBS = 20
MAX_BIAS = 100.0


class TokenScore(NamedTuple):
    """Score of a prompt's token after all before it: its log-probability in nats, its rank among all tokens
    (1: the most likely; of equal ones the lowest id comes first), and the best tokens with theirs."""

    logprob: float
    rank: int
    best: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """The field's usual parameters; the defaults choose the most likely token.

    ``temperature`` 0 is greedy. ``top_k`` 0 keeps all; ``top_p`` keeps the most likely tokens that together reach it;
    ``min_p`` keeps tokens at least that likely relative to the best. They apply in this order, as in transformers.
    ``repetition_penalty`` (over prompt and output, multiplicative) as in transformers; ``presence_penalty`` and
    ``frequency_penalty`` (over the output, subtracted) as in OpenAI's API. ``seed`` None: the engine draws one.
    ``logit_bias``: (token, what is added to its logit), before any penalty; as in OpenAI's API. ``min_tokens``: so many
    tokens are generated before one may end the text.
    ``logprobs``: log-probabilities of the chosen token and of so many best ones, from the unchanged logits (no bias,
    penalty, mask or temperature in them); None: none.
    ``prompt_logprobs``: the same for every token of the prompt but the first, as :class:`TokenScore`.

    Raises:
        ConfigError: a value out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        ranges = (
            ("temperature", self.temperature, 0.0, 100.0),
            ("top_p", self.top_p, 1e-9, 1.0),
            ("min_p", self.min_p, 0.0, 1.0),
            ("repetition_penalty", self.repetition_penalty, 1e-3, 1e3),
            ("presence_penalty", self.presence_penalty, -2.0, 2.0),
            ("frequency_penalty", self.frequency_penalty, -2.0, 2.0),
        )
        for name, value, low, high in ranges:
            if not low <= value <= high:
                raise ConfigError(f"{name} is {value:g}; it must be between {low:g} and {high:g}")
        if self.top_k < 0:
            raise ConfigError(f"top_k is {self.top_k}; it must be at least 0 (0 keeps all tokens)")
        if self.min_tokens < 0:
            raise ConfigError(f"min_tokens is {self.min_tokens}; it must be at least 0")
        self._check_bias()
        for name, count in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if count is not None and not 0 <= count <= MAX_LOGPROBS:
                raise ConfigError(f"{name} is {count}; it must be between 0 and {MAX_LOGPROBS}")

    def _check_bias(self) -> None:
        for token, bias in self.logit_bias:
            if token < 0:
                raise ConfigError(f"logit_bias names token {token}; token ids are at least 0")
            if not -MAX_BIAS <= bias <= MAX_BIAS:
                raise ConfigError(
                    f"logit_bias of token {token} is {bias:g}; it must be between {-MAX_BIAS:g} and {MAX_BIAS:g}"
                )
        if len({token for token, _ in self.logit_bias}) < len(self.logit_bias):
            raise ConfigError("logit_bias names a token twice; name each once")

    def with_seed(self, seed: int) -> SamplingParams:
        """The same but for the seed. The rest is not checked again: ``n`` texts may share a bias of every token."""
        twin = copy(self)
        object.__setattr__(twin, "seed", seed)
        return twin

    @property
    def penalizes(self) -> bool:
        """Whether the tokens so far change the logits."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def needs_logits(self) -> bool:
        """Whether whole rows of logits are needed; otherwise each vocabulary shard's best token is enough."""
        asks = self.logprobs is not None or self.prompt_logprobs is not None
        changes = self.penalizes or bool(self.logit_bias) or self.min_tokens > 0
        return self.temperature > 0.0 or changes or asks


GREEDY = SamplingParams()


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) for the token at ``position`` of a sequence: splitmix64 of both, 53 bits of it."""
    return (_mix(_mix(seed) ^ position) >> 11) * 2.0**-53


def _mix(x: int) -> int:
    """splitmix64's output function (Steele, Lea and Flood, 2014)."""
    mask = (1 << 64) - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)
