"""Errors as clients read them: a status, and a body in the shape of OpenAI's API or, on its routes, of Anthropic's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from pydantic import ValidationError

from narrows.api import QueueFull, Unavailable
from narrows.errors import ConfigError, NarrowsError

__all__ = [
    "ApiError",
    "ClientGoneError",
    "error_body",
    "given",
    "invalid",
    "is_messages_path",
    "refused",
    "renamed",
    "translated",
]

T = TypeVar("T")

_MESSAGES_PATH = "/v1/messages"
"""Where Anthropic's API lives: it and what is below it answer in that API's shapes."""

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
        """What the client reads."""
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def error_body(error: ApiError, path: str) -> dict[str, Any]:
    """The error's body as the API at ``path`` spells it; Anthropic's has no place for the field but the message.

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
    """The client went away before its answer was begun; nobody reads one."""


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Status 400: the request cannot be served as it is."""
    return ApiError(400, message, param=param, code=code)


def given(value: T | None, param: str) -> T:
    """The value of a field that may not be left out here.

    Raises:
        ApiError: 400, it is.
    """
    if value is None:
        raise invalid(f"{param} is missing", param)
    return value


@contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Errors that name a field of chats name that of another API instead; ``names`` leads from one to the other.

    >>> with renamed({"messages": "input"}):
    ...     raise invalid("messages: too long", "messages")
    Traceback (most recent call last):
    narrows.server.errors.ApiError: input: too long
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
def translated() -> Iterator[None]:
    """What another API allows and a chat does not is the client's error, named as chats name it.

    >>> from narrows.server.schema.chat import ChatMessage
    >>> with translated():
    ...     ChatMessage(role="r" * 65)
    Traceback (most recent call last):
    narrows.server.errors.ApiError: role: String should have at most 64 characters
    """
    try:
        yield
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise invalid(f"{place}: {first['msg']}", place) from error


def refused(error: NarrowsError, param: str | None = None) -> ApiError:
    """What a backend's or a tokenizer's refusal is over HTTP."""
    message = " ".join(str(error).split())
    if isinstance(error, QueueFull):
        wait = str(max(1, math.ceil(error.retry_after_s)))
        return ApiError(429, message, code="queue_full", headers={"retry-after": wait})
    if isinstance(error, Unavailable):
        return ApiError(503, message, code="unavailable")
    if isinstance(error, ConfigError):
        return invalid(message, param)
    return ApiError(500, message, code="engine_error")
