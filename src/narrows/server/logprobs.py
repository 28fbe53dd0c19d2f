"""Log-probabilities in the two forms of the API: by token in chats, by columns in completions. Knows no requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from narrows.sched.sampling import Logprobs
from narrows.text import Tokenizer

__all__ = ["LogprobColumns", "chat_logprob"]

_LEAST = -9999.0
"""What stands for no chance at all: JSON has no infinity."""


def chat_logprob(tokenizer: Tokenizer, token: int, found: Logprobs) -> dict[str, Any]:
    """One entry of a chat's ``logprobs.content``."""
    logprob, best = found
    top = [_named(tokenizer, other, value) for other, value in best]
    return {**_named(tokenizer, token, logprob), "top_logprobs": top}


def _named(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.bytes_of(token)
    return {"token": _spelled(data), "logprob": max(logprob, _LEAST), "bytes": list(data)}


def _spelled(data: bytes) -> str:
    """The token's text; what is not whole characters byte by byte, as in ``bytes:\\xe4\\xb8``."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class LogprobColumns:
    """The columns of a completion's ``logprobs``, filled token by token; :meth:`take` hands over what is new."""

    def __init__(self, tokenizer: Tokenizer | None, *, num_best: int, as_ids: bool) -> None:
        self._tokenizer = tokenizer
        self._num_best = num_best
        self._as_ids = as_ids or tokenizer is None
        self._columns = _no_columns()

    def add(self, token: int, offset: int, logprob: float | None, best: Sequence[tuple[int, float]]) -> None:
        """A token that begins at character ``offset`` of the text; ``logprob`` None: the first of a prompt."""
        self._columns["tokens"].append(self._name(token))
        self._columns["text_offset"].append(offset)
        self._columns["token_logprobs"].append(None if logprob is None else max(logprob, _LEAST))
        top = None
        if logprob is not None and self._num_best:
            top = {self._name(other): max(value, _LEAST) for other, value in best[: self._num_best]}
            top.setdefault(self._name(token), max(logprob, _LEAST))
        elif logprob is not None:
            top = {self._name(token): max(logprob, _LEAST)}
        self._columns["top_logprobs"].append(top)

    def take(self) -> dict[str, list[Any]]:
        """The columns since the last time."""
        columns, self._columns = self._columns, _no_columns()
        return columns

    def _name(self, token: int) -> str:
        if self._as_ids or self._tokenizer is None:
            return f"token_id:{token}"
        return _spelled(self._tokenizer.bytes_of(token))


def _no_columns() -> dict[str, list[Any]]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
