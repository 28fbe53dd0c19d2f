"""Can one client stop a server for the others? Attacks, one by one, beside an honest stream and questions to /health.

    python benchmarks/hostile.py [--attack NAME ...] [--json] [-- flags of narrows serve]
    python benchmarks/hostile.py --url http://127.0.0.1:8000 --pid PID     # a server that runs, on this machine only

Starts ``narrows serve`` on the demo model. Before each attack it waits until the server does nothing, and reads an
honest client's stream alone; then the same beside the attack, with /health requested on a fresh connection every 50 ms.
Attackers and observers run in separate processes. The observer runs first (real-time priority, where the system
allows it) and attackers run last, since real clients have their own machines: the server is measured, not how the
machine is shared. By default the rank has one core, and flags bound a step: a prompt that may fill one holds up every
stream, whoever sent it. An attack fails if /health took longer than 0.5 s, if the stream's longest gap was more than 3
times its longest alone (of the last 8 seconds alone, about as long as an attack: the worst of one time is compared with
the worst of another as long), if a new stream had to wait 5 s for its first event, if ranks were started again, or if
the server's memory did not come back to within 100 MB. A server that an attack has ended, or does not calm down, is
replaced. Prints a table, or with ``--json`` one
JSON document; exit code 1 if an attack failed. Needs aiohttp and Linux.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import resource
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Literal
from urllib.parse import urlsplit

import aiohttp
from hostile_load.attacker import Attack, Attacker
from hostile_load.connections import CONNECTIONS
from hostile_load.grammars import GRAMMARS
from hostile_load.items import ITEMS
from hostile_load.queue_attacks import QUEUE_ATTACKS
from hostile_load.shares import last_in_line
from hostile_load.texts import TEXTS
from hostile_load.victim import Victim, start
from hostile_load.watch import Seen, Watch
from rich.console import Console
from rich.table import Table

ATTACKS = (*TEXTS, *ITEMS, *GRAMMARS, *CONNECTIONS, *QUEUE_ATTACKS)
MAX_HEALTH_S = 0.5
MAX_GAP_RATIO = 3.0
MAX_FIRST_S = 5.0
MAX_GROWTH_MB = 100.0
ALONE_S = 2.0
FLAGS = ["--tp", "1", "--threads", "1", "--prompt-rows", "16", "--requests-per-group", "16"]
MIN_EVENTS = 20
"""Fewer events of a stream alone are no figure: the server was still busy."""
HEAD_START_S = 0.5
"""What the honest stream has to get going before the attack."""
SETTLES_S = 5.0
"""What memory may take to come back once the server does nothing."""

COLUMNS: Mapping[str, Literal["left", "right"]] = {
    "attack": "left",
    "health s": "right",
    "gap ms": "right",
    "alone ms": "right",
    "first s": "right",
    "MB before": "right",
    "peak": "right",
    "after": "right",
    "restarts": "right",
    "outcomes": "left",
    "broken": "left",
}


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One attack's. Seconds and MB; ``restarts`` None: the server ended, or answers no more."""

    name: str
    seen: Seen
    gap_alone: float
    before_mb: float
    peak_mb: float
    after_mb: float
    restarts: int | None
    calm: bool
    attack_s: float
    outcomes: dict[str, int]

    @property
    def wrong(self) -> list[str]:
        """The bounds that are broken."""
        found = []
        if self.seen.health > MAX_HEALTH_S:
            found.append("health")
        if self.seen.gap > MAX_GAP_RATIO * self.gap_alone:
            found.append("gap")
        if self.seen.first > MAX_FIRST_S:
            found.append("first")
        if self.restarts is None:
            found.append("no answer")
        elif self.restarts:
            found.append("restarts")
        if not self.calm:
            found.append("not calm")
        if self.after_mb > self.before_mb + MAX_GROWTH_MB:
            found.append("memory")
        return found

    @property
    def cells(self) -> list[str]:
        """A row of the table."""
        memory = (f"{mb:.0f}" for mb in (self.before_mb, self.peak_mb, self.after_mb))
        return [
            self.name,
            f"{self.seen.health:.2f}",
            f"{self.seen.gap * 1000:.0f}",
            f"{self.gap_alone * 1000:.0f}",
            f"{self.seen.first:.2f}",
            *memory,
            "?" if self.restarts is None else str(self.restarts),
            ", ".join(f"{count} x {outcome}" for outcome, count in self.outcomes.items()),
            ", ".join(self.wrong) or "-",
        ]


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attack", action="append", metavar="NAME", help="only this one (repeatable)")
    parser.add_argument("--list", action="store_true", help="print the attacks and end")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")
    parser.add_argument("--model", default="narrows-demo")
    parser.add_argument("--url", help="attack this server, which runs on this machine, instead of a new one")
    parser.add_argument("--pid", type=int, help="of --url: the server's first process")
    parser.add_argument("--seconds", type=float, default=6.0, help="what one attack may take (default %(default)g)")
    parser.add_argument("--patience", type=float, default=30.0, help="seconds for calming down (default %(default)g)")
    parser.add_argument("--log", default=os.devnull, help="file for what the server logs (default: none)")
    parser.add_argument("--body-mb", type=float, default=15.0, help="MB of a large body (default %(default)g)")
    parser.add_argument("serve", nargs="*", default=FLAGS, help=f"flags of narrows serve (default: {' '.join(FLAGS)})")
    args = parser.parse_args()
    if args.list:
        for attack in ATTACKS:
            print(f"{name_of(attack):32} {(attack.__doc__ or '').strip()}")
        return 0
    known = {name_of(attack): attack for attack in ATTACKS}
    if wrong := [name for name in args.attack or () if name not in known]:
        parser.error(f"no such attack: {', '.join(wrong)}; --list prints them")
    if (args.url is None) != (args.pid is None):
        parser.error("--url and --pid go together")
    if args.url is not None and urlsplit(args.url).hostname not in ("127.0.0.1", "::1", "localhost"):
        parser.error("--url has to be an address of this machine's loopback: attack no other")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return report(run([known[name] for name in args.attack or known], args), as_json=args.json)


