"""The client of a request as the backend sees it: the request itself, or its API key; and who may be urgent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from server_lab import Lab, error_of

from narrows.server.options import ServerOptions

CHAT = ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]})
COMPLETION = ("/v1/completions", {"prompt": ["hi", "ho"]})


def clients_of(lab: Lab, path: str, body: dict[str, Any], key: str = "", **fields: Any) -> list[str]:
    """The clients of one request's generations."""
    before = len(lab.backend.submitted)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    answer = asyncio.run(lab.post(path, body | {"max_tokens": 2} | fields, headers=headers))
    assert answer.status_code == 200, answer.text
    return [generation.client for generation in lab.backend.submitted[before:]]


@pytest.mark.parametrize(("path", "body"), [CHAT, COMPLETION])
@pytest.mark.parametrize(("keys", "key"), [((), ""), (("only",), "only")])
@pytest.mark.parametrize("stream", [False, True])
def test_each_request_is_one_client(
    make_lab: Callable[..., Lab], path: str, body: dict[str, Any], keys: tuple[str, ...], key: str, stream: bool
) -> None:
    lab = make_lab(ServerOptions(api_keys=keys))
    first = clients_of(lab, path, body, key, n=3, stream=stream)
    assert len(first) == 3 * len(body.get("prompt", [1])) and len(set(first)) == 1 and first[0]
    assert not set(first) & set(clients_of(lab, path, body, key, n=3, stream=stream))


def test_each_of_several_keys_is_a_client_without_its_key(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(ServerOptions(api_keys=("secret", "hidden")))
    seen = [set(clients_of(lab, *of, key)) for of in (CHAT, COMPLETION) for key in ("secret", "hidden")]
    assert [len(each) for each in seen] == [1] * 4
    assert seen[0] == seen[2] != seen[1] == seen[3]
    assert not any(key in client for each in seen for client in each for key in ("secret", "hidden"))


@pytest.mark.parametrize(("path", "body"), [CHAT, COMPLETION])
def test_priority_below_zero_needs_the_flag(make_lab: Callable[..., Lab], path: str, body: dict[str, Any]) -> None:
    closed, opened = make_lab(), make_lab(ServerOptions(allow_priority=True))
    for priority in (0, 1, 100, None):
        assert asyncio.run(closed.post(path, body | {"priority": priority})).status_code == 200
        assert closed.sent.priority == (priority or 0)
    before = len(closed.backend.submitted)
    for priority in (-1, -100):
        answer = asyncio.run(closed.post(path, body | {"priority": priority}))
        error = error_of(answer)
        assert (answer.status_code, error["param"]) == (400, "priority")
        assert str(priority) in error["message"] and "--allow-priority" in error["message"]
        assert asyncio.run(opened.post(path, body | {"priority": priority})).status_code == 200
        assert opened.sent.priority == priority
    assert len(closed.backend.submitted) == before
