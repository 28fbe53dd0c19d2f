"""Loads of requests: arrival times, lengths, shared prefixes, or a trace of real ones. Equal seeds give equal loads."""

from __future__ import annotations

import csv
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from narrows.errors import ConfigError

__all__ = ["Ask", "Prefixes", "arrive", "fitted", "flood", "prompt_ids", "random_lengths", "read_trace"]

_BLOCK = 512
"""Tokens of a block of the traces that name their blocks."""
_FLOOD = -1
"""The block that a flood's prompt is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request: when it comes (seconds from the start), and how long its prompt and text are, in tokens.

    ``blocks``: what its prompt begins with, as (which, tokens): equal ones are the same tokens in every request.
    ``client``: on whose behalf it comes; empty: a client that asks for nothing else.
    """

    at_s: float
    input_tokens: int
    output_tokens: int
    blocks: tuple[tuple[int, int], ...] = ()
    client: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefixes:
    """``count`` prefixes of ``tokens`` each, before the prompts' own tokens; every request begins with one of them."""

    count: int = 1
    tokens: int = 0


def random_lengths(
    count: int, input_tokens: int, output_tokens: int, *, spread: float = 0.0, seed: int = 0, prefixes: Prefixes
) -> list[Ask]:
    """``count`` requests that are all there at the start, of lengths between (1 - spread) and (1 + spread) times those.

    >>> [(a.input_tokens, a.output_tokens) for a in random_lengths(2, 8, 4, prefixes=Prefixes())]
    [(8, 4), (8, 4)]
    """
    source = random.Random(seed)

    def draw(mean: int) -> int:
        return source.randint(max(1, math.ceil(mean * (1 - spread))), max(1, math.floor(mean * (1 + spread))))

    asks = []
    for _ in range(count):
        own, answer = draw(input_tokens), draw(output_tokens)
        which = source.randrange(prefixes.count)
        blocks = ((which, prefixes.tokens),) if prefixes.tokens else ()
        asks.append(Ask(at_s=0.0, input_tokens=prefixes.tokens + own, output_tokens=answer, blocks=blocks))
    return asks


def arrive(asks: Sequence[Ask], rate: float, *, burstiness: float = 1.0, seed: int = 0) -> list[Ask]:
    """The same requests, ``rate`` of them per second: gaps are gamma distributed, of mean 1 / rate.

    ``burstiness`` 1: a Poisson process; below: more bursty; above: more regular.
    """
    source = random.Random(f"arrivals {seed}")
    gaps = (source.gammavariate(burstiness, 1 / (rate * burstiness)) for _ in asks)
    return [replace(ask, at_s=at) for ask, at in zip(asks, accumulate(gaps), strict=True)]


def flood(count: int, input_tokens: int, output_tokens: int, *, at_s: float = 0.0) -> list[Ask]:
    """``count`` texts of one prompt that one client, ``flood``, asks for at once."""
    blocks = ((_FLOOD, input_tokens),)
    ask = Ask(at_s=at_s, input_tokens=input_tokens, output_tokens=output_tokens, blocks=blocks, client="flood")
    return [ask] * count


def read_trace(file: Path, count: int, *, speed: float = 1.0, length_scale: float = 1.0) -> list[Ask]:
    """The first ``count`` requests of a trace (0: all), ``speed`` times as fast and their lengths scaled.

    Read are CSV with ``TIMESTAMP,ContextTokens,GeneratedTokens`` (as Azure publishes them) and JSON lines with
    ``timestamp`` in milliseconds, ``input_length``, ``output_length`` and, if they share prefixes, ``hash_ids`` of
    blocks of 512 tokens (as Mooncake publishes them). There ``client`` may say on whose behalf a request comes. Times
    without a zone are UTC.

    Raises:
        ConfigError: the file cannot be read, or is of another form; the line is named.
    """
    try:
        with file.open(encoding="utf-8") as lines:
            rows = list(islice(_rows(lines, file), count or None))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the trace {file} cannot be read: {error}") from None
    if not rows:
        raise ConfigError(f"the trace {file} holds no request")
    first = min(row.at_s for row in rows)
    scaled = []
    for row in rows:
        answer = max(1, round(row.output_tokens * length_scale))
        prompt = max(1, round(row.input_tokens * length_scale))
        blocks = tuple((which, max(1, round(tokens * length_scale))) for which, tokens in row.blocks)
        at_s = (row.at_s - first) / speed
        scaled.append(replace(row, at_s=at_s, input_tokens=prompt, output_tokens=answer, blocks=blocks))
    return sorted(scaled, key=lambda ask: ask.at_s)