def name_of(attack: Attack) -> str:
    """As the command line spells it."""
    return str(getattr(attack, "__name__", "")).replace("_", "-")


def run(attacks: Sequence[Attack], args: argparse.Namespace) -> list[Figures]:
    """Each attack's figures, in order; those so far when Ctrl-C is pressed, or a server that is not ours has ended."""

    def begin() -> Victim:
        victim = Victim(args.url, args.pid) if args.url else start(args.model, args.serve, args.log)
        victim.wait(args.patience)
        watched(victim, 3 * ALONE_S)  # a server's first streams are slower
        victim.wait(args.patience)
        return victim

    found: list[Figures] = []
    victim = begin()
    alone: deque[float] = deque((gap_alone(victim) for _ in range(3)), maxlen=4)
    try:
        for attack in attacks:
            figures = trial(attack, victim, alone, args)
            found.append(figures)
            print(" | ".join(figures.cells), file=sys.stderr, flush=True)
            if figures.restarts is None or not figures.calm:
                if args.url:
                    print("the server does not answer: the rest is left out", file=sys.stderr)
                    break
                victim.end()
                victim = begin()
    except KeyboardInterrupt:
        print("interrupted: the rest is left out", file=sys.stderr)
    finally:
        victim.end()
    return found


def watched(victim: Victim, seconds: float) -> Seen:
    """The server without an attack."""
    watch = Watch(victim.url)
    time.sleep(seconds)
    return watch.end()


