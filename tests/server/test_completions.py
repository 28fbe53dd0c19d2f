"""``/v1/completions`` through the real application: prompts, echo, log-probabilities, stops, streams, sampling."""

import asyncio

import pytest
import server_lab as lab
from patience import eventually

from narrows.sched.sampling import SamplingParams
from narrows.server.schema.answers import Completion
from narrows.text import GenerationConfig


def ask(of: lab.Lab, prompt="hi", **fields):
    answer = asyncio.run(of.complete(prompt, **fields))
    assert answer.status_code == 200, answer.text
    Completion.model_validate(answer.json(), strict=True)
    return answer.json()


def test_a_prompt_gets_a_text_and_token_counts(plain: lab.Lab) -> None:
    body = ask(plain, "Once upon")
    ids = plain.tokenizer.encode("Once upon")
    assert body["choices"] == [{"index": 0, "text": "Hello world", "logprobs": None, "finish_reason": "stop"}]
    assert plain.sent.prompt == tuple(ids) and plain.sent.max_tokens == 16
    count = len(plain.tokenizer.encode("Hello world", add_special_tokens=False)) + 1
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (len(ids), count)
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}
    assert body["model"] == lab.MODEL and body["object"] == "text_completion"


@pytest.mark.parametrize("prompt", [[5, 6, 7], [[5, 6, 7], [8]], ["a", "b c"]])
def test_lists_of_texts_and_ids_get_one_text_each(plain: lab.Lab, prompt) -> None:
    body = ask(plain, prompt, n=2)
    want = [tuple(p) if isinstance(p, list) else tuple(plain.tokenizer.encode(p)) for p in prompt if p not in (5, 6, 7)]
    want = want or [(5, 6, 7)]
    assert [g.prompt for g in plain.backend.submitted] == [p for p in want for _ in range(2)]
    assert [c["index"] for c in body["choices"]] == list(range(2 * len(want)))
    assert body["usage"]["prompt_tokens"] == sum(map(len, want))


def test_sampling_fields_reach_the_backend_unchanged(plain: lab.Lab) -> None:
    fields = dict(temperature=0.5, top_p=0.9, min_p=0.1, repetition_penalty=1.1, presence_penalty=0.2)
    fields |= dict(frequency_penalty=-0.3, min_tokens=2)
    ask(plain, top_k=-1, seed=7, logit_bias={"5": 3, "4": -100.0}, priority=3, max_tokens=9, **fields)
    want = SamplingParams(**fields, top_k=0, seed=7, logit_bias=((4, -100.0), (5, 3.0)))
    assert plain.sent.sampling == want and plain.sent.priority == 3 and plain.sent.max_tokens == 9


def test_default_temperature_is_one_or_the_checkpoints(make_lab) -> None:
    silent, greedy = make_lab(), make_lab(generation=GenerationConfig(do_sample=False, temperature=0.3))
    told = make_lab(generation=GenerationConfig(temperature=0.6, top_k=20))
    for of in (silent, greedy, told):
        ask(of)
    assert silent.sent.sampling == SamplingParams(temperature=1.0)
    assert greedy.sent.sampling == SamplingParams()
    assert told.sent.sampling == SamplingParams(temperature=0.6, top_k=20)


def test_several_texts_of_one_seed_have_seeds_of_their_own(plain: lab.Lab) -> None:
    ask(plain, n=3, seed=2**63 - 1)
    assert [g.sampling.seed for g in plain.backend.submitted] == [2**63 - 1, 0, 1]


@pytest.mark.parametrize("per_update", [1, 3])
def test_stop_string_across_tokens_ends_text_and_generation(plain: lab.Lab, per_update: int) -> None:
    plain.text = "one two three four five six seven"
    plain.backend.per_update = per_update
    body = ask(plain, stop=["ee fo", "never"], max_tokens=50)
    assert body["choices"][0]["text"] == "one two thr" and body["choices"][0]["finish_reason"] == "stop"
    eventually(lambda: plain.backend.num_live == 0)
    whole = len(plain.tokenizer.encode(plain.text, add_special_tokens=False))
    assert body["usage"]["completion_tokens"] < whole


def test_end_ids_are_eos_and_stop_token_ids(plain: lab.Lab) -> None:
    ask(plain, stop_token_ids=[9])
    assert plain.sent.end_ids == {lab.EOS, 9}
    body = ask(plain, ignore_eos=True, max_tokens=30)
    assert plain.sent.end_ids == frozenset()
    assert body["choices"][0]["finish_reason"] == "length" and body["usage"]["completion_tokens"] == 30


