"""What a server serves and allows: frozen options."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from narrows.errors import ConfigError
from narrows.text import GenerationConfig, Tokenizer

__all__ = ["ConnectionLimits", "ServedModel", "ServerOptions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A model as clients see it.

    ``names``: any of them may be a request's ``model``; the first is listed in ``/v1/models``.
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
class ConnectionLimits:
    """Limits of a connection before, between and beside its requests.

    ``max_connections`` at once, and ``reserved_slots`` more for /health and /metrics only. A request's
    head has at most ``max_head_bytes`` and ``max_headers``, and comes within ``head_timeout_s``. Its body comes within
    ``body_timeout_s`` and a second more for each ``body_bytes_per_s`` of it; its chunks, if it comes in many, have at
    least ``min_chunk_bytes`` on the average. At most ``max_pipelined`` requests wait
    behind the one that is being answered. A connection is closed when it has been idle for ``keep_alive_s``, or when
    its client has read nothing of a waiting answer for ``send_timeout_s``.

    Raises:
        ConfigError: a limit that would let nothing in.
    """

    max_connections: int = 512
    reserved_slots: int = 16
    max_head_bytes: int = 64 * 1024
    max_headers: int = 128
    max_pipelined: int = 16
    head_timeout_s: float = 10.0
    body_timeout_s: float = 20.0
    body_bytes_per_s: int = 1024
    min_chunk_bytes: int = 256
    keep_alive_s: float = 5.0
    send_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        for each in fields(self):
            if not getattr(self, each.name) > 0:
                raise ConfigError(f"{each.name} is {getattr(self, each.name):g}; it must be more than 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """``api_keys``: any is valid; without keys all requests are. ``request_timeout_s``: a request's time in all.

    ``tool_call_parser`` and ``reasoning_parser``: a format's name, ``auto`` (by the chat template) or ``none``.
    ``max_generations``: most texts of a request, prompts times ``n``. ``allow_priority``: requests may be more urgent
    than normal (``priority`` below 0). ``hosts``: names that a request's Host may have beside this machine's own; None:
    any. ``origins``: web pages that may use the server; ``*``: all of them. ``body_process``: large bodies are
    read in their own process.

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
    hosts: frozenset[str] | None = None
    origins: tuple[str, ...] = ()
    body_process: bool = False
    connections: ConnectionLimits = field(default_factory=ConnectionLimits)

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
