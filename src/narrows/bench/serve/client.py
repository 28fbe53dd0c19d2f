"""Sends a workload to an OpenAI-compatible server and notes when the pieces of each answer came.

Needs aiohttp (the extra ``bench``). Pieces are distinguished by bytes and parsed only where a count or an error stands
in them, so that the client takes little of the machine that it measures.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from narrows.errors import ConfigError
from narrows.workload.arrivals import Ask, prompt_ids
from narrows.workload.figures import Answer

__all__ = ["Target", "look_at", "send_all"]

_SILENT = re.compile(rb'"choices":\s*\[\]|"delta":\s*\{\}|"(?:content|text)":\s*""')
"""What stands in a chunk without text. Inside of a text, quotes have a backslash before them."""

_WORDS = ("the", "of", "and", "to", "in", "is", "that", "for", "it", "as", "was", "with", "be", "by", "on", "not")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The server, and how requests are sent. ``vocab_size`` 0: prompts are words, which the server tokenizes."""

    url: str
    model: str
    api_key: str = ""
    chat: bool = False
    vocab_size: int = 0
    ignore_eos: bool = True
    temperature: float = 0.0
    timeout_s: float = 600.0

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.chat else "/v1/completions"

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    def body(self, ask: Ask, number: int, seed: int) -> dict[str, Any]:
        """What request ``number`` says."""
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": ask.output_tokens,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.ignore_eos:
            body["ignore_eos"] = True
        ids = prompt_ids(ask, number, vocab_size=self.vocab_size or len(_WORDS), seed=seed)
        prompt: Any = ids if self.vocab_size and not self.chat else " ".join(_WORDS[i % len(_WORDS)] for i in ids)
        return body | ({"messages": [{"role": "user", "content": prompt}]} if self.chat else {"prompt": prompt})


def _aiohttp() -> Any:
    try:
        import aiohttp  # noqa: PLC0415 - an optional extra
    except ImportError:
        raise ConfigError("bench serve needs aiohttp: pip install 'narrows[bench]'") from None
    return aiohttp


def look_at(url: str, api_key: str) -> tuple[str, dict[str, Any]]:
    """The first model of a server, and what it says of itself at ``/server_info`` (empty if it has no such route).

    Raises:
        ConfigError: no server answers there, or not as an OpenAI-compatible server does.
    """
    aiohttp = _aiohttp()

    async def ask() -> tuple[str, dict[str, Any]]:
        headers = Target(url=url, model="", api_key=api_key).headers
        timeout = aiohttp.ClientTimeout(total=30)
        async with aiohttp.ClientSession(headers=headers, timeout=timeout) as session:
            async with session.get(f"{url}/v1/models") as answer:
                if answer.status != 200:
                    body = (await answer.text())[:200]
                    raise ConfigError(f"{url}/v1/models answers {answer.status}: {body}")
                model = str((await answer.json())["data"][0]["id"])
            async with session.get(f"{url}/server_info") as answer:
                info = await answer.json() if answer.status == 200 else {}
        return model, info if isinstance(info, dict) else {}

    try:
        return asyncio.run(ask())
    except (OSError, aiohttp.ClientError, TimeoutError, ValueError, KeyError, IndexError, TypeError) as error:
        what = str(error) or type(error).__name__
        raise ConfigError(f"no OpenAI-compatible server answers at {url}: {what}; give its --url") from None


def send_all(
    target: Target, asks: Sequence[Ask], *, concurrency: int, seed: int, progress: Callable[[int], None]
) -> list[Answer]:
    """Send every request at its time, at most ``concurrency`` at once (0: no limit); the answers, in their order.

    ``progress`` is called with how many have ended. Ctrl-C ends the sending: what has ended by then is returned.
    """
    aiohttp = _aiohttp()
    answers: list[Answer | None] = [None] * len(asks)
    done = itertools.count(1)

    async def run() -> None:
        slots = asyncio.Semaphore(concurrency or len(asks))
        bodies = [json.dumps(target.body(ask, number, seed)).encode() for number, ask in enumerate(asks)]
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=target.timeout_s)
        headers = target.headers | {"Content-Type": "application/json"}
        async with aiohttp.ClientSession(connector=connector, headers=headers, timeout=timeout) as session:
            begin = perf_counter()

            async def one(number: int) -> None:
                if (wait := begin + asks[number].at_s - perf_counter()) > 0:
                    await asyncio.sleep(wait)
                async with slots:
                    answers[number] = await _send(session, f"{target.url}{target.path}", bodies[number])
                progress(next(done))

            await asyncio.gather(*(one(number) for number in range(len(asks))))

    with suppress(KeyboardInterrupt):
        asyncio.run(run())
    return [answer for answer in answers if answer is not None]


async def _send(session: Any, url: str, body: bytes) -> Answer:
    """One request to its end."""
    sent = perf_counter()
    pieces: list[float] = []
    usage: dict[str, Any] = {}
    error, done = "", False
    try:
        async with session.post(url, data=body) as answer:
            if answer.status != 200:
                error = f"HTTP {answer.status}: {_message(await answer.text())}"
            else:
                async for line in answer.content:
                    if not line.startswith(b"data:"):
                        continue
                    at, data = perf_counter(), line[5:].strip()
                    if data == b"[DONE]":
                        done = True
                    elif b'"usage":{' in data.replace(b" ", b"") or b'"error"' in data:
                        chunk = json.loads(data)
                        error = error or (_message(data.decode()) if "error" in chunk else "")
                        usage = chunk.get("usage") or usage
                        pieces += [at] * _has_text(chunk)
                    elif _speaks(data):
                        pieces.append(at)
    except Exception as failure:  # whatever goes wrong is this request's alone
        error = f"{type(failure).__name__}: {failure}".rstrip(": ")
    if not error and not done:
        error = "the stream was cut off"
    details = usage.get("prompt_tokens_details") or {}
    return Answer(
        sent_s=sent,
        ended_s=perf_counter(),
        pieces_s=tuple(pieces),
        input_tokens=int(usage.get("prompt_tokens", 0)),
        output_tokens=int(usage.get("completion_tokens", len(pieces))),
        cached_tokens=int(details.get("cached_tokens") or 0),
        error=error,
    )


def _speaks(data: bytes) -> bool:
    """Whether a chunk brings text: a chat's first one only says whose turn it is, its last one why it ends."""
    return _SILENT.search(data) is None


def _has_text(chunk: dict[str, Any]) -> bool:
    return any(choice.get("text") or (choice.get("delta") or {}).get("content") for choice in chunk.get("choices", ()))


def _message(text: str) -> str:
    """What an error says, in one line."""
    try:
        body = json.loads(text)
        text = str(body["error"]["message"])
    except (ValueError, KeyError, TypeError):
        pass
    return " ".join(text.split())[:200]
