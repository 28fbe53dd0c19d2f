"""A real server and OpenAI's own Python client: every feature that the API names, on the demo model over two ranks."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from patience import PATIENCE_S, eventually
from server_process import ServerProcess

from narrows import LLM
from narrows.native import why_absent
from narrows.sched.sampling import SamplingParams

MODEL = "narrows-demo"
SEA = "The sea was"
NEAR = SamplingParams(logprobs=2)
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": SCHEMA}}]


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    # A cache so small that 16 long texts at once do not fit: some are put back and computed again.
    options = ("--tp", "2", "--dtype", "float32", "--tool-call-parser", "hermes", "--kv-tokens", "320")
    names = ("--served-model-name", MODEL, "--served-model-name", "other")
    with ServerProcess(*options, *names, "--api-key", "secret") as running:
        yield running
        assert running.stop() == 0


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def alone() -> Iterator[LLM]:
    """One rank in this process: the reference of the server's texts."""
    with LLM(MODEL, dtype="float32") as llm:
        yield llm


def greedy(llm: LLM, prompt: str, max_tokens: int) -> str:
    return llm.generate([prompt], max_tokens=max_tokens, ignore_eos=True)[0].text


def test_a_completion_is_the_text_of_one_rank(client: OpenAI, alone: LLM) -> None:
    done = client.completions.create(
        model=MODEL, prompt=SEA, max_tokens=40, temperature=0, extra_body={"ignore_eos": True}
    )
    assert done.choices[0].text == greedy(alone, SEA, 40) and done.choices[0].finish_reason == "length"
    assert done.usage is not None and done.usage.completion_tokens == 40
    assert done.usage.prompt_tokens == len(alone.encode(SEA)) and done.model == MODEL


def test_ids_and_lists_of_prompts(client: OpenAI, alone: LLM) -> None:
    ids = list(alone.encode(SEA))
    options = {"model": "other", "max_tokens": 8, "temperature": 0, "extra_body": {"ignore_eos": True}}
    texts = [
        [choice.text for choice in client.completions.create(prompt=prompt, **options).choices]
        for prompt in (SEA, [SEA, "I", SEA], ids, [ids, ids])
    ]
    expected, other = greedy(alone, SEA, 8), greedy(alone, "I", 8)
    assert texts == [[expected], [expected, other, expected], [expected], [expected, expected]]


def test_echo_and_prompt_logprobs_as_lm_eval_requests_them(client: OpenAI, alone: LLM) -> None:
    ids = list(alone.encode(SEA))
    done = client.completions.create(model=MODEL, prompt=ids, max_tokens=0, echo=True, logprobs=1, temperature=0)
    (choice,) = done.choices
    assert choice.logprobs is not None and choice.text == SEA
    assert choice.logprobs.token_logprobs is not None and choice.logprobs.token_logprobs[0] is None
    (scored,) = alone.score([ids], num_best=1)
    expected = [score.logprob for score in scored.prompt_logprobs]
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(expected, abs=1e-3)
    assert [max(top.values()) for top in choice.logprobs.top_logprobs[1:]] == pytest.approx(
        [score.best[0][1] for score in scored.prompt_logprobs], abs=1e-3
    )
    done = client.completions.create(model=MODEL, prompt=SEA, max_tokens=5, logprobs=3, temperature=0)
    logprobs = done.choices[0].logprobs
    assert logprobs is not None and len(logprobs.tokens or ()) == 5 and "".join(logprobs.tokens) == done.choices[0].text
    assert all(len(top) == 3 for top in logprobs.top_logprobs or ())


