"""The table of request fields against the servers' own lists, and the page that is printed from it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from openai.types import completion_create_params as text_params
from openai.types.chat import completion_create_params as chat_params

from narrows.server.openai.completions import CompletionRequest
from narrows.server.schema.chat import ChatRequest
from narrows.server.schema.common import GenerationFields
from narrows.server.schema.fields import IGNORED, REFUSED

LISTS: list[dict[str, Any]] = json.loads((Path(__file__).parent / "request_fields.json").read_text())
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
OPENAI = [
    {"server": "OpenAI", "route": CHAT, "fields": [*get_type_hints(chat_params.CompletionCreateParamsStreaming)]},
    {
        "server": "OpenAI",
        "route": COMPLETION,
        "fields": [*get_type_hints(text_params.CompletionCreateParamsStreaming)],
    },
]
BODIES: dict[str, type[GenerationFields]] = {CHAT: ChatRequest, COMPLETION: CompletionRequest}
UNLISTED = {"tfs_z", "top_n_sigma", "grammar_lazy", "grammar_triggers"}
"""llama.cpp's, in its code or older releases, not in the page that was read."""


@pytest.mark.parametrize("listed", [*LISTS, *OPENAI], ids=lambda listed: f"{listed['server']}-{listed['route'][4:]}")
def test_every_published_field_works_is_refused_or_ignored(listed: dict[str, Any]) -> None:
    assert len(listed["fields"]) > 10
    known = {*BODIES[listed["route"]].model_fields, *REFUSED, *IGNORED}
    assert sorted(set(listed["fields"]) - known) == []


def test_the_table_has_no_field_that_no_server_has() -> None:
    published = {name for listed in [*LISTS, *OPENAI] for name in listed["fields"]}
    assert sorted(({*REFUSED, *IGNORED} - published) ^ UNLISTED) == []


def test_a_field_has_one_fate() -> None:
    assert not set(REFUSED) & set(IGNORED)
    assert not set(GenerationFields.model_fields) & {*REFUSED, *IGNORED}


def test_the_field_lists_name_their_sources() -> None:
    assert all(len(listed["commit"]) == 40 and listed["repository"] and listed["path"] for listed in LISTS)
    assert {listed["server"] for listed in LISTS} == {"vLLM", "SGLang", "llama.cpp"}


def test_the_page_equals_the_printed_table() -> None:
    root = Path(__file__).parents[2]
    spec = importlib.util.spec_from_file_location("request_fields_page", root / "benchmarks" / "request_fields_page.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (root / "docs" / "request-fields.md").read_text()
    assert page == module.fields_page(), "python benchmarks/request_fields_page.py > docs/request-fields.md"
