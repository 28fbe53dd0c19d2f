"""Bodies are bounded before they are read, checked off the event loop, and refused at their first error."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from patience import PATIENCE_S
from server_lab import Lab, error_of

from narrows.server import workers as pools_module
from narrows.server.http import body as body_module
from narrows.server.http import json_io
from narrows.server.http.errors import ApiError, validation_error
from narrows.server.http.json_io import JsonLimits, check_json, parse_json

HEADERS = {"content-type": "application/json"}
TIGHT = JsonLimits(nesting=3, containers=6, keys=6, values=12)

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.sampled_from('a"\\,:[]{}é\u5b5b'), max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)


def measure(value: Any, depth: int = 1) -> tuple[int, int, int, int]:
    """Nesting, containers, keys and values of a parsed body, counted in the objects."""
    if not isinstance(value, dict | list):
        return 0, 0, 0, 0
    inner = [measure(each, depth + 1) for each in (value.values() if isinstance(value, dict) else value)]
    nesting = 1 + max((each[0] for each in inner), default=0)
    containers = 1 + sum(each[1] for each in inner)
    keys = (len(value) if isinstance(value, dict) else 0) + sum(each[2] for each in inner)
    commas = max(len(value) - 1, 0) + sum(each[3] for each in inner)
    return nesting, containers, keys, commas


@settings(deadline=None)
@given(values, st.sampled_from(["utf-8", "utf-16", "utf-16-le", "utf-32"]), st.booleans())
def test_bodies_are_counted_without_being_read(value: Any, encoding: str, ascii_only: bool) -> None:
    data = json.dumps(value, ensure_ascii=ascii_only).encode(encoding)
    nesting, containers, keys, commas = measure(value)
    fits = nesting <= 3 and containers <= 6 and keys <= 6 and commas + containers <= 12
    if fits:
        assert parse_json(data, TIGHT) == value
    else:
        with pytest.raises(ApiError) as told:
            parse_json(data, TIGHT)
        assert told.value.status == 400


@pytest.mark.parametrize("shift", range(-3, 4))
@pytest.mark.parametrize("filler", ["\\", '"', "é", 'a\\"'])
def test_strings_are_followed_over_the_edges_of_pieces(shift: int, filler: str) -> None:
    text = (filler * (300_000 // len(filler)))[: 262_144 + shift] + "[{[{[{"
    data = json.dumps([text, 1], ensure_ascii=False).encode()
    assert parse_json(data, TIGHT) == [text, 1]
    with pytest.raises(ApiError, match="more than 3 deep"):
        check_json(data[:-1] + b",[[[1]]]]", TIGHT, "the body")


def post(lab: Lab, content: bytes, path: str = "/v1/chat/completions") -> httpx.Response:
    async def send() -> httpx.Response:
        async with lab.client() as client:
            return await client.post(path, content=content, headers=HEADERS)

    return asyncio.run(send())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            '{"messages":[{"role":"user","content":"x"}],"chat_template_kwargs":{"a":' + "[" * 900 + "]" * 900 + "}}",
            "deep",
        ),
        ('{"messages":[{"role":"user","content":"x","extra":' + "[" * 900 + "]" * 900 + "}]}", "deep"),
        ('{"messages":[{"role":"user","content":"x"}],"guided_json":' + '{"a":' * 900 + "1" + "}" * 900 + "}", "deep"),
        ('{"messages":[' + "{}," * 150_000 + "{}]}", "more than 50,000 lists and objects"),
        ('{"messages":[{' + ",".join(f'"k{i}":1' for i in range(250_000)) + "}]}", "more than 200,000 keys"),
        ('{"messages":[' + "1," * 2_100_000 + "1]}", "more than 1,048,576 values"),
        ('{"messages":' + "9" * 5000 + "}", "cannot be read as JSON"),
    ],
    ids=["variables", "extra field", "schema", "containers", "keys", "values", "digits"],
)
def test_bodies_that_hold_or_nest_too_much(hermes: Lab, content: str, said: str) -> None:
    answer = post(hermes, content.encode())
    assert answer.status_code == 400 and said in error_of(answer)["message"]


def test_json_text_within_a_body_is_bounded_too(hermes: Lab) -> None:
    call = {
        "id": "c",
        "type": "function",
        "function": {"name": "f", "arguments": '{"a":' + "[" * 900 + "]" * 900 + "}"},
    }
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}]
    answer = asyncio.run(hermes.post("/v1/chat/completions", {"messages": messages}))
    assert answer.status_code == 400
    error = error_of(answer)["message"]
    assert error.startswith("messages.1.tool_calls.0") and "deep" in error


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ('{"a":' * 150 + "{}" + "}" * 150, "more than 100 deep"),
        ('{"enum":[' + "{}," * 150_000 + "{}]}", "more than 50,000 lists and objects"),
        ('{"enum":[', "must be JSON"),
        ('{"const":' + "9" * 5000 + "}", "must be JSON"),
    ],
    ids=["nesting", "containers", "cut", "digits"],
)
def test_a_schema_as_json_text_is_bounded_as_a_body_is(plain: Lab, schema: str, said: str) -> None:
    answer = asyncio.run(plain.complete(guided_json=schema))
    assert answer.status_code == 400 and not plain.backend.submitted
    error = error_of(answer)
    assert error["param"] == "guided_json" and said in error["message"], error


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", lambda text: {"prompt": text}),
        ("/v1/completions", lambda text: {"prompt": ["short", text]}),
        ("/v1/chat/completions", lambda text: {"messages": [{"role": "user", "content": text}]}),
        ("/tokenize", lambda text: {"prompt": text}),
        ("/tokenize", lambda text: {"messages": [{"role": "user", "content": text}]}),
    ],
    ids=["prompt", "prompts", "chat", "tokenize", "tokenize chat"],
)
@pytest.mark.parametrize("text", ["hello world " * 20_000, "x" * 300_000], ids=["words", "one word"])
def test_a_text_that_no_context_holds_is_not_tokenized(
    plain: Lab, monkeypatch: pytest.MonkeyPatch, path: str, body: Any, text: str
) -> None:
    assert plain.tokenizer is not None
    lengths: list[int] = []
    encode = plain.tokenizer.encode

    def counted(text: str, **options: Any) -> list[int]:
        lengths.append(len(text))
        return encode(text, **options)

    monkeypatch.setattr(plain.tokenizer, "encode", counted)
    answer = asyncio.run(plain.post(path, body(text)))
    assert answer.status_code == 400 and max(lengths, default=0) < 1000
    error = error_of(answer)
    assert error["code"] == "context_length_exceeded" and "holds 512 tokens" in error["message"]


def test_health_and_metrics_answer_while_request_threads_are_busy(plain: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    assert plain.tokenizer is not None
    let_go, entered = threading.Event(), threading.Semaphore(0)
    encode = plain.tokenizer.encode

    def held(text: str, **options: Any) -> list[int]:
        entered.release()
        assert let_go.wait(PATIENCE_S)
        return encode(text, **options)

    monkeypatch.setattr(plain.tokenizer, "encode", held)

    async def run() -> list[int]:
        requests = [asyncio.ensure_future(plain.complete("hi")) for _ in range(12)]
        for _ in range(2):
            await asyncio.to_thread(entered.acquire)
        async with plain.client() as client:
            answers = [await client.get(path) for path in ("/health", "/metrics")]
        assert not any(request.done() for request in requests)
        let_go.set()
        return [answer.status_code for answer in [*answers, *await asyncio.gather(*requests)]]

    assert asyncio.run(run()) == [200] * 14


def test_work_for_a_client_that_has_left_is_not_begun(plain: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    assert plain.tokenizer is not None
    let_go, entered = threading.Event(), threading.Semaphore(0)
    texts: list[str] = []

    def held(text: str, **options: Any) -> list[int]:
        texts.append(text)
        entered.release()
        assert let_go.wait(PATIENCE_S)
        return [1]

    monkeypatch.setattr(plain.tokenizer, "encode", held)

    async def run() -> None:
        there = [asyncio.ensure_future(plain.complete("stays")) for _ in range(2)]
        for _ in there:
            await asyncio.to_thread(entered.acquire)
        await asyncio.wait_for(request_of_a_client_that_leaves(plain, b'{"prompt": "left"}'), 60)
        let_go.set()
        await asyncio.gather(*there)

    asyncio.run(run())
    assert "left" not in texts


async def request_of_a_client_that_leaves(lab: Lab, content: bytes) -> None:
    """A POST whose client is gone once the body is sent."""
    incoming = [{"type": "http.request", "body": content}, {"type": "http.disconnect"}]
    scope = {
        "type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"/v1/completions",
        "query_string": b"", "headers": [(b"content-type", b"application/json"), (b"host", b"lab")],
        "http_version": "1.1", "scheme": "http", "server": ("lab", 80), "client": ("127.0.0.1", 1), "root_path": "",
    }  # fmt: skip

    async def receive() -> dict[str, Any]:
        return incoming.pop(0) if len(incoming) > 1 else incoming[0]

    async def send(message: dict[str, Any]) -> None:
        pass

    await lab.app(scope, receive, send)  # type: ignore[arg-type]


def test_large_bodies_share_a_budget_and_small_ones_do_not(plain: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_module, "LARGE_BYTES", 1000)
    bodies = plain.app.state.server.bodies
    bodies._max_held_bytes = 6000

    async def run() -> list[int]:
        begun, go_on = asyncio.Event(), asyncio.Event()

        async def slow() -> Any:
            yield b'{"prompt": "' + b"x" * 4000
            begun.set()
            await go_on.wait()
            yield b'"}'

        async with plain.client() as client:
            first = asyncio.ensure_future(client.post("/v1/completions", content=slow(), headers=HEADERS))
            await begun.wait()
            refused = await client.post(
                "/v1/completions", content=b'{"prompt": "' + b"y" * 4000 + b'"}', headers=HEADERS
            )
            assert "4,012 of 6,000 bytes" in error_of(refused)["message"] and refused.headers["retry-after"]
            small = await client.post("/v1/completions", content=b'{"prompt": "z"}', headers=HEADERS)
            go_on.set()
            return [(await first).status_code, refused.status_code, small.status_code]

    assert asyncio.run(run()) == [400, 503, 200]
    assert bodies._held_bytes == 0


@pytest.mark.parametrize(
    ("path", "body", "param", "said"),
    [
        ("completions", {"prompt": "x", "stop": ["a"] * 33}, "stop", "at most 32 stops, but there are 33"),
        ("completions", {"prompt": "x", "stop": ["a", 5]}, "stop.1", "valid string"),
        ("completions", {"prompt": "x", "stop": "a" * 1001}, "stop", "at most 1000 characters"),
        ("completions", {"prompt": ["a"] * 1025}, "prompt", "at most 1024 prompts, but there are 1025"),
        ("completions", {"prompt": [[1, 2], "a"]}, "prompt.1", "valid list"),
        ("completions", {"prompt": ["a", [1]]}, "prompt.1", "valid string"),
        ("completions", {"prompt": [1, 2, -3]}, "prompt.2", "greater than or equal to 0"),
        ("completions", {"prompt": [[1], [2, -3]]}, "prompt.1.1", "greater than or equal to 0"),
        ("completions", {"prompt": [1, 2, "a"]}, "prompt.2", "valid integer"),
        ("completions", {"prompt": []}, "prompt", "must not be empty"),
        ("completions", {"prompt": 5}, "prompt", "must be a text, token ids, or a list of either"),
        ("completions", {"prompt": "x", "stop_token_ids": [1] * 257}, "stop_token_ids", "at most 256 token ids"),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"text": "a"}]}]},
         "messages.0.content.0.type", "is missing"),
        ("responses", {"input": []}, "input", "must not be empty"),
        ("responses", {"input": 5}, "input", "must be a text or a list"),
        ("responses", {"input": [{"role": "user", "content": [{"type": "text"}] * 1001}]}, "input.0.content",
         "at most 1000 parts, but there are 1001"),
        ("responses", {"input": "x", "tool_choice": "some"}, "tool_choice", "'none', 'auto' or 'required'"),
        ("responses", {"input": "x", "metadata": {str(i): "" for i in range(17)}}, "metadata", "at most 16 entries"),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, 1]}]},
         "messages.0.content.1", "valid dictionary"),
        ("chat/completions", {"messages": [{"role": "user", "content": 7}]}, "messages.0.content", "a text or a list"),
        ("chat/completions", {"messages": [{"content": "a"}]}, "messages.0.role", "is missing"),
        ("chat/completions", {"messages": [{"role": "user", "content": "a"}, 1]}, "messages.1", "valid dictionary"),
    ],
)  # fmt: skip
def test_wrong_item_and_passed_limit_are_named(
    plain: Lab, path: str, body: dict[str, Any], param: str, said: str
) -> None:
    answer = asyncio.run(plain.post(f"/v1/{path}", body))
    error = error_of(answer)
    assert answer.status_code == 400 and error["param"] == param and said in error["message"], error


WRONG = {
    "messages": ("/v1/chat/completions", {"messages": [1] * 4000}),
    "parts": ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{}] * 4000}]}),
    "calls": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x", "tool_calls": [1] * 4000}]}),
    "tools": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "tools": [1] * 400}),
    "texts": ("/v1/completions", {"prompt": ["a"] * 1000 + [1]}),
    "ids": ("/v1/completions", {"prompt": [1] * 4000 + ["a"]}),
    "wrong ids": ("/v1/completions", {"prompt": [-1] * 4000}),
    "lists of ids": ("/v1/completions", {"prompt": [[-1] * 1000] * 40}),
    "bias": ("/v1/completions", {"prompt": "x", "logit_bias": {str(i): 1000 for i in range(4000)}}),
    "stops": ("/v1/completions", {"prompt": "x", "stop": [1] * 4000}),
    "tokens": ("/detokenize", {"tokens": ["a"] * 4000}),
    "tokenize": ("/tokenize", {"messages": [1] * 4000}),
    "items": ("/v1/responses", {"input": [1] * 4000}),
    "anthropic": ("/v1/messages", {"model": "alias", "max_tokens": 1, "messages": [1] * 4000}),
}


@pytest.mark.parametrize("name", WRONG)
def test_checking_stops_at_the_first_wrong_item(plain: Lab, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    counts: list[int] = []

    def counted(errors: Any, body: Any) -> ApiError:
        counts.append(len(errors))
        return validation_error(errors, body)

    monkeypatch.setattr(json_io, "validation_error", counted)
    path, body = WRONG[name]
    answer = asyncio.run(plain.post(path, body))
    assert answer.status_code == 400 and len(counts) == 1 and counts[0] <= 4


def test_every_list_mapping_and_text_of_a_body_has_a_limit(plain: Lab) -> None:
    document = plain.app.openapi()
    schemas = document["components"]["schemas"]
    unbounded: list[str] = []
    seen: set[str] = set()

    def walk(schema: Any, where: str) -> None:
        name = schema.get("$ref", "").rpartition("/")[2]
        if name:
            if name not in seen:
                seen.add(name)
                walk(schemas[name], name)
            return
        kind, free = schema.get("type"), "properties" not in schema and schema.get("additionalProperties") is not None
        for key, wanted in (("array", "maxItems"), ("string", "maxLength")):
            fixed = {"enum", "const", "pattern"} & set(schema)
            if kind == key and wanted not in schema and not fixed:
                unbounded.append(f"{where}: {key}")
        if kind == "object" and free and "maxProperties" not in schema:
            unbounded.append(f"{where}: object")
        for key in ("items", "additionalProperties"):
            if isinstance(schema.get(key), dict):
                walk(schema[key], f"{where}[]")
        for each in (*schema.get("anyOf", ()), *schema.get("oneOf", ()), *schema.get("allOf", ())):
            walk(each, where)
        for field, inner in schema.get("properties", {}).items():
            walk(inner, f"{where}.{field}")

    for path in document["paths"].values():
        for operation in path.values():
            content = operation.get("requestBody", {}).get("content", {})
            walk(content.get("application/json", {}).get("schema", {}), "body")
    assert len(seen) > 5 and not unbounded, unbounded


def test_memory_is_given_back_once_for_all_large_work(plain: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools_module, "_FREE_AFTER_S", 0.0)
    pools = plain.app.state.server.pools
    called = threading.Event()
    calls: list[int] = []

    def counted() -> None:
        calls.append(1)
        called.set()

    pools._give_back = counted

    async def run() -> None:
        for _ in range(3):  # before the loop goes on
            pools.free_memory_soon()
        await asyncio.to_thread(called.wait, 60)

    asyncio.run(run())
    assert len(calls) == 1


def test_memory_is_given_back_after_large_bodies_alone(plain: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools_module, "LARGE_BYTES", 100)
    asked: list[int] = []
    monkeypatch.setattr(plain.app.state.server.pools, "free_memory_soon", lambda: asked.append(1))
    asyncio.run(plain.complete("small"))
    assert not asked
    asyncio.run(plain.complete("large " * 30))
    assert asked


def test_slow_setup_is_done_before_the_first_request(plain: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    state = plain.app.state.server
    state.prepare()
    monkeypatch.setattr(type(plain.tokenizer), "to_json", lambda self: pytest.fail("the tokens' table is made again"))
    assert state.guides is not None and state.guides.tokens.vocab_size >= 2048
    assert "most_bytes_per_token" in vars(plain.tokenizer)
