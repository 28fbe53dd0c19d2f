"""Does a server leak? Minutes of mixed load, with the memory, descriptors and pages of its processes watched.

    python benchmarks/soak.py --minutes 20 [-- flags of narrows serve]

Starts ``narrows serve`` on the demo model, keeps clients of every kind on it (streams, whole answers, chats, JSON
schemas, log-probabilities, several texts, clients that vanish, wrong requests), and samples every process of it every
5 seconds. After a quarter of the time for warming up, medians of the second quarter and of the last are compared:
it fails if a process grew by more than 3 % and 8 MB, if descriptors or threads grew, or if pages are held at the end.
Prints a table and one line of JSON. Needs aiohttp and Linux.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp
from rich.console import Console
from rich.table import Table

WORDS = ("rain", "sea", "light", "stone", "river", "morning", "voice", "window", "paper", "bread", "silver", "garden")
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 99}}, "required": ["n"]}


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--model", default="narrows-demo")
    parser.add_argument("serve", nargs="*", default=["--tp", "2", "--kv-tokens", "6000"], help="flags of narrows serve")
    args = parser.parse_args()
    command = [sys.executable, "-m", "narrows", "serve", args.model, "--port", "0", *args.serve]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    ready = re.search(r"ready at (http://\S+) ", process.stdout.readline())
    if ready is None:
        return 2
    try:
        samples, counts, pages = asyncio.run(soak(ready[1], process.pid, args.minutes * 60, args.clients))
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    return report(samples, counts, pages, code, args.minutes, shown=[*sys.argv])


def family(pid: int) -> dict[str, int]:
    """The server, its ranks, the process that forks them, and those that read bodies and try constraints."""
    named, others, found = {"server": pid}, 0, [pid]
    for parent in found:
        children = Path(f"/proc/{parent}/task").glob("*/children")
        found += sorted(int(child) for path in children for child in path.read_text().split())
    for child in found[1:]:
        name = Path(f"/proc/{child}/comm").read_text().strip()
        if not name.startswith("narrows "):
            name, others = f"other {others}", others + 1
        named[name.removeprefix("narrows ")] = child
    return named


def sample(pid: int) -> dict[str, float]:
    """Of one process: MB of its own, descriptors, threads."""
    smaps = Path(f"/proc/{pid}/smaps_rollup").read_text()
    own = sum(int(found) for found in re.findall(r"Private_(?:Clean|Dirty):\s+(\d+)", smaps))
    return {
        "mb": own / 1024,
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": len(os.listdir(f"/proc/{pid}/task")),
    }


async def soak(url: str, pid: int, seconds: float, clients: int) -> tuple[list[Any], dict[str, int], float]:
    """Load until the time is over; samples, answers by kind, and the pages held at the end."""
    end = time.monotonic() + seconds
    counts: dict[str, int] = {}
    samples: list[Any] = []
    async with aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0)) as session:

        async def watch() -> None:
            while time.monotonic() < end:
                await asyncio.sleep(5)
                samples.append({name: sample(each) for name, each in family(pid).items()})

        async def client(number: int) -> None:
            source = random.Random(number)
            while time.monotonic() < end:
                kind = source.choice(KINDS)
                try:
                    status = await kind(session, source)
                except (aiohttp.ClientError, TimeoutError) as error:
                    status = type(error).__name__
                name = f"{kind.__name__} {status}"
                counts[name] = counts.get(name, 0) + 1

        await asyncio.gather(watch(), *(client(number) for number in range(clients)))
        await asyncio.sleep(2)
        text = await (await session.get("/metrics")).text()
    held = re.search(r"^narrows_kv_pages_used (\S+)", text, re.M)
    return samples, counts, float(held[1]) if held else -1.0


def prompt(source: random.Random) -> str:
    """Some words; one in four begins as others do."""
    shared = "Once upon a time there was a small house by the sea, and in it lived " if source.random() < 0.25 else ""
    return shared + " ".join(source.choices(WORDS, k=source.choice((2, 10, 60, 200))))


async def streams(session: aiohttp.ClientSession, source: random.Random) -> int:
    body = {"prompt": prompt(source), "stream": True, "max_tokens": source.randint(1, 150), "logprobs": 2}
    async with session.post("/v1/completions", json=body) as answer:
        async for _ in answer.content:
            pass
        return answer.status


async def vanishes(session: aiohttp.ClientSession, source: random.Random) -> int:
    body = {"prompt": prompt(source), "stream": True, "max_tokens": 1000, "ignore_eos": True, "n": 2}
    async with session.post("/v1/completions", json=body) as answer:
        for _ in range(source.randint(1, 20)):
            await answer.content.readline()
        answer.close()
        return answer.status


async def chats(session: aiohttp.ClientSession, source: random.Random) -> int:
    messages = [{"role": "user", "content": prompt(source)}]
    body = {"messages": messages, "max_tokens": source.randint(1, 100), "n": source.randint(1, 3), "stop": ["the"]}
    async with session.post("/v1/chat/completions", json=body) as answer:
        await answer.read()
        return answer.status


async def forms(session: aiohttp.ClientSession, source: random.Random) -> int:
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
    body = {"prompt": prompt(source), "max_tokens": 40, "response_format": form}
    async with session.post("/v1/completions", json=body) as answer:
        await answer.read()
        return answer.status


async def responses(session: aiohttp.ClientSession, source: random.Random) -> int:
    body = {"input": prompt(source), "max_output_tokens": source.randint(1, 60), "stream": True}
    async with session.post("/v1/responses", json=body) as answer:
        async for _ in answer.content:
            pass
        return answer.status


async def messages(session: aiohttp.ClientSession, source: random.Random) -> int:
    said = [{"role": "user", "content": prompt(source)}]
    body = {"messages": said, "max_tokens": source.randint(1, 60)}
    async with session.post("/v1/messages", json=body) as answer:
        await answer.read()
        return answer.status


async def scores(session: aiohttp.ClientSession, source: random.Random) -> int:
    body = {"prompt": prompt(source), "max_tokens": 0, "echo": True, "logprobs": 1}
    async with session.post("/v1/completions", json=body) as answer:
        await answer.read()
        return answer.status


async def errs(session: aiohttp.ClientSession, source: random.Random) -> int:
    wrong = [{}, {"prompt": ""}, {"prompt": "x", "n": -1}, {"prompt": "x", "max_tokens": 10**9}, {"model": "none"}]
    async with session.post("/v1/completions", json=source.choice(wrong)) as answer:
        await answer.read()
        return answer.status


async def looks(session: aiohttp.ClientSession, source: random.Random) -> int:
    path = source.choice(["/health", "/metrics", "/v1/models", "/server_info", "/nothing"])
    async with session.get(path) as answer:
        await answer.read()
        return answer.status


KINDS = (streams, streams, vanishes, chats, responses, messages, forms, scores, errs, looks)


def report(
    samples: list[Any], counts: dict[str, int], pages: float, code: int, minutes: float, shown: list[str]
) -> int:
    """The table, the verdict, the line of JSON."""
    quarter = max(len(samples) // 4, 1)
    early, late = samples[quarter : 2 * quarter], samples[-quarter:]
    table = Table(title=f"{minutes:g} minutes, {sum(counts.values())} requests", title_justify="left")
    for name in ("process", "what", "second quarter", "last quarter", "most"):
        table.add_column(name, justify="left" if name in ("process", "what") else "right")
    wrong, rows = [], []
    for name in late[-1]:
        for what in ("mb", "descriptors", "threads"):
            before, after = (median(s[name][what] for s in part if name in s) for part in (early, late))
            most = max(s[name][what] for s in samples if name in s)
            allowed = max(before * 1.03, before + 8) if what == "mb" else before + (24 if what == "descriptors" else 2)
            rows.append({"process": name, "what": what, "early": before, "late": after, "most": most})
            table.add_row(name, what, f"{before:.1f}", f"{after:.1f}", f"{most:.1f}")
            if after > allowed:
                wrong.append(f"{name}: {what} grew from {before:.1f} to {after:.1f}")
    failed = {kind: count for kind, count in counts.items() if not kind.rpartition(" ")[2].startswith(("2", "4"))}
    failed = {kind: count for kind, count in failed.items() if not kind.startswith("looks")}
    if pages:
        wrong.append(f"{pages:g} pages are held at the end")
    if code:
        wrong.append(f"the server ended with exit code {code}")
    wrong += [f"{count} x {kind}" for kind, count in failed.items()]
    console = Console()
    console.print(table)
    for line in wrong:
        console.print(f"WRONG: {line}", markup=False)
    print(json.dumps({"command": shown, "minutes": minutes, "counts": counts, "processes": rows, "wrong": wrong}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
