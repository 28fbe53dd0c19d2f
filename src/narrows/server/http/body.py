"""Request bodies: read within a memory budget, then parsed and validated off the event loop.

Reading a body is all work before its generations start: parsing, validation, the chat template, tokenizing. Small
bodies are read on a thread. Large ones are read in a child process (:mod:`narrows.server.http.body_process`), because a
single call on them may hold the interpreter's lock for tens of milliseconds.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, get_args, get_type_hints

from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from narrows.server.http.body_process import BodyProcess
from narrows.server.http.errors import ApiError, ClientGoneError, invalid
from narrows.server.http.json_io import JsonLimits, read_body
from narrows.server.request import RequestReader
from narrows.server.workers import LARGE_BYTES, Pools

__all__ = ["Body", "BodyReader", "BoundedRoute"]

BodyT = TypeVar("BodyT", bound=BaseModel)
P = ParamSpec("P")
T = TypeVar("T")
U = TypeVar("U")


class Body(Generic[BodyT]):
    """A request's body, which is read once. ``held``: how many of its bytes count as held until then."""

    def __init__(self, bodies: BodyReader, request: Request, model: type[BodyT]) -> None:
        self._bodies, self._request, self._model = bodies, request, model
        self.data = b""
        self.held = 0

    def drop(self) -> None:
        """It has been read, or never will be."""
        held, self.held = self.held, 0
        self.data = b""
        self._bodies.release(held)

    async def read(
        self, call: Callable[Concatenate[RequestReader, BodyT, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """The result of ``call`` for it, on a thread or in a process.

        ``call`` is a function of a module; its arguments and result can be pickled, and are small.

        Raises:
            ApiError: 400, naming the first wrong field; or an error of ``call``.
            ClientGoneError: the client went away meanwhile.
        """
        return await self.begin(_as_it_is, call, *args, **kwargs)

    async def begin(
        self,
        then: Callable[[Any, T], U],
        call: Callable[Concatenate[RequestReader, BodyT, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> U:
        """The result of ``then`` for that, with the server's state and on a thread of the server."""
        reader = partial(self._made, self.data, then, call, args, kwargs)
        try:
            return await self._bodies.pools.prepare(self._request, reader)
        finally:
            self.drop()

    def _made(self, data: bytes, then: Callable[[Any, T], U], call: Callable[..., T], args: Any, kwargs: Any) -> U:
        bodies = self._bodies
        if bodies.process is not None and len(data) > LARGE_BYTES:
            found: T = bodies.process.ask(data, self._model, bodies.limits, partial(_call, call, args, kwargs))
        else:
            found = _call(call, args, kwargs, bodies.state, read_body(data, self._model, bodies.limits))
        return then(bodies.state, found)


def _call(call: Callable[..., T], args: Any, kwargs: Any, reader: RequestReader, body: BaseModel) -> T:
    return call(reader, body, *args, **kwargs)


def _as_it_is(state: Any, value: T) -> T:
    return value


class BodyReader:
    """Reads bodies. ``max_held_bytes``: the most that all large bodies being read or checked may take together.

    ``process``: where large bodies are read; None: on a thread, as small ones are.
    """

    def __init__(
        self,
        state: RequestReader,
        pools: Pools,
        process: BodyProcess | None,
        *,
        max_held_bytes: int,
        limits: JsonLimits | None = None,
    ) -> None:
        self.state, self.pools, self.process = state, pools, process
        self.limits = limits or JsonLimits()
        self._max_held_bytes = max_held_bytes
        self._held_bytes = 0

    async def take(self, request: Request, model: type[BodyT], *, optional: bool = False) -> Body[BodyT] | None:
        """The request's body, which counts as held until it was read or dropped; None: absent, if ``optional``.

        Raises:
            ApiError: 400, it is absent; 415; 503, too many large bodies at once.
            ClientGoneError: the client went away meanwhile.
        """
        body = Body(self, request, model)
        try:
            await self._fill(body, request)
            if not body.data and optional:
                return None
            if "json" not in (sent := request.headers.get("content-type", "")):
                # If any type were read as JSON, any web page that the user has open could send it.
                message = (
                    f"the body comes as {sent[:100] or 'nothing'!r}; send the header Content-Type: application/json"
                )
                raise ApiError(415, message, code="unsupported_media_type")
            if not body.data:
                raise invalid("the body is empty; send a JSON object with this endpoint's fields")
        except BaseException as error:
            body.drop()
            if isinstance(error, ClientDisconnect):
                raise ClientGoneError from None
            raise
        request.scope["narrows.body_bytes"] = len(body.data)
        return body

    async def _fill(self, body: Body[BodyT], request: Request) -> None:
        chunks: list[bytes] = []
        size = 0
        async for chunk in request.stream():
            chunks.append(chunk)
            size += len(chunk)
            if size <= LARGE_BYTES:
                continue
            self._hold(body, size - body.held)
        body.data = b"".join(chunks)

    def _hold(self, body: Body[BodyT], num_more: int) -> None:
        self._held_bytes += num_more
        body.held += num_more
        if self._held_bytes > self._max_held_bytes:
            message = (
                f"large bodies of other requests hold {self._held_bytes - body.held:,} of "
                f"{self._max_held_bytes:,} bytes already; try again later"
            )
            raise ApiError(503, message, code="busy", headers={"retry-after": "1"})

    def release(self, num_bytes: int) -> None:
        """So many bytes are held no more."""
        self._held_bytes -= num_bytes


class BoundedRoute(APIRoute):
    """A route whose endpoint may take ``body`` (a :class:`Body` or None), ``request`` and ``state``.

    ``state`` is the application's, ``app.state.server``, whose ``bodies`` read the body. The OpenAPI document has the
    body's model.
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        parameters = inspect.signature(endpoint).parameters
        self._bounded: Callable[..., Any] = endpoint
        self._body = parameters.get("body")
        self._takes = set(parameters)
        if self._body is not None:
            unknown = self._takes - {"body", "request", "state"}
            assert not unknown, f"{path}: a route with a body takes body, request and state only, not {unknown}"
            self._model = _model_of(get_type_hints(endpoint)["body"])
            endpoint = _documented(endpoint, self._body, self._model)
        super().__init__(path, endpoint, **options)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The route's function from request to response."""
        if self._body is None:
            return super().get_route_handler()
        optional = self._body.default is None

        async def handle(request: Request) -> Response:
            state = request.app.state.server
            body = await state.bodies.take(request, self._model, optional=optional)
            values = {"body": body, "request": request, "state": state}
            try:
                answer = await self._bounded(**{name: values[name] for name in self._takes})
            finally:
                if body is not None:
                    body.drop()
            assert isinstance(answer, Response)
            return answer

        return handle


def _documented(endpoint: Callable[..., Any], body: inspect.Parameter, model: type[BaseModel]) -> Callable[..., Any]:
    """The signature that FastAPI inspects in place of the endpoint's; it is never called."""

    async def described() -> None:
        raise AssertionError

    described.__name__, described.__doc__ = endpoint.__name__, endpoint.__doc__
    optional = body.default is None
    parameter = body.replace(annotation=model | None if optional else model)
    described.__signature__ = inspect.Signature([parameter])  # type: ignore[attr-defined]
    return described


def _model_of(hint: Any) -> type[BaseModel]:
    """The model of ``Body[Model]`` or ``Body[Model] | None``."""
    for each in (hint, *get_args(hint)):
        if inspect.isclass(each) and issubclass(each, BaseModel):
            return each
        for inner in get_args(each):
            if inspect.isclass(inner) and issubclass(inner, BaseModel):
                return inner
    raise AssertionError(f"a body is Body of a pydantic model, not {hint}")
