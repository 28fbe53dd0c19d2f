"""Errors as clients read them: status, message and field, in the shape of OpenAI's or Anthropic's API."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from pydantic import ValidationError

from narrows.api import Draining, QueueFull, Unavailable
from narrows.errors import ConfigError, NarrowsError

__all__ = [
    "ApiError",
    "ClientGoneError",
    "backend_error",
    "error_body",
    "invalid",
    "is_messages_path",
    "renaming_fields",
    "required",
    "validation_as_api_error",
    "validation_error",
    "why_missing",
]

T = TypeVar("T")

_MESSAGES_PATH = "/v1/messages"
"""The path of Anthropic's API: it and paths below it answer in that API's shapes."""

_KINDS = {401: "authentication_error", 404: "not_found_error", 408: "timeout_error", 429: "rate_limit_error"}
_KINDS_OF_MESSAGES = _KINDS | {
    403: "permission_error",
    413: "request_too_large",
    503: "overloaded_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """An answer that is not a success. ``param`` names the field of the body; ``code`` is for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def __reduce__(self) -> tuple[Any, ...]:
        values: dict[str, Any] = {"param": self.param, "code": self.code, "headers": self.headers}
        return partial(ApiError, **values), (self.status, self.message)

    @property
    def body(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def error_body(error: ApiError, path: str) -> dict[str, Any]:
    """The error's body as the API at ``path`` spells it; Anthropic's has no room for the field but the message.

    >>> error_body(invalid("is 0", "max_tokens"), "/v1/messages")["error"]
    {'type': 'invalid_request_error', 'message': 'max_tokens: is 0'}
    """
    if not is_messages_path(path):
        return error.body
    kind = _KINDS_OF_MESSAGES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    named = error.param is None or error.param in error.message
    message = error.message if named else f"{error.param}: {error.message}"
    return {"type": "error", "error": {"type": kind, "message": message}}


def is_messages_path(path: str) -> bool:
    """Whether Anthropic's API answers there."""
    return path == _MESSAGES_PATH or path.startswith(_MESSAGES_PATH + "/")


class ClientGoneError(Exception):
    """The client disconnected before its answer began."""


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Status 400: the request is wrong or unsupported."""
    return ApiError(400, message, param=param, code=code)


def required(value: T | None, param: str) -> T:
    """The value of a required field.

    Raises:
        ApiError: 400, it is missing.
    """
    if value is None:
        raise invalid(f"{param} is missing", param)
    return value


@contextmanager
def renaming_fields(names: Mapping[str, str]) -> Iterator[None]:
    """Errors that name a field of chats name the other API's field instead, by ``names``.

    >>> with renaming_fields({"messages": "input"}):
    ...     raise invalid("messages: too long", "messages")
    Traceback (most recent call last):
    narrows.server.http.errors.ApiError: input: too long
    """
    try:
        yield
    except ApiError as error:
        old = error.param
        if old is None or old not in names:
            raise
        new = names[old]
        message = new + error.message.removeprefix(old) if error.message.startswith(old) else error.message
        raise ApiError(error.status, message, param=new, code=error.code, headers=error.headers) from error


@contextmanager
def validation_as_api_error() -> Iterator[None]:
    """Pydantic's validation errors inside become the client's error 400.

    >>> from narrows.server.schema.chat import ChatMessage
    >>> with validation_as_api_error():
    ...     ChatMessage(role="r" * 65)
    Traceback (most recent call last):
    narrows.server.http.errors.ApiError: role: String should have at most 64 characters
    """
    try:
        yield
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        path = ".".join(map(str, first["loc"]))
        raise invalid(f"{path}: {first['msg']}", path) from error


def backend_error(error: NarrowsError, param: str | None = None) -> ApiError:
    """A refusal of the backend or the tokenizer, as an HTTP error."""
    message = " ".join(str(error).split())
    if isinstance(error, QueueFull):
        wait = str(max(1, math.ceil(error.retry_after_s)))
        return ApiError(429, message, code="queue_full", headers={"retry-after": wait})
    if isinstance(error, Unavailable):
        return ApiError(503, message, code="draining" if isinstance(error, Draining) else "unavailable")
    if isinstance(error, ConfigError):
        return invalid(message, param)
    return ApiError(500, message, code="engine_error")


_Path = tuple[str | int, ...]


def validation_error(errors: Sequence[Mapping[str, Any]], body: Any) -> ApiError:
    """Status 400, naming the first wrong field.

    A field that may be of several types has an error for each of them. The error shown is that of the type that
    fitted furthest into the value: for a list of 33 stops, that they are too many, not that it is no text.
    """
    paths = [_path(error, body) for error in errors]
    first = paths[0]
    tries = [at for at, path in enumerate(paths) if path[: len(first)] == first]

    def fit(at: int) -> tuple[tuple[int, ...], int, bool]:
        return _reached(errors[at], paths[at]), len(paths[at]), not _is_type_error(errors[at])

    best = max(tries, key=fit)
    error, param = errors[best], ".".join(map(str, paths[best])) or None
    what = _explanation(error)
    if param is None:
        return invalid(f"the body must be a JSON object with this endpoint's fields: {what}")
    return invalid(f"{param}: {what}", param)


def _path(error: Mapping[str, Any], body: Any) -> _Path:
    """Where in the body the error is. Pydantic's path holds names of types too, which lead nowhere in the body."""
    path: list[str | int] = []
    here = body
    for step in error["loc"]:
        if isinstance(here, Mapping) and isinstance(step, str):
            if step not in here and error["type"] != "missing":
                continue
            here = here.get(step)
        elif isinstance(here, list) and isinstance(step, int) and step < len(here):
            here = here[step]
        else:
            continue
        path.append(step)
    return tuple(path)


def _reached(error: Mapping[str, Any], path: _Path) -> tuple[int, ...]:
    """How many items of the lists on the way were as they should be."""
    items = tuple(step for step in path if isinstance(step, int))
    return (*items, error["ctx"]["max_length"]) if error["type"] == "too_long" else items


def _is_type_error(error: Mapping[str, Any]) -> bool:
    return str(error["type"]).endswith("_type")


def _explanation(error: Mapping[str, Any]) -> str:
    limits = error.get("ctx", {})
    if error["type"] == "missing":
        return "is missing"
    if error["type"] == "too_long":
        most = f"at most {limits['max_length']:,} are accepted"
        return most if limits["actual_length"] is None else f"{most}, {limits['actual_length']:,} were sent"
    if error["type"] == "string_too_long":
        return f"at most {limits['max_length']:,} characters are accepted"
    return str(error["msg"])


@dataclass(frozen=True, slots=True)
class _Absent:
    """``paths``: each with all that is below it."""

    paths: tuple[str, ...]
    why: str


_ABSENT = (
    _Absent(
        ("/v1/embeddings", "/embeddings", "/embed", "/api/embed", "/api/embeddings", "/pooling"),
        "this server generates text and makes no embeddings; ask a server of an embedding model for them",
    ),
    _Absent(
        ("/v1/rerank", "/v2/rerank", "/rerank", "/v1/score", "/score", "/classify"),
        "this server generates text and ranks none; ask a server of a reranking model, or compare "
        "log-probabilities of /v1/completions with echo and logprobs",
    ),
    _Absent(
        ("/v1/moderations",), "this server generates text and moderates none; ask a model about the text in a chat"
    ),
    _Absent(
        ("/v1/audio", "/v1/images", "/v1/videos", "/v1/realtime"),
        "this server reads and writes text only; use a server of a model that does more",
    ),
    _Absent(
        ("/v1/responses", "/v1/conversations", "/v1/assistants", "/v1/threads", "/v1/vector_stores", "/v1/containers"),
        "this server keeps nothing between requests; send the whole conversation to /v1/responses",
    ),
    _Absent(
        ("/v1/files", "/v1/uploads", "/v1/batches", "/v1/messages/batches", "/v1/fine_tuning", "/v1/evals"),
        "this server keeps no files and no batches; send requests as they are, many at once",
    ),
    _Absent(
        ("/tokenizer_info", "/get_tokenizer_info"),
        "this server hands out no tokenizer's files; they are in the checkpoint's folder, and /tokenize and "
        "/detokenize do what they say",
    ),
    _Absent(
        ("/v1/complete", "/generate", "/generate_stream", "/api/chat", "/api/generate", "/api/tags", "/api/show"),
        "this server speaks OpenAI's API (/v1/chat/completions, /v1/completions, /v1/responses) and Anthropic's "
        "(/v1/messages)",
    ),
)


def why_missing(path: str) -> str:
    """Why this server has no ``path``, and the alternative; empty for other paths.

    >>> why_missing("/v1/embeddings").partition(";")[0]
    'this server generates text and makes no embeddings'
    """
    path = path.rstrip("/")
    found = (absent.why for absent in _ABSENT for known in absent.paths if f"{path}/".startswith(f"{known}/"))
    return next(found, "")