def fitted(asks: Sequence[Ask], longest: int) -> list[Ask]:
    """The same requests with at most ``longest`` tokens each: longer ones lose of their prompt, then of their text.

    >>> [(a.input_tokens, a.output_tokens) for a in fitted(random_lengths(1, 9, 4, prefixes=Prefixes()), 10)]
    [(6, 4)]
    """
    out = []
    for ask in asks:
        answer = min(ask.output_tokens, longest - 1)
        out.append(replace(ask, input_tokens=min(ask.input_tokens, longest - answer), output_tokens=answer))
    return out


def _rows(lines: Iterator[str], file: Path) -> Iterator[Ask]:
    begin = next(lines, "")
    if not begin.strip():
        return
    if begin.lstrip().startswith("{"):
        yield from (_json_row(line, number, file) for number, line in enumerate([begin, *lines], 1) if line.strip())
        return
    names = next(csv.reader([begin]), [])
    wanted = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
    if not set(wanted) <= set(names):
        have = ", ".join(names)[:200]
        raise ConfigError(f"the trace {file} has the columns {have!r}; needed are {', '.join(wanted)}")
    for number, row in enumerate(csv.DictReader(lines, names), 2):
        try:
            if missing := next((name for name in wanted if row[name] is None), None):
                raise ValueError(f"there is no {missing}")
            at = datetime.fromisoformat(row["TIMESTAMP"])
            at_s = (at if at.tzinfo is not None else at.replace(tzinfo=UTC)).timestamp()
            yield _ask(at_s, row["ContextTokens"], row["GeneratedTokens"])
        except ValueError as error:
            raise ConfigError(f"line {number} of the trace {file}: {error}") from None


def _json_row(line: str, number: int, file: Path) -> Ask:
    try:
        row = json.loads(line)
        blocks = tuple((int(which), _BLOCK) for which in row.get("hash_ids", ()))
        ask = _ask(float(row["timestamp"]) / 1e3, row["input_length"], row["output_length"], blocks)
        return replace(ask, client=str(row.get("client", "")))
    except KeyError as error:
        raise ConfigError(f"line {number} of the trace {file}: there is no {error.args[0]}") from None
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"line {number} of the trace {file}: {error}") from None


def _ask(at_s: float, prompt: Any, answer: Any, blocks: tuple[tuple[int, int], ...] = ()) -> Ask:
    """
    Raises:
        ValueError: a time or a length that none can have.
    """
    if not math.isfinite(at_s):
        raise ValueError(f"the time is {at_s}")
    if int(prompt) < 1 or int(answer) < 1:
        raise ValueError(f"{prompt} tokens in and {answer} out; each must be at least 1")
    return Ask(at_s=at_s, input_tokens=int(prompt), output_tokens=int(answer), blocks=blocks)


def prompt_ids(ask: Ask, number: int, *, vocab_size: int, seed: int = 0) -> list[int]:
    """The token ids of request ``number``: its blocks, then its own; as many as it asks for in all."""
    ids: list[int] = []
    for which, tokens in ask.blocks:
        ids += random.Random(f"block {seed} {which}").choices(range(vocab_size), k=tokens)
    own = ask.input_tokens - len(ids)
    if own > 0:
        ids += random.Random(f"prompt {seed} {number}").choices(range(vocab_size), k=own)
    return ids[: ask.input_tokens]
