"""Routes of other servers: one line gives the reason for the 404, in the shape of that API."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from server_lab import Lab, error_of

from narrows.server.http.errors import why_missing
from narrows.server.options import ServerOptions


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/v1/embeddings", "embedding model"),
        ("/v1/rerank", "ranks none"),
        ("/rerank", "ranks none"),
        ("/v1/moderations", "moderates none"),
        ("/v1/audio/speech", "text only"),
        ("/v1/audio/transcriptions", "text only"),
        ("/v1/images/generations", "text only"),
        ("/v1/responses/resp_1", "keeps nothing between requests"),
        ("/v1/files", "no files"),
        ("/tokenizer_info", "checkpoint's folder"),
        ("/api/chat", "/v1/chat/completions"),
        ("/v1/embeddingsx", "/openapi.json"),
        ("/v2", "/openapi.json"),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_an_absent_route_says_why(plain: Lab, path: str, says: str, method: str) -> None:
    async def ask() -> httpx.Response:
        async with plain.client() as client:
            return await client.request(method, path)

    answer = asyncio.run(ask())
    error = error_of(answer)
    assert answer.status_code == 404 and error["type"] == "not_found_error"
    assert path in error["message"] and says in error["message"], error


def test_the_client_s_embeddings_are_refused_at_once(make_lab: Callable[..., Lab]) -> None:
    of = make_lab(ServerOptions())
    asked: list[Any] = []

    async def ask() -> None:
        hooks = {"request": [_appended(asked)]}
        http = httpx.AsyncClient(transport=httpx.ASGITransport(of.app), event_hooks=hooks)
        async with openai.AsyncOpenAI(base_url="http://lab/v1", api_key="none", http_client=http) as client:
            with pytest.raises(openai.NotFoundError, match="makes no embeddings"):
                await client.embeddings.create(model="lab-model", input="x")

    asyncio.run(ask())
    assert len(asked) == 1, "a client tries no status again that says it never will be"


def _appended(to: list[Any]) -> Callable[[httpx.Request], Any]:
    async def append(request: httpx.Request) -> None:
        to.append(request)

    return append


def test_no_existing_route_is_listed_as_absent(plain: Lab) -> None:
    paths = set(plain.app.openapi()["paths"]) - {"/v1/responses"}  # the path below is absent, not the route
    assert {path: why for path in paths if (why := why_missing(path))} == {}
