"""Fields that decide the text: each works, or is a 400 that names it; errors name limits and items plainly."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import server_lab as lab
from transformers.utils.chat_template_utils import render_jinja_template

from narrows.server.schema.fields import REFUSED

PATHS = ["/v1/completions", "/v1/chat/completions"]
CLOSED = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}<|end|>{% endfor %}" + (
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def post(of: lab.Lab, path: str, fields: dict[str, Any]) -> Any:
    prompt = {"prompt": "hi"} if "chat" not in path else {"messages": [{"role": "user", "content": "hi"}]}
    return asyncio.run(of.post(path, prompt | fields))


def refusal(of: lab.Lab, path: str, fields: dict[str, Any]) -> dict[str, Any]:
    answer = post(of, path, fields)
    assert answer.status_code == 400, answer.text
    return lab.error_of(answer)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"stop": ["a"] * 33}, "stop", "at most 32 stops, but there are 33"),
        ({"stop": ["a", 1]}, "stop.1", "valid string"),
        ({"stop": {"a": 1}}, "stop", "must be a text or a list"),
        ({"stop": "a" * 1001}, "stop", "at most 1000 characters of a stop string"),
        ({"stop_token_ids": [1] * 257}, "stop_token_ids", "at most 256 token ids that stop"),
        ({"logit_bias": {"5": "x"}}, "logit_bias.5", "a number from -100 to 100"),
        ({"guided_choice": []}, "guided_choice", "must not be empty"),
        ({"guided_choice": ["a"] * 1001}, "guided_choice", "at most 1000 choices"),
        ({"allowed_token_ids": []}, "allowed_token_ids", "must not be empty"),
        ({"allowed_token_ids": [lab.VOCAB]}, "allowed_token_ids", f"vocabulary of {lab.VOCAB}"),
        ({"allowed_token_ids": [5, -1]}, "allowed_token_ids.1", "greater than or equal to 0"),
        ({"allowed_token_ids": [5], "guided_regex": "a"}, "allowed_token_ids", "send only one"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "no token would be left"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens", "greater than or equal to -1"),
    ],
)
def test_the_limit_or_the_item_is_named(
    shared: lab.Lab, path: str, fields: dict[str, Any], param: str, says: str
) -> None:
    error = refusal(shared, path, fields)
    assert error["param"] == param and says in error["message"], error


@pytest.mark.parametrize(
    ("prompt", "param", "says"),
    [
        (["a"] * 1025, "prompt", "at most 1024 prompts, but there are 1025"),
        ([[1, 2], "a"], "prompt.1", "valid list"),
        (["a", [1, 2]], "prompt.1", "valid string"),
        ([1, "a"], "prompt.1", "valid integer"),
        ([5, -1], "prompt.1", "greater than or equal to 0"),
        ([[5], []], "prompt.1", "must not be empty"),
        ([], "prompt", "must not be empty"),
        (7, "prompt", "must be a text, token ids, or a list of either"),
    ],
)
def test_wrong_prompt_is_explained(shared: lab.Lab, prompt: Any, param: str, says: str) -> None:
    error = lab.error_of(asyncio.run(shared.complete(prompt)))
    assert error["param"] == param and says in error["message"], error


@pytest.mark.parametrize(
    ("message", "param", "says"),
    [
        ({"role": "user", "content": [{"text": "a"}]}, "messages.0.content.0.type", "is missing"),
        ({"role": "user", "content": ["a"]}, "messages.0.content.0", "dictionary"),
        ({"role": "user", "content": 7}, "messages.0.content", "must be a text or a list"),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}] * 1001},
            "messages.0.content",
            "at most 1000 parts",
        ),
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages.0.content.0", "text parts only"),
    ],
)
def test_wrong_message_is_explained(shared: lab.Lab, message: Any, param: str, says: str) -> None:
    error = refusal(shared, PATHS[1], {"messages": [message]})
    assert error["param"] == param and says in error["message"], error


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", sorted(REFUSED))
def test_unsupported_field_is_refused_unless_harmless(shared: lab.Lab, path: str, name: str) -> None:
    if name in ("best_of", "echo") and "chat" not in path:
        return  # fields of this route's own
    error = refusal(shared, path, {name: {"some": "thing"}})
    assert error["param"] == name and REFUSED[name].reason in error["message"], error
    for value in (None, *REFUSED[name].harmless):
        assert post(shared, path, {name: value}).status_code == 200, (name, value)


@pytest.mark.parametrize("path", PATHS)
def test_unknown_fields_are_ignored(shared: lab.Lab, path: str) -> None:
    assert post(shared, path, {"no_server_has_this": {"a": [1]}, "user": "me"}).status_code == 200


@pytest.mark.parametrize("path", PATHS)
def test_only_allowed_tokens_are_generated(shared: lab.Lab, path: str) -> None:
    post(shared, path, {"allowed_token_ids": [70, 71, 300], "max_tokens": 20})
    guide = shared.sent.guide
    assert guide is not None
    mask = guide.allowed()
    assert {token for token in range(lab.VOCAB) if mask[token // 8] >> token % 8 & 1} == {70, 71, 300}
    guide.advance(70)
    assert guide.allowed() == mask


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"truncate_prompt_tokens": 3}, slice(-3, None)),
        ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, slice(0, 3)),
        ({"truncate_prompt_tokens": 1000}, slice(None)),
        ({"truncate_prompt_tokens": -1, "max_tokens": 12}, slice(-500, None)),
    ],
)
def test_a_prompt_is_truncated_as_requested(shared: lab.Lab, fields: dict[str, Any], kept: slice) -> None:
    ids = [70 + index % 50 for index in range(600 if -1 in fields.values() else 10)]
    body = asyncio.run(shared.complete(ids, echo=True, **({"max_tokens": 2} | fields))).json()
    assert shared.sent.prompt == tuple(ids[kept])
    assert body["choices"][0]["text"].startswith(shared.tokenizer.decode(ids[kept]))
    text = "one two three four five six"
    body = asyncio.run(shared.complete(text, echo=True, truncate_prompt_tokens=2, max_tokens=2)).json()
    assert body["choices"][0]["text"].startswith(shared.tokenizer.decode(shared.tokenizer.encode(text)[-2:]))


def test_n_predict_is_max_tokens(shared: lab.Lab) -> None:
    post(shared, PATHS[0], {"n_predict": 7})
    assert shared.sent.max_tokens == 7
    post(shared, PATHS[0], {"n_predict": -1})
    assert shared.sent.max_tokens == 16


@pytest.fixture(scope="module")
def closing(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return lab.make_tokenizer(tmp_path_factory.mktemp("closing"), CLOSED)


def test_the_last_message_is_continued(make_lab: Any, closing: Any) -> None:
    of = make_lab(tokenizer=closing)
    messages = [{"role": "user", "content": "What is 47 + 38?"}, {"role": "assistant", "content": "It is "}]
    for fields in ({"add_generation_prompt": False}, {}):
        assert post(of, PATHS[1], {"messages": messages, "continue_final_message": True} | fields).status_code == 200
        prompt = of.tokenizer.decode(of.sent.prompt, skip_special_tokens=False)
        assert prompt == "<|begin|>[user]What is 47 + 38?<|end|>[assistant]It is "
    parts = [{"type": "text", "text": "It "}, {"type": "text", "text": "is"}]
    post(
        of,
        PATHS[1],
        {"messages": [messages[0], {"role": "assistant", "content": parts}], "continue_final_message": True},
    )
    assert of.tokenizer.decode(of.sent.prompt).endswith("[assistant]It is")


def test_the_last_message_is_continued_as_in_transformers(tmp_path: Any, make_lab: Any) -> None:
    trimming = CLOSED.replace("m.content", "m.content | trim")
    for template in (CLOSED, trimming):
        of = make_lab(tokenizer=lab.make_tokenizer(tmp_path / str(len(template)), template))
        for text in ("It is", "It is \n", " It", "<|end|>x"):
            messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": text}]
            want, _ = render_jinja_template(
                [messages], chat_template=template, continue_final_message=True, bos_token="<|begin|>"
            )
            assert post(of, PATHS[1], {"messages": messages, "continue_final_message": True}).status_code == 200
            assert of.tokenizer.decode(of.sent.prompt, skip_special_tokens=False) == want[0]


@pytest.mark.parametrize(
    ("last", "fields", "says"),
    [
        ({"role": "assistant", "content": "a"}, {"add_generation_prompt": True}, "excludes add_generation_prompt"),
        ({"role": "user", "content": "a"}, {}, "must be the assistant's"),
        ({"role": "assistant", "content": ""}, {}, "with text"),
        ({"role": "assistant", "content": "a", "tool_calls": [{"function": {"name": "f"}}]}, {}, "without tool calls"),
    ],
)
def test_message_that_cannot_be_continued_is_explained(
    make_lab: Any, closing: Any, last: dict[str, Any], fields: dict[str, Any], says: str
) -> None:
    of = make_lab(tokenizer=closing)
    error = refusal(of, PATHS[1], {"messages": [last], "continue_final_message": True} | fields)
    assert error["param"] == "continue_final_message" and says in error["message"]
