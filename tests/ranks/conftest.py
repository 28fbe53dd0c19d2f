"""For all tests over rank processes: a tiny model, and a check that no test leaves a process behind."""

from __future__ import annotations

import importlib.util
import os
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from patience import eventually
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from narrows.ranks.fork_server_process import TITLE

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
"""Rank processes inherit it, and import their code from there."""

from processes_lab import ancestors, name_of, parent_of  # noqa: E402 - found by the line above

MARK = f"NARROWS_TEST_RUN={uuid.uuid4().hex}"
"""An environment variable that all processes of this test run inherit, and those of other runs do not have."""


def marked() -> set[int]:
    """The processes that this test run has started, even those with another parent by now."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                if MARK.encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.add(int(entry.name))
            except OSError:
                pass  # it has ended meanwhile
    return found


def left_behind(before: set[int]) -> set[int]:
    """Processes that are new, and that no process of ``before`` has started, as a server shared by tests may.

    Fork servers of this process live on, but the ranks that they have made do not.
    """
    mine = {pid for pid in marked() if name_of(pid) == TITLE and parent_of(pid) == os.getpid()}
    return {pid for pid in marked() - before - mine if not ancestors(pid) & (before - mine)}


@pytest.fixture
def running() -> Callable[[], set[int]]:
    return marked


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """No test leaves a process behind. Shared memory has no name, so it ends with the processes (test_isolation.py)."""
    name, value = MARK.split("=")
    os.environ[name] = value
    before = marked()
    yield
    eventually(lambda: not left_behind(before))


def _conftest_of_torch() -> object:
    spec = importlib.util.spec_from_file_location("conftest_of_torch", HERE.parent / "torch" / "conftest.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_torch_tests = _conftest_of_torch()
tiny_model = _torch_tests.tiny_model  # type: ignore[attr-defined]


@pytest.fixture(scope="session")
def speaking_v3(tiny_model) -> Path:
    """A tiny DeepSeek-V3 with words: token i is written ``wi``."""
    folder = tiny_model("v3", vocab_size=67, eos_token_id=66)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(67)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    words.save(str(folder / "tokenizer.json"))
    return folder