def gap_alone(victim: Victim) -> float:
    """The stream's worst gap without an attack, in seconds.

    Raises:
        SystemExit: the server streams nothing.
    """
    for _ in range(5):
        if (seen := watched(victim, ALONE_S)).num_events >= MIN_EVENTS:
            return seen.gap
    raise SystemExit("the server streams nothing to an honest client, though nothing attacks it")


def trial(attack: Attack, victim: Victim, alone: deque[float], args: argparse.Namespace) -> Figures:
    """One attack beside the honest client, from calm to calm."""
    victim.wait(args.patience)
    alone.append(gap_alone(victim))
    victim.wait(args.patience)
    before_mb, restarts_before = victim.memory_mb(), victim.num_restarts()
    context = multiprocessing.get_context("fork")
    pipe, theirs = context.Pipe()
    process = context.Process(target=attacks, args=(attack, victim.url, args, theirs), daemon=True)
    watch = Watch(victim.url)
    time.sleep(HEAD_START_S)
    began = time.monotonic()
    process.start()
    peak_mb = before_mb
    while process.is_alive() and time.monotonic() < began + args.seconds + 10:
        process.join(0.25)
        peak_mb = max(peak_mb, victim.memory_mb())
    attack_s = time.monotonic() - began
    process.kill()
    end = time.monotonic() + args.patience  # what it left behind is part of the attack, until /health answers again
    time.sleep(0.5)
    while victim.num_restarts() is None and victim.is_alive and time.monotonic() < end:
        peak_mb = max(peak_mb, victim.memory_mb())
        time.sleep(0.1)
    seen = watch.end()
    calm = victim.wait(args.patience)
    after_mb = settled_mb(victim, before_mb)
    restarts = victim.num_restarts()
    return Figures(
        name=name_of(attack),
        seen=seen,
        gap_alone=max(alone),
        before_mb=before_mb,
        peak_mb=max(peak_mb, after_mb),
        after_mb=after_mb,
        restarts=None if restarts is None or restarts_before is None else restarts - restarts_before,
        calm=calm,
        attack_s=attack_s,
        outcomes=pipe.recv() if pipe.poll() else {},
    )


def settled_mb(victim: Victim, before_mb: float) -> float:
    """Memory some seconds later, or as soon as it is back."""
    end = time.monotonic() + SETTLES_S
    while (mb := victim.memory_mb()) > before_mb + MAX_GROWTH_MB and time.monotonic() < end:
        time.sleep(0.5)
    return mb


def attacks(attack: Attack, url: str, args: argparse.Namespace, pipe: Connection) -> None:
    """The attacker's process. A remote one would take nothing of the server's cores; this one gets what they leave."""
    last_in_line()

    async def bounded() -> dict[str, int]:
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(url, connector=connector, timeout=timeout) as session:
            attacker = Attacker(url, session, args.body_mb)
            try:
                async with asyncio.timeout(args.seconds):
                    await attack(attacker)
            except TimeoutError:
                pass
            return dict(attacker.outcomes)

    pipe.send(asyncio.run(bounded()))


def report(found: list[Figures], *, as_json: bool) -> int:
    """The table, or the JSON document, and the exit code."""
    if as_json:
        rows = [{**asdict(each), "wrong": each.wrong} for each in found]
        bounds = {"health_s": MAX_HEALTH_S, "gap_ratio": MAX_GAP_RATIO, "first_s": MAX_FIRST_S}
        bounds |= {"restarts": 0, "growth_mb": MAX_GROWTH_MB}
        print(json.dumps({"command": sys.argv, "bounds": bounds, "attacks": rows}))
        return 1 if any(each.wrong for each in found) else 0
    title = f"{len(found)} attacks, {sum(bool(each.wrong) for each in found)} break a bound"
    table = Table(title=title, title_justify="left")
    for name, justify in COLUMNS.items():
        table.add_column(name, justify=justify)
    for each in found:
        table.add_row(*each.cells)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    return 1 if any(each.wrong for each in found) else 0


if __name__ == "__main__":
    sys.exit(main())
