"""A backend whose tokens the test chooses, a model's text without a model, and clients of the application.

The backend keeps the whole contract (a thread of its own, aborts, end ids, guides, log-probabilities), so that a test
sees only effects of the server.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from patience import PATIENCE_S

from narrows.api import Draining, Generation, Health, Stats, Update
from narrows.checkpoints import model_path
from narrows.errors import ConfigError
from narrows.sched.sampling import TokenScore
from narrows.server.app import create_app, state_of
from narrows.server.options import ServedModel, ServerOptions
from narrows.text import GenerationConfig, Tokenizer

EOS = 1
VOCAB = 2048
MODEL = "lab-model"

HERMES_TEMPLATE = (
    "{{ bos_token }}{% if tools %}<tools>{{ tools | tojson }}</tools> answer with <tool_call>"
    '{"name": ..., "arguments": ...}</tool_call>{% endif %}'
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.tool_calls %}{% for c in m.tool_calls %}"
    "<tool_call>{{ c.function.arguments.items() | list }}</tool_call>{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% if thinking %}<think>{% endif %}{% endif %}{# </think> #}"
)
PLAIN_TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"


def make_tokenizer(folder: Path, template: str = PLAIN_TEMPLATE) -> Tokenizer:
    """The demo model's tokenizer with another chat template."""
    source = Path(model_path("narrows-demo"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    config = json.loads((source / "tokenizer_config.json").read_text()) | {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.from_folder(folder)


@dataclass
class Live:
    """A generation that the backend has."""

    number: int
    generation: Generation
    deliver: Callable[[Update], None]
    tokens: Sequence[int]
    at: int = 0
    rng: random.Random = field(default_factory=lambda: random.Random(0))


_BITS = [[bit for bit in range(8) if byte >> bit & 1] for byte in range(256)]


def _is_in(token: int, mask: bytes) -> bool:
    return bool(mask[token // 8] >> token % 8 & 1)


def _is_late(live: Live) -> bool:
    """Whether the mask of its next token is still being made."""
    return live.generation.guide is not None and not live.generation.guide.ready


def _is_fulfilled(live: Live) -> bool:
    """Whether nothing may follow, as far as is known."""
    guide = live.generation.guide
    return guide is not None and guide.ready and not any(guide.allowed())


class FakeBackend:
    """Gives each generation the tokens of ``script(generation)``, one per step; then the end token for ever.

    ``gate``: steps run while it is set. ``pause_s``: before each, so that updates do not come together.
    ``refuse``: raised at submit. ``fail_after``: so many tokens, then an error.
    """

    def __init__(
        self, script: Callable[[Generation], Sequence[int]], *, vocab: int = VOCAB, per_update: int = 1
    ) -> None:
        self.script = script
        self.vocab = vocab
        self.per_update = per_update
        self.gate = threading.Event()
        self.gate.set()
        self.pause_s = 0.0
        self.refuse: Exception | None = None
        self.fail_after: int | None = None
        self.submitted: list[Generation] = []
        self.aborted: list[int] = []
        self.prefer: list[int] = []  # the preferred beginning of a constrained text
        self.ready = Health(ready=True)
        self.numbers = Stats()
        self.failure = ""
        self.trace_refusal = ""
        self.traced: int | None = -1
        self.draining = False
        self._live: deque[Live] = deque()
        self._lock = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, generation: Generation, deliver: Callable[[Update], None]) -> int:
        if self.draining:
            raise Draining("the engine is draining")
        if self.refuse is not None:
            raise self.refuse
        with self._lock:
            number = len(self.submitted)
            self.submitted.append(generation)
            seed = generation.sampling.seed or 0
            live = Live(number, generation, deliver, list(self.script(generation)), rng=random.Random(seed))
            self._live.append(live)
            self._lock.notify()
        return number

    def abort(self, number: int) -> None:
        with self._lock:
            found = [live for live in self._live if live.number == number]
            self.aborted += [number] * bool(found)
            self._live = deque(live for live in self._live if live.number != number)

    def health(self) -> Health:
        return self.ready

    def stats(self) -> Stats:
        return self.numbers

    def start_trace(self, num_steps: int | None = None) -> dict[str, Any]:
        if self.trace_refusal:
            raise ConfigError(self.trace_refusal)
        self.traced = num_steps
        return {"file": "trace.json", "steps": num_steps or 200}

    def stop_trace(self) -> dict[str, Any]:
        if self.trace_refusal:
            raise ConfigError(self.trace_refusal)
        return {"file": "trace.json", "steps": 3, "events": 30}

    def info(self) -> dict[str, Any]:
        return {"mesh": "dp 1 x tp 2", "layout": "auto"}

    @property
    def num_live(self) -> int:
        return len(self._live)

    def drain(self, timeout_s: float) -> bool:
        self.draining = True
        end = time.monotonic() + timeout_s
        while self._live and time.monotonic() < end:
            time.sleep(0.01)
        return not self._live

    def close(self) -> None:
        with self._lock:
            live, self._live = self._live, deque()
            self._ended = True
            self._lock.notify()
        for each in live:
            each.deliver(Update(finish_reason="abort", error="the server has ended"))
        self.gate.set()
        if self._thread is not threading.current_thread():
            self._thread.join(PATIENCE_S)

    def _run(self) -> None:
        while not self._ended:
            self.gate.wait()
            time.sleep(self.pause_s)
            with self._lock:
                if not self._live:
                    self._lock.wait(0.5)
                elif all(_is_late(live) for live in self._live):
                    self._lock.wait(0.001)
                for live in list(self._live):
                    if _is_late(live):
                        continue  # it waits alone
                    update = self._step(live)
                    if update.finish_reason:
                        self._live.remove(live)
                    live.deliver(update)

    def _step(self, live: Live) -> Update:
        asked = live.generation.sampling
        scores: tuple[TokenScore, ...] = ()
        if live.at == 0 and asked.prompt_logprobs is not None:
            scores = tuple(
                TokenScore(*self._score(token, asked.prompt_logprobs)) for token in live.generation.prompt[1:]
            )
        if not live.generation.max_tokens:
            return Update(prompt_logprobs=scores, finish_reason="length")
        new: list[int] = []
        reason = "stop" if live.at and _is_fulfilled(live) else ""
        while len(new) < self.per_update and not reason and not _is_late(live):
            if live.at == self.fail_after:
                return Update(finish_reason="error", error="rank 1 died")
            token = self._choose(live)
            new.append(token)
            live.at += 1
            if live.generation.guide is not None:
                live.generation.guide.advance(token)
                if _is_fulfilled(live):
                    reason = "stop"
            if token in live.generation.end_ids:
                reason = "stop"
            elif live.at >= live.generation.max_tokens:
                reason = reason or "length"
        logprobs = ()
        if asked.logprobs is not None:
            logprobs = tuple((s[0], s[2]) for s in (self._score(token, asked.logprobs) for token in new))
        cached = 4 if live.at <= self.per_update else 0
        return Update(
            token_ids=tuple(new),
            logprobs=logprobs,
            prompt_logprobs=scores,
            num_cached_prompt=cached,
            finish_reason=reason,
        )

    def _choose(self, live: Live) -> int:
        guide = live.generation.guide
        if guide is None:
            return live.tokens[live.at] if live.at < len(live.tokens) else EOS
        mask = guide.allowed()
        if live.at < len(self.prefer) and _is_in(self.prefer[live.at], mask):
            return self.prefer[live.at]
        # A text that may end ends more often than a fair draw would let it.
        if _is_in(EOS, mask) and live.rng.random() < 0.2:
            return EOS
        bits = [8 * at + bit for at, byte in enumerate(mask) if byte for bit in _BITS[byte]]
        return live.rng.choice([token for token in bits if token < self.vocab])

    @staticmethod
    def _score(token: int, count: int) -> tuple[float, int, tuple[tuple[int, float], ...]]:
        """Even tokens are the most likely of their position, odd ones the second."""
        best = ((token, -0.25), (token ^ 1, -1.5)) if token % 2 == 0 else ((token ^ 1, -0.25), (token, -1.5))
        return (-0.25 if token % 2 == 0 else -1.5), 1 + token % 2, best[:count]


class Lab:
    """An application over a fake backend; ``say`` sets the text that every generation gets."""

    def __init__(self, tokenizer: Tokenizer | None, options: ServerOptions | None = None, **model: Any) -> None:
        self.tokenizer = tokenizer
        self.text = "Hello world"
        self.backend = FakeBackend(self._script)
        values = {
            "generation": GenerationConfig(),
            "max_context": 512,
            "vocab_size": VOCAB,
            "eos_ids": frozenset({EOS}),
        }
        self.model = ServedModel(names=(MODEL, "alias"), tokenizer=tokenizer, **(values | model))
        self.app = create_app(self.backend, self.model, options or ServerOptions())

    def close(self) -> None:
        """End its threads and processes."""
        self.backend.close()
        state_of(self.app).close()

    def _script(self, generation: Generation) -> list[int]:
        assert self.tokenizer is not None
        return [*self.tokenizer.encode(self.text, add_special_tokens=False), EOS]

    @property
    def sent(self) -> Generation:
        """The last submission to the backend."""
        return self.backend.submitted[-1]

    def client(self, **options: Any) -> httpx.AsyncClient:
        """A client of the application itself, without a port."""
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://lab", **options)

    async def post(self, path: str, body: dict[str, Any], **options: Any) -> httpx.Response:
        async with self.client() as client:
            return await client.post(path, json=body, **options)

    async def chat(self, text: str = "hi", **fields: Any) -> httpx.Response:
        return await self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": text}], **fields})

    async def complete(self, prompt: Any = "hi", **fields: Any) -> httpx.Response:
        return await self.post("/v1/completions", {"prompt": prompt, **fields})

    async def events(self, path: str, body: dict[str, Any]) -> list[Any]:
        """A stream's events, parsed, without the end mark."""
        answer = await self.post(path, {**body, "stream": True})
        assert answer.headers["content-type"].startswith("text/event-stream"), answer.text
        return parse_events(answer.text)


def parse_events(text: str) -> list[Any]:
    lines = text.split("\n\n")
    assert lines[-1] == "" and all(line.startswith("data: ") for line in lines[:-1]), text
    datas = [line.removeprefix("data: ") for line in lines[:-1]]
    return [data if data == "[DONE]" else json.loads(data) for data in datas]


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """The error of an answer, which has OpenAI's shape and nothing else."""
    body = answer.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}, body
    assert body["error"]["message"] and "\n" not in body["error"]["message"]
    return body["error"]