def test_a_stream_is_the_text_in_pieces_with_usage_at_the_end(client: OpenAI, alone: LLM) -> None:
    stream = client.completions.create(
        model=MODEL,
        prompt=SEA,
        max_tokens=30,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == greedy(alone, SEA, 30)
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length" and not last.choices
    assert last.usage is not None and last.usage.completion_tokens == 30


def test_a_chat_and_its_stream(client: OpenAI) -> None:
    ask: dict[str, Any] = {
        "model": MODEL,
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
        "temperature": 0,
        "max_completion_tokens": 24,
        "logprobs": True,
        "top_logprobs": 2,
    }
    whole = client.chat.completions.create(**ask)
    message, logprobs = whole.choices[0].message, whole.choices[0].logprobs
    assert message.role == "assistant" and message.content and logprobs is not None
    assert whole.usage is not None and len(logprobs.content or ()) == whole.usage.completion_tokens
    assert all(len(entry.top_logprobs) == 2 for entry in logprobs.content or ())
    chunks = list(client.chat.completions.create(stream=True, **ask))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_stop_strings_cross_tokens(client: OpenAI, alone: LLM) -> None:
    text = greedy(alone, SEA, 40)
    stop = text[17:21]  # wherever tokens begin and end
    done = client.completions.create(model=MODEL, prompt=SEA, max_tokens=40, temperature=0, stop=[stop, "\u2603"])
    assert done.choices[0].text == text[: text.index(stop)] and done.choices[0].finish_reason == "stop"


def test_seeds_repeat_and_texts_of_n_differ(client: OpenAI) -> None:
    ask: dict[str, Any] = {"model": MODEL, "prompt": SEA, "max_tokens": 12, "temperature": 1.0, "seed": 7}
    first = [choice.text for choice in client.completions.create(n=4, **ask).choices]
    again = [choice.text for choice in client.completions.create(n=4, **ask).choices]
    assert first == again and len(set(first)) == 4
    assert client.completions.create(**ask).choices[0].text == first[0]


def test_sampling_fields_choose_tokens(client: OpenAI, alone: LLM) -> None:
    def text(**more: Any) -> str:
        extra = {"ignore_eos": True} | more.pop("extra_body", {})
        options = {"model": MODEL, "prompt": SEA, "max_tokens": 16, "extra_body": extra} | more
        return client.completions.create(**options).choices[0].text

    expected = greedy(alone, SEA, 16)
    for same in ({"top_p": 1e-6}, {"extra_body": {"top_k": 1}}, {"extra_body": {"min_p": 1.0}}):
        assert text(temperature=1.0, **same) == expected
    (token,) = alone.encode(" the")[-1:]
    assert "the" in expected.split() and "the" not in text(temperature=0, logit_bias={str(token): -100}).split()
    assert text(temperature=0, logit_bias={str(token): 100}) == " the" * 16
    assert text(temperature=0, frequency_penalty=2.0, presence_penalty=2.0) != expected
    assert text(temperature=0, extra_body={"repetition_penalty": 1.5}) != expected


def test_min_tokens_and_ends(client: OpenAI, alone: LLM) -> None:
    (end,) = alone.eos_ids if len(alone.eos_ids) == 1 else (min(alone.eos_ids),)
    ask: dict[str, Any] = {"model": MODEL, "prompt": SEA, "temperature": 0, "max_tokens": 9}
    ended = client.completions.create(logit_bias={str(end): 100}, **ask)
    assert ended.choices[0].finish_reason == "stop" and ended.choices[0].text == ""
    later = client.completions.create(logit_bias={str(end): 100}, extra_body={"min_tokens": 4}, **ask)
    assert later.usage is not None and later.usage.completion_tokens == 5


def test_a_json_schema_and_a_regex_are_kept(client: OpenAI) -> None:
    for seed in range(3):
        done = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Who?"}],
            response_format={"type": "json_schema", "json_schema": {"name": "p", "schema": SCHEMA, "strict": True}},
            seed=seed,
            max_tokens=120,
        )
        value = json.loads(done.choices[0].message.content or "")
        assert (
            set(value) == {"name", "age"} and isinstance(value["age"], int) and done.choices[0].finish_reason == "stop"
        )
        body = {"response_format": {"type": "regex", "pattern": r"[a-f]{3}-\d{4}"}}
        text = (
            client.completions.create(model=MODEL, prompt=SEA, seed=seed, max_tokens=30, extra_body=body)
            .choices[0]
            .text
        )
        assert re.fullmatch(r"[a-f]{3}-[0-9]{4}", text)


def test_a_tool_that_has_to_be_called_is(client: OpenAI) -> None:
    ask: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Add"}], "max_tokens": 150}
    ask["parallel_tool_calls"] = False
    done = client.chat.completions.create(tools=TOOLS, tool_choice="required", seed=1, **ask)
    (call, *_) = done.choices[0].message.tool_calls or ()
    assert call.function.name == "add" and set(json.loads(call.function.arguments)) == {"name", "age"}
    assert done.choices[0].finish_reason == "tool_calls"
    stream = client.chat.completions.create(tools=TOOLS, tool_choice="required", seed=1, stream=True, **ask)
    arguments = ""
    for chunk in stream:
        for piece in chunk.choices[0].delta.tool_calls or () if chunk.choices else ():
            arguments += (piece.function.arguments or "") if piece.index == 0 and piece.function else ""
    assert arguments == call.function.arguments


