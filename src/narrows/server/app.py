"""The ASGI application: routes, middleware, and errors in the API's shape, over any backend."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from narrows.api import Backend
from narrows.errors import NarrowsError
from narrows.server.anthropic.messages import message_tokens, messages
from narrows.server.http.body import Body, BoundedRoute
from narrows.server.http.errors import ApiError, ClientGoneError, backend_error, why_missing
from narrows.server.http.json_io import JsonAnswer, error_answer, to_json, to_json_in_turns
from narrows.server.http.middleware import Addresses, ApiKeys, BodyLimit, Encodings, ReservedSlots, TrailingSlash
from narrows.server.metrics import Metrics
from narrows.server.openai.chat import chat_completions
from narrows.server.openai.completions import completions
from narrows.server.openai.responses import responses
from narrows.server.openai.tokenize import Detokenized, Tokenized, detokenize, tokenize
from narrows.server.options import ServedModel, ServerOptions
from narrows.server.request import RequestReader
from narrows.server.schema import answers
from narrows.server.state import ServerState
from narrows.server.workers import SharedCall

__all__ = ["create_app", "state_of"]

_LOG = logging.getLogger("narrows.server")

_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"description": "a field is wrong or passes a limit; param names the field"},
    401: {"description": "no API key, or a wrong one"},
    403: {"description": "the Host or Origin is not allowed (--allow-host, --allow-origin)"},
    404: {"description": "no such model"},
    408: {"description": "the headers or the body did not arrive in time"},
    413: {"description": "the body is too large"},
    415: {"description": "the body is not application/json, or is compressed"},
    429: {"description": "too many requests are waiting; retry-after says when to try again"},
    431: {"description": "the headers are too large, or too many"},
    500: {"description": "the engine failed"},
    501: {"description": "the body comes in a transfer coding other than chunked"},
    503: {"description": "the server is starting, restarting its ranks, ending, or out of connections"},
    504: {"description": "the request took longer than --request-timeout"},
}


_NO_PAGES: dict[str, Any] = {"openapi_url": None, "docs_url": None, "redoc_url": None, "redirect_slashes": False}
"""Pages of the framework that are not there; the document is written once, by a route of ours."""
_METRICS_PAUSE_S, _INFO_PAUSE_S = 0.1, 0.25
"""Pauses between two renderings of /metrics and of /server_info, which all requests meanwhile share."""


def create_app(backend: Backend, model: ServedModel, options: ServerOptions) -> FastAPI:
    """The application. ``app.state.server`` is the state that its routes share.

    Raises:
        ConfigError: options that do not fit the model.
    """
    state = ServerState(backend, model, options)
    app = FastAPI(title="narrows", version=version("narrows"), **_NO_PAGES)
    app.state.server = state
    app.router.route_class = BoundedRoute
    app.openapi = partial(_openapi, app)  # type: ignore[method-assign]
    _add_errors(app)
    _add_generation(app)
    _add_models(app, state)
    _add_operations(app, state)
    _add_profile(app, state)
    _add_middleware(app, state)
    return app


def state_of(app: FastAPI) -> ServerState:
    """The state that an application's routes share."""
    state = app.state.server
    assert isinstance(state, ServerState)
    return state


def _add_middleware(app: FastAPI, state: ServerState) -> None:
    """The last one added comes first: answers are counted, then addresses and keys looked at, then bodies read."""
    options, limits = state.options, state.options.connections
    app.add_middleware(
        BodyLimit,
        max_bytes=options.max_body_bytes,
        timeout_s=options.request_timeout_s,
        wait_s=limits.body_timeout_s,
        bytes_per_s=limits.body_bytes_per_s,
    )
    app.add_middleware(Encodings)
    app.add_middleware(ApiKeys, keys=options.api_keys)
    app.add_middleware(Addresses, hosts=options.hosts, origins=options.origins)
    app.add_middleware(ReservedSlots)
    app.add_middleware(_Counted, metrics=state.metrics)
    app.add_middleware(TrailingSlash)
    if options.origins:
        # Around the framework's own errors too: a page may read only answers that allow it.
        app.middleware_stack = CORSMiddleware(
            app.build_middleware_stack(),
            allow_origins=options.origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            allow_private_network=True,
            expose_headers=("Retry-After",),
        )


def _responses(
    model: Any, *, stream: bool = False, error: Any = answers.ErrorAnswer
) -> dict[int | str, dict[str, Any]]:
    """The responses of a route, for the OpenAPI document."""
    event = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
    content = {"content": {"text/event-stream": {"schema": event}}} if stream else {}
    errors = {status: {**text, "model": error} for status, text in _ERRORS.items()}
    return {200: {"model": model, "description": "done", **content}, **errors}


def _add_generation(app: FastAPI) -> None:
    of_messages = partial(_responses, error=answers.MessageErrorAnswer)
    for path, endpoint, described in (
        ("/v1/chat/completions", chat_completions, _responses(answers.ChatCompletion, stream=True)),
        ("/v1/completions", completions, _responses(answers.Completion, stream=True)),
        ("/tokenize", tokenize, _responses(Tokenized)),
        ("/detokenize", detokenize, _responses(Detokenized)),
        ("/v1/responses", responses, _responses(answers.ResponseAnswer, stream=True)),
        ("/v1/messages", messages, of_messages(answers.MessageAnswer, stream=True)),
        ("/v1/messages/count_tokens", message_tokens, of_messages(answers.MessageTokens)),
    ):
        app.post(path, response_model=None, responses=described)(endpoint)


