"""A request's generations, submitted and answered as a stream or as a whole. Knows neither chats nor completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from narrows.server.answers import EventStream, unless_gone
from narrows.server.backend import Generation
from narrows.server.running import Running
from narrows.server.state import ServerState

__all__ = ["respond"]


async def respond(
    state: ServerState,
    request: Request,
    generations: Sequence[Generation],
    param: str,
    *,
    stream: Callable[[Running], AsyncGenerator[dict[str, Any], None]] | None,
    whole: Callable[[Running], Coroutine[Any, Any, Response]],
) -> Response:
    """The answer; whatever ends it, the generations are ended with it.

    ``stream``: None: the answer is wanted as a whole. ``param``: the field that is wrong if the backend refuses.

    Raises:
        ApiError: the backend takes none of them, or the time is over.
    """
    timeout_s = state.options.request_timeout_s
    running = state.running()
    running.submit(generations, param)
    if stream is not None:
        return EventStream(stream(running), timeout_s=timeout_s, close=running.close)
    return await unless_gone(request, whole(running), timeout_s=timeout_s, close=running.close)
