"""A real server process for the libraries that people call servers with. Run by `make test-clients`.

NARROWS is the command to start. Each file here needs packages of its own and is left out where they are not installed.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would fetch prices otherwise
os.environ["LANGSMITH_TRACING"] = "false"

MODEL = "narrows-demo"
KEY = "secret"
PACKAGES = ("anthropic", "instructor", "langchain_anthropic", "langchain_openai", "litellm", "openai")

collect_ignore = [
    f"test_{package.removesuffix('_openai').removesuffix('_anthropic')}.py"
    for package in PACKAGES
    if find_spec(package) is None
]


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """Its URL, without a path."""
    flags = ["serve", MODEL, "--tp", "1", "--port", "0", "--api-key", KEY, "--tool-call-parser", "hermes"]
    command = [os.environ.get("NARROWS", "narrows"), *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            ready = process.stdout.readline()
            found = re.search(r"ready at (http://\S+) ", ready)
            assert found, f"it did not become ready: {ready!r}"
            yield found[1]
        finally:
            process.terminate()
        assert process.wait(30) == 0


@pytest.fixture(scope="session")
def url(server: str) -> str:
    """Where OpenAI's API is."""
    return f"{server}/v1"


@pytest.fixture
def person() -> dict[str, Any]:
    """A closed schema that a small model can only keep to."""
    return {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
