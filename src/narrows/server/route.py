"""Routes whose body is read within bounds (:mod:`narrows.server.intake`), and documented as FastAPI's are."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine
from typing import Any, get_args, get_type_hints

from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

__all__ = ["BoundedRoute"]


class BoundedRoute(APIRoute):
    """A route whose endpoint may take ``body``, a :class:`~narrows.server.intake.Body` or None, and ``request``.

    The body's model is what the document says of it; the application's intake (``app.state.server.intake``) takes it.
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        parameters = inspect.signature(endpoint).parameters
        self._bounded: Callable[..., Any] = endpoint
        self._body = parameters.get("body")
        self._takes_request = "request" in parameters
        if self._body is not None:
            unknown = set(parameters) - {"body", "request"}
            assert not unknown, f"{path}: a route with a body is handed body and request only, not {unknown}"
            self._model = _model_of(get_type_hints(endpoint)["body"])
            endpoint = _documented(endpoint, self._body, self._model)
        super().__init__(path, endpoint, **options)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The route's function from request to response."""
        if self._body is None:
            return super().get_route_handler()
        optional = self._body.default is None

        async def handle(request: Request) -> Response:
            body = await request.app.state.server.intake.take(request, self._model, optional=optional)
            values = {"body": body} | ({"request": request} if self._takes_request else {})
            try:
                answer = await self._bounded(**values)
            finally:
                if body is not None:
                    body.drop()
            assert isinstance(answer, Response)
            return answer

        return handle


def _documented(endpoint: Callable[..., Any], body: inspect.Parameter, model: type[BaseModel]) -> Callable[..., Any]:
    """What FastAPI looks at in place of the endpoint; it is never called."""

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
