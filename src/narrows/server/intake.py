"""How a body comes in: read within a budget, parsed and validated off the event loop, refused at its first error.

A route declares its body as a pydantic model, as FastAPI's routes do; :class:`BoundedRoute` reads it.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar, get_type_hints

from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from narrows.server.errors import ApiError, ClientGoneError, invalid
from narrows.server.json_body import JsonLimits, parse_json
from narrows.server.pools import LARGE_BYTES, Pools
from narrows.server.wrong_field import of_validation

__all__ = ["BoundedRoute", "Intake"]

BodyT = TypeVar("BodyT", bound=BaseModel)


class Intake:
    """Reads bodies. ``max_held_bytes``: the most that all large bodies being read or checked may take together."""

    def __init__(self, pools: Pools, *, max_held_bytes: int, limits: JsonLimits | None = None) -> None:
        self.pools = pools
        self.limits = limits or JsonLimits()
        self._max_held_bytes = max_held_bytes
        self._held_bytes = 0

    async def read(self, request: Request, model: type[BodyT], *, optional: bool = False) -> BodyT | None:
        """The body as ``model``; None if there is none and it is ``optional``.

        Raises:
            ApiError: 400, naming the first field that is wrong; 415; 503, too many large bodies at once.
            ClientGoneError: the client went away meanwhile.
        """
        async with self._bytes_of(request) as data:
            if not data and optional:
                return None
            if "json" not in (sent := request.headers.get("content-type", "")):
                # Read as JSON whatever it says, it could be sent by any web page that the user has open.
                message = (
                    f"the body comes as {sent[:100] or 'nothing'!r}; send the header Content-Type: application/json"
                )
                raise ApiError(415, message, code="unsupported_media_type")
            if not data:
                raise invalid("the body is empty; send a JSON object with this endpoint's fields")
            request.scope["narrows.body_bytes"] = len(data)
            return await self.pools.prepare(request, self._validated, data, model)

    def _validated(self, data: bytes, model: type[BodyT]) -> BodyT:
        value = parse_json(data, self.limits)
        try:
            return model.model_validate(value)
        except ValidationError as error:
            raise of_validation(error.errors(include_url=False, include_input=False), value) from None

    @asynccontextmanager
    async def _bytes_of(self, request: Request) -> AsyncIterator[bytes]:
        """The body, counted as held until the block is left."""
        chunks: list[bytes] = []
        size = counted = 0
        try:
            async for chunk in request.stream():
                chunks.append(chunk)
                size += len(chunk)
                if size <= LARGE_BYTES:
                    continue
                self._held_bytes += size - counted
                counted = size
                if self._held_bytes > self._max_held_bytes:
                    message = (
                        f"large bodies of other requests hold {self._held_bytes - counted:,} of "
                        f"{self._max_held_bytes:,} bytes already; try again later"
                    )
                    raise ApiError(503, message, code="busy", headers={"retry-after": "1"})
            yield b"".join(chunks)
        except ClientDisconnect:
            raise ClientGoneError from None
        finally:
            self._held_bytes -= counted


class BoundedRoute(APIRoute):
    """A route whose endpoint takes a parameter ``body``, a pydantic model or None, and maybe ``request``.

    FastAPI documents it; the body is read by the application's :class:`Intake` (``app.state.server.intake``).
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The route's function from request to response."""
        if self.body_field is None:
            return super().get_route_handler()
        parameters = inspect.signature(self.endpoint).parameters
        hints = get_type_hints(self.endpoint)
        optional = parameters["body"].default is None
        model = _model_of(hints["body"])
        unknown = set(parameters) - {"body", "request"}
        assert not unknown, f"{self.path}: a route with a body is handed body and request only, not {unknown}"

        async def handle(request: Request) -> Response:
            body = await request.app.state.server.intake.read(request, model, optional=optional)
            values = {"body": body} | ({"request": request} if "request" in parameters else {})
            answer = await self.endpoint(**values)
            assert isinstance(answer, Response)
            return answer

        return handle


def _model_of(hint: Any) -> type[BaseModel]:
    """The model of ``Model`` or ``Model | None``."""
    for each in (hint, *getattr(hint, "__args__", ())):
        if inspect.isclass(each) and issubclass(each, BaseModel):
            return each
    raise AssertionError(f"a body is a pydantic model, not {hint}")