def _add_models(app: FastAPI, state: ServerState) -> None:
    def card(name: str) -> dict[str, Any]:
        model = state.model
        facts = {"created": model.created, "owned_by": "narrows", "max_model_len": model.max_context}
        return {"id": name, "object": "model", **facts}

    @app.get("/v1/models", response_model=None, responses=_responses(answers.ModelList))
    async def models() -> Response:
        """The names that a request's model may have."""
        return JsonAnswer({"object": "list", "data": [card(name) for name in state.model.names]})

    @app.get("/v1/models/{name:path}", response_model=None, responses=_responses(answers.ModelCard))
    async def model(name: str) -> Response:
        """One of them."""
        return JsonAnswer(card(state.check_model(name)))


def _add_operations(app: FastAPI, state: ServerState) -> None:
    @app.get("/health", response_model=None, responses=_responses(answers.HealthAnswer))
    async def health() -> Response:
        """Whether requests are served; 503 with the reason when they are not."""
        found = await state.pools.look(state.backend.health)
        if state.draining or not found.ready:
            detail = "the server is ending" if state.draining else found.detail or "the ranks are not ready"
            raise ApiError(503, detail, code="draining" if state.draining else "unavailable")
        return JsonAnswer({"status": "ok", "num_restarts": found.num_restarts})

    text = {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Prometheus' text format"}

    rendered = SharedCall(partial(state.pools.look, state.metrics.render), _METRICS_PAUSE_S, state.turns)
    described = SharedCall(partial(state.pools.operate, partial(_server_info, state)), _INFO_PAUSE_S, state.turns)
    documented = SharedCall(partial(state.pools.operate, partial(_document, app)), _INFO_PAUSE_S, state.turns)

    @app.get("/metrics", response_model=None, responses={**_responses(answers.ModelList), 200: text})
    async def metrics() -> Response:
        """Numbers for Prometheus."""
        return Response(await rendered.get(), media_type="text/plain; version=0.0.4")

    @app.get("/server_info", response_model=None, responses=_responses(answers.ServerInfo))
    async def server_info() -> Response:
        """The running configuration."""
        return JsonAnswer(await described.get())

    @app.get("/openapi.json", response_model=None, include_in_schema=False)
    async def document() -> Response:
        """The document of all routes, written once."""
        return JsonAnswer(await documented.get())


def _server_info(state: ServerState) -> bytes:
    """The answer of /server_info, made off the event loop."""
    options = state.options
    server = {
        "tool_call_parser": state.tools.name if state.tools is not None else "none",
        "reasoning_parser": "think" if state.reasons else "none",
        "sampling_defaults": dict(state.defaults),
        "max_body_bytes": options.max_body_bytes,
        "request_timeout_s": options.request_timeout_s,
    }
    body = {
        "version": version("narrows"),
        "models": list(state.model.names),
        "max_model_len": state.model.max_context,
    }
    return to_json_in_turns({**body, "server": server, "backend": state.backend.info()})


def _add_profile(app: FastAPI, state: ServerState) -> None:
    async def operate(call: Callable[[], dict[str, Any]]) -> Response:
        try:
            return JsonAnswer(await state.pools.operate(call))
        except NarrowsError as error:
            raise backend_error(error) from error

    @app.post("/start_profile", response_model=None, responses=_responses(answers.TraceStarted))
    async def start_profile(body: Body[answers.StartProfileRequest] | None = None) -> Response:
        """Start a trace of the engine's next steps, on every rank."""
        request = answers.StartProfileRequest() if body is None else await body.read(_as_it_is)
        steps = request.steps if request.steps is not None else request.num_steps
        return await operate(partial(state.backend.start_trace, steps))

    @app.post("/stop_profile", response_model=None, responses=_responses(answers.TraceWritten))
    async def stop_profile() -> Response:
        """End the trace; the answer comes when its file is written."""
        return await operate(state.backend.stop_trace)


def _as_it_is(reader: RequestReader, body: answers.StartProfileRequest) -> answers.StartProfileRequest:
    return body


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error_answer(error, request.url.path)

    @app.exception_handler(ClientGoneError)
    async def client_gone(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # for the metrics only

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return error_answer(_of_http(request, error), request.url.path)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        _LOG.error("%s %s failed", request.method, request.url.path, exc_info=error)
        failed = ApiError(500, f"the server failed on this request: {type(error).__name__}")
        return error_answer(failed, request.url.path)


def _of_http(request: Request, error: HTTPException) -> ApiError:
    """An error response of the framework itself."""
    message = str(error.detail)
    if error.status_code == 404:
        why = why_missing(request.url.path) or "/openapi.json lists what there is"
        message = f"there is no {request.url.path[:200]} here; {why}"
    if error.status_code == 405:
        message = f"{request.url.path} does not answer {request.method}"
    if error.status_code == 400:
        message = "the body cannot be read as JSON"
    headers: Mapping[str, str] | None = error.headers
    return ApiError(error.status_code, message, headers=headers)


class _Counted:
    """Counts answers by route and status, for the metrics."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and see how its answer begins."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def seen(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")
                self._metrics.answered(getattr(route, "path", "other"), message["status"])
            await send(message)

        await self._app(scope, receive, seen)


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The document, without the answers 422 that the framework announces: wrong fields are answered 400 here."""
    if app.openapi_schema is None:
        app.openapi_schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        for path in app.openapi_schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
    return app.openapi_schema


def _document(app: FastAPI) -> bytes:
    if not hasattr(app.state, "document"):
        app.state.document = to_json(app.openapi())
    document: bytes = app.state.document
    return document