def test_models_and_tokens(server: ServerProcess, client: OpenAI, alone: LLM) -> None:
    assert [model.id for model in client.models.list()] == [MODEL, "other"]
    assert client.models.retrieve("other").id == "other"
    headers = {"Authorization": "Bearer secret"}
    found = httpx.post(f"{server.url}/tokenize", json={"prompt": SEA}, headers=headers).json()
    assert found["tokens"] == list(alone.encode(SEA)) and found["count"] == len(found["tokens"])
    back = httpx.post(f"{server.url}/detokenize", json={"tokens": found["tokens"][1:]}, headers=headers).json()
    assert back["prompt"] == SEA
    info = httpx.get(f"{server.url}/server_info", headers=headers).json()
    assert info["backend"]["mesh"] == {"dp": 1, "tp": 2} and info["backend"]["plan_cache"]
    assert info["backend"]["collectives"].startswith("gloo" if why_absent() else "shared memory")


def test_errors_raise_the_clients_own_exceptions(server: ServerProcess, client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="no", prompt="x")
    with pytest.raises(openai.BadRequestError) as wrong:
        client.completions.create(model=MODEL, prompt="x", temperature=-1)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="context holds") as wrong:
        client.completions.create(model=MODEL, prompt="x " * 3000, max_tokens=5)
    assert wrong.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError), OpenAI(base_url=f"{server.url}/v1", api_key="wrong") as other:
        other.models.list()
    assert httpx.get(f"{server.url}/health").status_code == 200, "it needs no key"


@pytest.mark.parametrize("number", [20, pytest.param(64, marks=pytest.mark.full)])
def test_many_streams_with_aborts_equal_each_text_alone(server: ServerProcess, alone: LLM, number: int) -> None:
    words = [f"word{i} and" for i in range(18)]
    prompts = [" ".join(words[i % 7 : i % 7 + 1 + i % 11]) for i in range(number)]
    lengths = [1 + (i * 37) % 60 for i in range(number)]
    completions = alone.generate(prompts, max_tokens=60, ignore_eos=True, sampling=NEAR)

    async def one(client: AsyncOpenAI, i: int) -> str:
        text = ""
        options: dict[str, Any] = {"temperature": 0, "max_tokens": lengths[i], "extra_body": {"ignore_eos": True}}
        stream = await client.completions.create(model=MODEL, prompt=prompts[i], stream=True, **options)
        async for chunk in stream:
            text += chunk.choices[0].text
            if i % 8 == 3 and len(text) > 20:
                await stream.close()
                break
        return text

    async def every() -> list[str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0) as client:
            return await asyncio.gather(*(one(client, i) for i in range(number)))

    def expected(i: int) -> str:
        """Up to where the two best are closer than float32 sums in another order may move them."""
        gaps = [best[0][1] - best[1][1] for _, best in completions[i].logprobs]
        sure = next((at for at, gap in enumerate(gaps) if gap < 1e-3), 60)
        ids = completions[i].token_ids[: min(sure, lengths[i])]
        return alone.tokenizer.decode(list(ids)) if alone.tokenizer else ""

    for i, text in enumerate(asyncio.run(every())):
        if i % 8 == 3:  # it was left in the middle
            assert text.startswith(expected(i)) or expected(i).startswith(text), i
        else:
            assert text.startswith(expected(i)), i
    # All texts of one request start at once, and together outgrow the cache.
    lengths = [60] * number
    together = {"model": MODEL, "prompt": prompts[:16], "temperature": 0, "max_tokens": 60, "ignore_eos": True}
    headers = {"Authorization": "Bearer secret"}
    answer = httpx.post(f"{server.url}/v1/completions", json=together, headers=headers, timeout=PATIENCE_S).json()
    assert all(choice["text"].startswith(expected(choice["index"])) for choice in answer["choices"])

    def metric(name: str) -> float:
        lines = httpx.get(f"{server.url}/metrics", headers=headers).text.splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(f"narrows_{name} "))

    eventually(lambda: metric("kv_pages_used") == 0)
    assert metric("preemptions_total") > 0
