"""Accepted Host and Origin headers, CORS, and the spellings of paths and bodies."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Callable, Mapping
from typing import Any

import httpx
import pytest
from raw_client import RawClient, post
from server_lab import Lab, error_of

from narrows.errors import ConfigError
from narrows.server.http.middleware import checked_origins, hosts_to_check
from narrows.server.options import ServerOptions

PAGE = "https://app.example"
TEXT = {"prompt": "hi", "max_tokens": 2}


def ask(of: Lab, method: str, path: str, headers: Mapping[str, str] | None = None, **options: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        async with of.client() as client:
            return await client.request(method, path, headers=dict(headers or {}), **options)

    return asyncio.run(send())


# Hosts and pages


OWN = ["localhost", "LOCALHOST:8000", "localhost.:8000", "app.localhost", "127.0.0.1", "127.8.9.10:80", "[::1]"]
OWN += ["[::1]:8000", "[::ffff:127.0.0.1]:1", "", "box.lan:8000"]
FOREIGN = ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "notlocalhost"]
FOREIGN += ["10.0.0.1", "0.0.0.0:8000", "[::2]", "[::1", "[::1]x", "[", "127.0.0.1@evil.example", "localhost/"]
FOREIGN += ["evil.example#localhost", "evil.example:8000:localhost"]


@pytest.mark.parametrize(("host", "fine"), [(host, True) for host in OWN] + [(host, False) for host in FOREIGN])
@pytest.mark.parametrize(("method", "path"), [("GET", "/v1/models"), ("POST", "/v1/completions"), ("GET", "/health")])
def test_a_foreign_host_is_refused(make_lab: Callable[..., Lab], host: str, fine: bool, method: str, path: str) -> None:
    of = make_lab(ServerOptions(hosts=frozenset({"box.lan"})))
    answer = ask(of, method, path, {"host": host}, json=TEXT if method == "POST" else None)
    if fine:
        assert answer.status_code == 200
    else:
        assert answer.status_code == 403 and "--allow-host" in error_of(answer)["message"]
        assert not of.backend.submitted


def test_any_host_is_accepted_without_a_check(served: Any) -> None:
    with RawClient(served.port) as client:
        for host in ("evil.example", "[", "a?b#c", "\xff", ""):
            client.send(f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\n\r\n".encode("latin-1"))
            assert client.answer().status == 200
            client.send(f"GET /no/such HTTP/1.1\r\nHost: {host}\r\n\r\n".encode("latin-1"))
            answer = client.answer()
            assert answer.status == 404 and "/no/such" in answer.message


def test_each_of_two_hosts_must_be_fine(make_lab: Callable[..., Lab]) -> None:
    of = make_lab(ServerOptions(hosts=frozenset()))

    async def send(*hosts: str) -> int:
        async with of.client() as client:
            return (await client.get("/v1/models", headers=[("host", host) for host in hosts])).status_code

    assert asyncio.run(send("localhost", "evil.example")) == asyncio.run(send("evil.example", "localhost")) == 403


def test_which_hosts_are_checked() -> None:
    def check(address: str, name: str, *allowed: str, has_key: bool = False) -> frozenset[str] | None:
        return hosts_to_check(address, name, allowed or None, has_key=has_key)

    for address in ("127.0.0.1", "::1", "127.5.5.5", "::ffff:127.0.0.1"):
        assert check(address, "Box") == {address, "box"}
        assert check(address, address, has_key=True) is None
    for address in ("0.0.0.0", "::", "10.0.0.7"):
        assert check(address, "box") is None
    assert check("127.0.0.1", "localhost", "Box.LAN:8000", "[FE80::1]") == {
        "127.0.0.1",
        "localhost",
        "box.lan",
        "fe80::1",
    }
    assert check("0.0.0.0", "0.0.0.0", "api.example", has_key=True) == {"0.0.0.0", "api.example"}, "given, so obeyed"
    assert check("127.0.0.1", "localhost", "a.example", "*") is None
    for wrong in ("http://a.example", "a.example/x", "", "a b", "*.example"):
        with pytest.raises(ConfigError, match="--allow-host is "):
            check("127.0.0.1", "localhost", wrong)


@pytest.mark.parametrize(
    ("origin", "fine"),
    [
        *((PAGE, True), ("http://localhost:3000", True), ("http://127.0.0.1:8000", True), ("http://box.lan", True)),
        *(("chrome-extension://abcdef", True), ("tauri://localhost", True), ("https://app.example:444", False)),
        *(("http://app.example", False), ("https://evil.example", False), ("null", False), ("http://[::1", False)),
        ("http://localhost.evil.example", False),
    ],
)
def test_a_page_of_a_foreign_origin_can_do_nothing(make_lab: Callable[..., Lab], origin: str, fine: bool) -> None:
    """Without this, a form without a body on any page would start a trace."""
    of = make_lab(ServerOptions(hosts=frozenset({"box.lan"}), origins=(PAGE,)))
    answer = ask(of, "POST", "/start_profile", {"host": "localhost", "origin": origin})
    assert (answer.status_code == 200) == fine == (of.backend.traced is None)
    if not fine:
        assert answer.status_code == 403 and "--allow-origin" in error_of(answer)["message"]


def test_origins_are_not_checked_where_hosts_are_not(make_lab: Callable[..., Lab]) -> None:
    assert ask(make_lab(), "GET", "/v1/models", {"origin": "https://evil.example"}).status_code == 200
    of = make_lab(ServerOptions(hosts=frozenset(), origins=("*",)))
    assert ask(of, "GET", "/v1/models", {"host": "localhost", "origin": "null"}).status_code == 200


def test_which_origins_are_valid() -> None:
    given = ("https://App.example:8443", "*", "null", "chrome-extension://x")
    assert checked_origins(given) == ("https://app.example:8443", "*", "null", "chrome-extension://x")
    assert checked_origins(None) == ()
    for wrong in ("app.example", "https://app.example/", "https://", "https://a@b", "", "https://app.example/x"):
        with pytest.raises(ConfigError, match="--allow-origin is "):
            checked_origins([wrong])


# CORS

PREFLIGHT = {
    "origin": PAGE,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-os",
}


@pytest.mark.parametrize(("origins", "allowed"), [((PAGE, "null"), PAGE), (("*",), "*")])
def test_preflight_is_answered_without_a_key(
    make_lab: Callable[..., Lab], origins: tuple[str, ...], allowed: str
) -> None:
    of = make_lab(ServerOptions(api_keys=("secret",), origins=origins))
    private = {"access-control-request-private-network": "true"}
    for more in ({}, private):
        answer = ask(of, "OPTIONS", "/v1/chat/completions", PREFLIGHT | more)
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == allowed
        assert "POST" in answer.headers["access-control-allow-methods"]
        assert "authorization" in answer.headers["access-control-allow-headers"]
        assert "x-stainless-os" in answer.headers["access-control-allow-headers"]
        assert ("access-control-allow-private-network" in answer.headers) == bool(more)
    if allowed != "*":
        refused = ask(of, "OPTIONS", "/v1/chat/completions", PREFLIGHT | {"origin": "https://evil.example"})
        assert refused.status_code == 400 and "access-control-allow-origin" not in refused.headers


def test_every_response_has_the_cors_header(make_lab: Callable[..., Lab], monkeypatch: pytest.MonkeyPatch) -> None:
    of = make_lab(ServerOptions(api_keys=("secret",), origins=(PAGE,), max_body_bytes=1000, hosts=frozenset({"lab"})))
    key = {"authorization": "Bearer secret"}
    seen = []

    def look(method: str, path: str, headers: Mapping[str, str] = key, **options: Any) -> httpx.Response:
        answer = ask(of, method, path, {"origin": PAGE, **headers}, **options)
        seen.append(answer.status_code)
        assert answer.headers["access-control-allow-origin"] == PAGE and "Origin" in answer.headers["vary"]
        return answer

    look("POST", "/v1/completions", json=TEXT)
    stream = look("POST", "/v1/completions", json={**TEXT, "stream": True})
    assert stream.text.endswith("data: [DONE]\n\n")
    look("POST", "/v1/completions", json={**TEXT, "n": 0})
    look("GET", "/v1/models", headers={})
    look("GET", "/no/such")
    look("GET", "/v1/completions")
    look("POST", "/v1/completions", json={"prompt": "x" * 2000})
    look("GET", "/v1/models", headers={**key, "host": "evil.example"})

    def fail() -> None:
        raise RuntimeError("a fault of the server")

    monkeypatch.setattr(of.backend, "health", fail)
    look("GET", "/health")
    assert seen == [200, 200, 400, 401, 404, 405, 413, 403, 500]


def test_no_cors_header_by_default(make_lab: Callable[..., Lab]) -> None:
    of = make_lab()
    answers = [ask(of, "OPTIONS", "/v1/models", PREFLIGHT), ask(of, "GET", "/v1/models", {"origin": PAGE})]
    assert [answer.status_code for answer in answers] == [405, 200]
    of = make_lab(ServerOptions(origins=(PAGE,)))
    answers.append(ask(of, "GET", "/v1/models", {"origin": "https://evil.example"}))
    for answer in answers:
        assert not any(name.startswith("access-control-allow-origin") for name in answer.headers)


# Paths


def test_a_slash_at_the_end_changes_nothing(plain: Lab) -> None:
    for method, path, body in (
        ("GET", "/health", None),
        ("GET", "/metrics", None),
        ("GET", "/v1/models", None),
        ("GET", "/v1/models/alias", None),
        ("GET", "/server_info", None),
        ("GET", "/openapi.json", None),
        ("POST", "/tokenize", {"prompt": "hi"}),
        ("POST", "/v1/completions", TEXT),
        ("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}),
        ("GET", "/no/such", None),
        ("GET", "/v1/completions", None),
    ):
        plainly = ask(plain, method, path, json=body)
        for end in ("/", "//"):
            answer = ask(plain, method, path + end, {"host": "evil.example"}, json=body)
            assert answer.status_code == plainly.status_code and "location" not in answer.headers
            assert answer.headers["content-type"] == plainly.headers["content-type"]
    metrics = ask(plain, "GET", "/metrics").text
    assert 'http_answers_total{route="/v1/completions",status="200"} 3.0' in metrics


def test_every_route_of_the_document_answers_with_a_slash_too(plain: Lab) -> None:
    paths = ask(plain, "GET", "/openapi.json").json()["paths"]
    assert len(paths) >= 10
    for path, methods in paths.items():
        for method in methods:
            statuses = {
                ask(plain, method, path.replace("{name}", "alias") + end, json={}).status_code for end in ("", "/")
            }
            assert len(statuses) == 1 and not statuses & {404, 405, 307, 308}, path


def test_a_slash_opens_no_route(make_lab: Callable[..., Lab]) -> None:
    of = make_lab(ServerOptions(api_keys=("secret",)))
    for path, status in (
        ("/health/", 200),
        ("/metrics/", 401),
        ("//health", 401),
        ("/v1/models/health/", 401),
        ("/", 401),
    ):
        assert ask(of, "GET", path).status_code == status


# Bodies


@pytest.mark.parametrize("coding", ["gzip", "GZIP", "br", "deflate", "identity, gzip", "x-unknown"])
def test_a_compressed_body_is_refused_naming_its_encoding(plain: Lab, coding: str) -> None:
    packed = gzip.compress(json.dumps(TEXT).encode())
    headers = {"content-type": "application/json", "content-encoding": coding}
    answer = ask(plain, "POST", "/v1/completions", headers, content=packed)
    assert answer.status_code == 415 and answer.headers["accept-encoding"] == "identity"
    message = error_of(answer)["message"]
    assert f"Content-Encoding: {coding.lower().removeprefix('identity, ')}" in message


def test_an_uncompressed_body_is_accepted(served: Any) -> None:
    for headers in ("Content-Encoding: identity\r\n", "Content-Encoding:\r\n"):
        with RawClient(served.port) as client:
            client.send(post("/v1/completions", TEXT, headers=headers))
            assert client.answer().status == 200
    with RawClient(served.port) as client:
        head = b"POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\nTransfer-Encoding: "
        client.send(head + b'chunked\r\n\r\nf\r\n{"prompt":"hi"}\r\n0\r\n\r\n')
        assert client.answer().status == 200
        client.send(head + b'gzip, chunked\r\n\r\nf\r\n{"prompt":"hi"}\r\n0\r\n\r\n')
        answer = client.answer()
        assert answer.status == 501 and "Transfer-Encoding: gzip" in answer.message
