"""Checks that a request can run within the limits of a scheduler; the error has the numbers and the way out."""

from __future__ import annotations

from narrows.errors import ConfigError
from narrows.sched.limits import MOST_PRIORITY, Limits
from narrows.sched.request import Request

__all__ = ["accept"]


def accept(request: Request, limits: Limits) -> None:
    """Cut its ``max_tokens`` to the context, and check that it can run. Any thread may call.

    Raises:
        ConfigError: an empty prompt, more tokens than the context or a group's cache holds, ``min_tokens`` above
        ``max_tokens``, a priority out of range, a guide that allows no token.
    """
    if not request.prompt:
        raise ConfigError("the prompt is empty: it needs at least one token")
    least = 0 if request.scores_prompt else 1
    if request.max_tokens < least:
        raise ConfigError(f"max_tokens is {request.max_tokens}; it must be at least {least}")
    if request.sampling is not None and request.sampling.min_tokens > request.max_tokens:
        raise ConfigError(
            f"min_tokens is {request.sampling.min_tokens}; it must be at most max_tokens, {request.max_tokens}"
        )
    if not -MOST_PRIORITY <= request.priority <= MOST_PRIORITY:
        raise ConfigError(
            f"the priority is {request.priority}; it must be between {-MOST_PRIORITY} and {MOST_PRIORITY}"
        )
    answer = min(request.max_tokens, 1)
    if len(request.prompt) + answer > limits.max_context:
        left = " and at least 1 must be left for the answer" if answer else ""
        raise ConfigError(
            f"the prompt has {len(request.prompt)} tokens, but the context holds {limits.max_context}{left}; "
            f"shorten it to {limits.max_context - answer} tokens or raise --max-context"
        )
    request.max_tokens = min(request.max_tokens, limits.max_context - len(request.prompt))
    if request.most_tokens > limits.tokens_per_group:
        raise ConfigError(
            f"the request needs KV cache for {request.most_tokens} tokens, but a group has "
            f"{limits.tokens_per_group}; ask for fewer tokens or raise --kv-tokens to {request.most_tokens}"
        )
    if request.guide is not None and request.guide.ready and not any(request.guide.allowed()):
        raise ConfigError("the constraint on the answer allows no first token; change it")
