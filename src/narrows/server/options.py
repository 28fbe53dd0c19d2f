"""What a server serves, and what it allows. Frozen values; knows no HTTP."""

from __future__ import annotations

from dataclasses import dataclass

from narrows.errors import ConfigError
from narrows.text import GenerationConfig, Tokenizer

__all__ = ["ServedModel", "ServerOptions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A model as clients see it.

    ``names``: any of them may stand in a request's ``model``; the first stands for it in ``/v1/models``.
    ``max_context``: most tokens of a prompt and its text together. ``tokenizer`` None: ids in, ids' probabilities out.
    """

    names: tuple[str, ...]
    tokenizer: Tokenizer | None
    generation: GenerationConfig
    max_context: int
    vocab_size: int
    eos_ids: frozenset[int]
    created: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """``api_keys``: any of them is good; none: all may come in. ``request_timeout_s``: a request's time in all.

    ``tool_call_parser`` and ``reasoning_parser``: a format's name, ``auto`` (the chat template tells) or ``none``.
    ``max_generations``: most texts of a request, prompts times ``n``. ``allow_priority``: requests may be more urgent
    than normal (``priority`` below 0).

    Raises:
        ConfigError: a limit that would let nothing in, an empty key.
    """

    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = 16 * 1024 * 1024
    request_timeout_s: float = 600.0
    max_generations: int = 1024
    allow_priority: bool = False
    tool_call_parser: str = "auto"
    reasoning_parser: str = "auto"

    def __post_init__(self) -> None:
        if any(not key or not key.isascii() for key in self.api_keys):
            raise ConfigError("an API key is empty or not ASCII; a client could never send it")
        for name, value in (
            ("--max-body-mb", self.max_body_bytes),
            ("--request-timeout", self.request_timeout_s),
            ("the most generations per request", self.max_generations),
        ):
            if not value > 0:
                raise ConfigError(f"{name} is {value:g}; it must be more than 0")