def test_an_lm_eval_request_scores_the_prompt(plain: lab.Lab) -> None:
    ids = plain.tokenizer.encode("The cat sat", add_special_tokens=False)
    body = ask(plain, [ids], echo=True, logprobs=1, max_tokens=1, temperature=0, seed=1)
    found = body["choices"][0]["logprobs"]
    assert plain.sent.sampling.prompt_logprobs == 1 and plain.sent.max_tokens == 1
    assert len(found["tokens"]) == len(ids) + 1
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    for token, logprob, top in zip(ids[1:], found["token_logprobs"][1:], found["top_logprobs"][1:], strict=False):
        name = plain.tokenizer.decode([token])
        assert logprob == (-0.25 if token % 2 == 0 else -1.5)
        assert (max(top, key=top.get) == name) == (token % 2 == 0), "lm-eval asks whether the token is the best one"
    text = body["choices"][0]["text"]
    for token, at in zip(found["tokens"], found["text_offset"], strict=True):
        assert text[at:].startswith(token)


def test_a_prompt_is_scored_and_nothing_generated(plain: lab.Lab) -> None:
    body = ask(plain, "The cat", echo=True, logprobs=2, max_tokens=0)
    assert plain.sent.max_tokens == 0 and body["usage"]["completion_tokens"] == 0
    assert body["choices"][0]["text"] == "The cat" and body["choices"][0]["finish_reason"] == "length"
    assert len(body["choices"][0]["logprobs"]["tokens"]) == len(plain.tokenizer.encode("The cat"))


def test_a_prompt_of_one_token_is_echoed_with_its_column(plain: lab.Lab) -> None:
    of_prompt, of_text = (ask(plain, [40], echo=True, logprobs=1, max_tokens=most)["choices"][0] for most in (0, 1))
    assert of_prompt["logprobs"]["token_logprobs"] == [None]
    assert of_text["logprobs"]["token_logprobs"] == [None, of_text["logprobs"]["token_logprobs"][1]]
    assert of_text["logprobs"]["text_offset"] == [0, len(of_prompt["text"])]


def test_a_long_prompt_is_scored_in_parts_and_in_order(plain: lab.Lab) -> None:
    ids = [20 + index % 400 for index in range(500)]
    whole = ask(plain, [ids], echo=True, logprobs=1, max_tokens=1)["choices"][0]["logprobs"]
    body = {"prompt": [ids], "echo": True, "logprobs": 1, "max_tokens": 1}
    events = asyncio.run(plain.events("/v1/completions", body))
    columns = [event["choices"][0]["logprobs"] for event in events[:-1]]
    assert max(len(each["tokens"]) for each in columns) < 200
    joined = {name: [value for each in columns for value in each[name]] for name in whole}
    assert joined == whole and len(whole["tokens"]) == 501
    scores = [-0.25 if token % 2 == 0 else -1.5 for token in ids]
    assert whole["token_logprobs"][:500] == [None, *scores[1:]]


def test_an_echo_alone_needs_no_backend(plain: lab.Lab) -> None:
    body = ask(plain, "The cat", echo=True, max_tokens=0)
    assert body["choices"][0]["text"] == "The cat" and not plain.backend.submitted


def test_part_of_a_character_is_spelled_in_bytes(plain: lab.Lab) -> None:
    plain.text = "\U0001f9ff"  # no token of its own: its bytes come one by one
    body = ask(plain, logprobs=0)
    found = body["choices"][0]["logprobs"]["tokens"][:-1]
    data = b"".join(bytes.fromhex(t.removeprefix("bytes:").replace("\\x", "")) for t in found)
    assert len(found) > 1 and data.decode() == body["choices"][0]["text"] == plain.text
    assert body["choices"][0]["logprobs"]["top_logprobs"][0] == {found[0]: pytest.approx(-0.25, abs=1.25)}
    named = ask(plain, logprobs=1, return_tokens_as_token_ids=True)["choices"][0]["logprobs"]["tokens"]
    assert named[-1] == f"token_id:{lab.EOS}"


def test_stream_equals_whole(plain: lab.Lab) -> None:
    plain.text = "Some text with ünïcödé \U0001f9ff and a STOP here"
    fields = dict(prompt=["a", "b"], n=2, stop="STOP", logprobs=1, echo=True, max_tokens=60)
    whole = ask(plain, **fields)
    events = asyncio.run(plain.events("/v1/completions", {**fields, "stream_options": {"include_usage": True}}))
    assert events.pop() == "[DONE]"
    last = events.pop()
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    assert all(event["usage"] is None and len({event["id"], last["id"]}) == 1 for event in events)
    for choice in whole["choices"]:
        parts = [e["choices"][0] for e in events if e["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["stop"]
        for name, column in choice["logprobs"].items():
            assert [x for part in parts for x in part["logprobs"][name]] == column


def test_a_model_without_tokenizer_accepts_and_scores_ids(make_lab) -> None:
    of = make_lab(tokenizer=None)
    of.backend.script = lambda generation: [5, 6, lab.EOS]
    body = ask(of, [3, 4], logprobs=1, echo=True)
    assert body["choices"][0]["text"] == ""
    assert body["choices"][0]["logprobs"]["tokens"] == [f"token_id:{t}" for t in (3, 4, 5, 6, 1)]
    answer = asyncio.run(of.complete("text"))
    assert answer.status_code == 400 and "tokenizer" in lab.error_of(answer)["message"]
