"""Applications over a fake backend, with and without tool calls and reasoning; a real server on a free port."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from patience import PATIENCE_S

sys.path.insert(0, str(Path(__file__).parent))

import server_lab as lab

from narrows.server.options import ConnectionLimits, ServerOptions
from narrows.server.run import bind, serve, url_of
from narrows.text import Tokenizer


@pytest.fixture(scope="session")
def plain_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return lab.make_tokenizer(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="session")
def hermes_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return lab.make_tokenizer(tmp_path_factory.mktemp("hermes"), lab.HERMES_TEMPLATE)


@pytest.fixture
def make_lab(plain_tokenizer: Tokenizer) -> Iterator[Callable[..., lab.Lab]]:
    made: list[lab.Lab] = []

    def make(options: ServerOptions | None = None, **model: Any) -> lab.Lab:
        made.append(lab.Lab(model.pop("tokenizer", plain_tokenizer), options, **model))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def plain(make_lab: Callable[..., lab.Lab]) -> lab.Lab:
    return make_lab()


@pytest.fixture(scope="module")
def module_lab(plain_tokenizer: Tokenizer) -> Iterator[lab.Lab]:
    made = lab.Lab(plain_tokenizer)
    yield made
    made.close()


@pytest.fixture
def shared(module_lab: lab.Lab) -> lab.Lab:
    """Like ``plain``, for many cases of one module that look only at their own answer and submission."""
    module_lab.backend.submitted.clear()
    module_lab.backend.prefer = []
    return module_lab


@pytest.fixture
def hermes(make_lab: Callable[..., lab.Lab], hermes_tokenizer: Tokenizer) -> lab.Lab:
    return make_lab(tokenizer=hermes_tokenizer)


class Served:
    """An application on a port, run by a thread."""

    def __init__(self, of: lab.Lab) -> None:
        self.lab = of
        bound = bind("127.0.0.1", 0)
        ready = threading.Event()
        kwargs = {"drain_timeout_s": 1.0, "when_ready": ready.set}
        self._thread = threading.Thread(target=serve, args=(of.app, of.backend, bound), kwargs=kwargs, daemon=True)
        self._thread.start()
        assert ready.wait(PATIENCE_S)
        self.url = url_of(bound)
        self.bound, self.port = bound, int(bound.getsockname()[1])

    def stop(self) -> None:
        self.lab.backend.failure = "the test is over"
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()


@pytest.fixture
def served(make_lab: Callable[..., lab.Lab], hermes_tokenizer: Tokenizer) -> Iterator[Served]:
    server = Served(make_lab(tokenizer=hermes_tokenizer, options=ServerOptions(max_body_bytes=100_000)))
    yield server
    server.stop()


@pytest.fixture
def make_served(make_lab: Callable[..., lab.Lab]) -> Iterator[Callable[..., Served]]:
    """Servers with the connection limits that are given."""
    made: list[Served] = []

    def make(**limits: Any) -> Served:
        made.append(Served(make_lab(ServerOptions(connections=ConnectionLimits(**limits)))))
        return made[-1]

    yield make
    for each in made:
        each.stop()


@pytest.fixture
def said() -> Iterator[list[str]]:
    """The server's log, independent of other tests' changes to the parent logger."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("narrows.server")
    log.addHandler(handler)
    yield lines
    log.removeHandler(handler)
