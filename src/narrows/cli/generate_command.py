"""``narrows generate``: generates text from prompts on planned ranks, and prints it as it comes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter

from rich import box
from rich.table import Table

from narrows.arch.weight_sharding import sharding_words
from narrows.cli.arguments import (
    add_engine_flags,
    add_host_flags,
    add_limit_flags,
    add_prompt_flags,
    add_trace_flags,
    defaults,
    engine_options,
    launch_of,
    limit_options,
    read_prompts,
    trace_file,
)
from narrows.cli.console import console
from narrows.engine.config import EngineConfig, resolve
from narrows.engine.llm import LLM, Completion, Prompt
from narrows.engine.ranks import run_local_ranks
from narrows.errors import ConfigError
from narrows.instruments.op_times import BETWEEN, Expected, OpClock, OpTime, op_times
from narrows.ranks.start_clock import StartClock
from narrows.sched.sampling import SamplingParams

__all__ = ["add_parser", "run"]

_DEFAULT = defaults(EngineConfig)
_GREEDY = defaults(SamplingParams)
_SAMPLING = {
    "temperature": ("T", "divide logits by T; 0: choose the most likely token"),
    "top_k": ("K", "draw among the K most likely tokens; 0: among all"),
    "top_p": ("P", "draw among the most likely tokens that together reach probability P"),
    "min_p": ("P", "draw among tokens at least P times as likely as the best"),
    "repetition_penalty": ("X", "divide positive logits of tokens in prompt or text by X, and multiply negative ones"),
    "presence_penalty": ("X", "subtract X from the logit of each token in the text"),
    "frequency_penalty": ("X", "subtract X from a token's logit for each time that it is in the text"),
    "seed": ("N", "draw the same tokens in each run with seed N (default: another seed in each)"),
    "min_tokens": ("N", "let no token end a text before it has N tokens"),
    "logprobs": ("N", "print each token's log-probability, and those of the N most likely"),
    "prompt_logprobs": ("N", "the same for each token of the prompt"),
}
"""Metavar and help of the flags that are fields of SamplingParams."""


def add_parser(parser: argparse.ArgumentParser) -> None:
    """The flags of ``narrows generate``."""
    add_engine_flags(parser, chosen=True)
    add_host_flags(parser)
    add_prompt_flags(parser)
    parser.add_argument("--layout", default=_DEFAULT["layout"], help="a named layout, or auto (default %(default)s)")
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=128,
        metavar="N",
        help="generate at most N tokens per prompt (default %(default)s)",
    )
    parser.add_argument("--ignore-eos", action="store_true", help="go on after an end-of-sequence token")
    add_limit_flags(parser)
    _add_sampling_flags(parser)
    parser.add_argument(
        "--profile", action="store_true", help="print where the start went, and time, rows and bytes per stage and move"
    )
    add_trace_flags(parser, "what every rank ran when, from the first step on")
    parser.add_argument("--quiet", action="store_true", help="print only the texts")


def _add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling (default: the checkpoint's generation config, else greedy)")
    for name, (metavar, what) in _SAMPLING.items():
        kind = float if isinstance(_GREEDY[name], float) else int
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=what)
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end a text at TEXT; repeatable")
    group.add_argument(
        "--stop-token-id",
        action="append",
        type=int,
        default=[],
        metavar="ID",
        help="end a text at this token; repeatable",
    )


def run(args: argparse.Namespace) -> int:
    """Run ``narrows generate``; texts go to standard output, everything else to standard error."""
    clock = StartClock()
    clock.end("interpreter and imports")
    prompts = read_prompts(args)
    if args.max_tokens < 1:
        raise ConfigError(f"--max-tokens is {args.max_tokens}; it must be at least 1")
    if not prompts:
        raise ConfigError("nothing to generate from: give --prompt TEXT (repeatable) or --prompt-file FILE")
    given = {name: getattr(args, name) for name in _SAMPLING}
    given = {name: value for name, value in given.items() if value is not None}
    SamplingParams(**given)  # a value out of range is known before anything is loaded
    notes = console(stderr=True, quiet=args.quiet)
    options = engine_options(args, layout=args.layout, **limit_options(args))
    if (launch := launch_of(args, os.environ)) is not None:
        options |= {"launch": launch, "ranks": args.ranks or "processes"}
    if launch is not None and not launch.is_coordinator:
        return run_local_ranks(resolve(EngineConfig(model=args.model, **options)))
    trace = trace_file(args)
    started = perf_counter()
    with LLM(args.model, clock=clock, **options) as llm:
        resolved = llm.resolved
        layout = resolved.plan.layout_name if resolved.plan else args.layout
        notes.print(
            f"{resolved.config.name}: {resolved.mesh}, {resolved.threads} thread(s) per rank, layout {layout}, "
            f"{str(resolved.dtype).removeprefix('torch.')}, loaded in {perf_counter() - started:.1f} s"
        )
        notes.print(f"weight sharding: {sharding_words(resolved.config, resolved.sharding)}")
        if resolved.mesh.size > 1:
            notes.print(f"collectives: {llm.engine.ranks.transport}")
        for note in filter(None, (*resolved.notes, llm.engine.plans.evidence())):
            notes.print(f"note: {note}")
        expected = Expected()
        if args.profile:
            llm.engine.instrument(OpClock)
            llm.engine.observe(expected.add)
        if trace is not None:
            trace.start(resolved.config.name, llm.engine)
        inputs: list[Prompt] = [[{"role": "user", "content": prompt}] if args.chat else prompt for prompt in prompts]
        started = perf_counter()
        done = _print_stream(llm, inputs, prompts, replace(llm.default_sampling, **given), args, clock)
        seconds = perf_counter() - started
        generated = sum(len(completion.token_ids) for completion in done)
        num_given = sum(len(completion.prompt_token_ids) for completion in done)
        notes.print(
            f"{num_given} prompt tokens and {generated} generated tokens in {seconds:.2f} s "
            f"({generated / seconds:.1f} generated tokens/s)"
        )
        if any(completion.logprobs or completion.prompt_logprobs for completion in done):
            _print_logprobs(llm, done)
        if trace is not None:
            notes.print(trace.write(), markup=False)
        if args.profile:
            notes.print(_start_table(clock))
            _print_profile(op_times(llm.engine.readings(), expected), resolved.mesh.size)
    return 0


def _print_stream(
    llm: LLM,
    inputs: Sequence[Prompt],
    prompts: list[str],
    sampling: SamplingParams,
    args: argparse.Namespace,
    clock: StartClock,
) -> list[Completion]:
    """Print texts as they come: the first unfinished prompt live, the others when their turn comes."""
    kept = [""] * len(prompts)
    done: dict[int, Completion] = {}
    current = 0

    def show(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    def title() -> str:
        return "" if args.quiet else f"--- {prompts[current]}\n"

    pieces = llm.stream(
        inputs,
        max_tokens=args.max_tokens,
        sampling=sampling,
        stop=args.stop,
        stop_token_ids=args.stop_token_id,
        ignore_eos=args.ignore_eos,
    )
    shown_title = False
    for piece in pieces:
        if not shown_title:  # only now is it known that every prompt can run
            clock.end("first token")
            show(title())
            shown_title = True
        kept[piece.index] += piece.text
        if piece.done is not None:
            done[piece.index] = piece.done
        if piece.index != current:
            continue
        show(kept[current])
        while current in done:
            current += 1
            show("\n" if current == len(prompts) else f"\n{title()}{kept[current]}")
        if current < len(prompts):
            kept[current] = ""
    return [done[index] for index in range(len(prompts))]


def _print_logprobs(llm: LLM, done: list[Completion]) -> None:
    """Print a line per scored or generated token: its log-probability, and the best tokens beside it."""
    out = console()

    def shown(token: int) -> str:
        return repr(llm.tokenizer.decode([token], skip_special_tokens=False)) if llm.tokenizer else str(token)

    for completion in done:
        out.print()
        scored = completion.prompt_token_ids[1:] if completion.prompt_logprobs else ()
        chosen = completion.token_ids if completion.logprobs else ()
        found = [(score.logprob, score.best) for score in completion.prompt_logprobs] + list(completion.logprobs)
        for token, (logprob, best) in zip((*scored, *chosen), found, strict=True):
            others = "  ".join(f"{shown(other)} {value:.3f}" for other, value in best)
            out.print(f"{logprob:8.3f}  {shown(token):<16} {others}", markup=False)


def _print_profile(rows: list[OpTime], num_ranks: int) -> None:
    for phase in ("prefill", "decode"):
        if of_phase := [row for row in rows if row.phase == phase]:
            console().print(_profile_table(of_phase, phase, num_ranks))


def _start_table(clock: StartClock) -> Table:
    """Where the time until the first token went."""
    title = f"start: {clock.seconds:.2f} s from the command to the first token"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("phase", no_wrap=True)
    table.add_column("s", justify="right")
    table.add_column("%", justify="right")
    for phase in clock.phases:
        name = f"  slowest rank: {phase.name}" if phase.of_ranks else phase.name
        table.add_row(name, f"{phase.seconds:.3f}", f"{100 * phase.seconds / clock.seconds:.1f}")
    return table


def _short(value: float) -> str:
    """
    >>> _short(0.01234), _short(12.34), _short(1234.0)
    ('0.0123', '12.3', '1234')
    """
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def _profile_table(rows: list[OpTime], phase: str, num_ranks: int) -> Table:
    """Where the time of one phase went, op by op."""
    total = sum(row.seconds for row in rows)
    between = sum(row.seconds for row in rows if row.price_class == BETWEEN)
    predicted = sum(row.predicted for row in rows)
    title = f"{phase}: {total * 1e3:.1f} ms executing the plan, {between / total:.1%} of it between ops "
    title += f"(Python), mean of {num_ranks} rank(s)"
    if predicted:
        title += f"; {predicted * 1e3:.1f} ms were predicted (x {total / predicted:.2f})"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for name in ("class", "op", "before", "fields", "layout"):
        table.add_column(name, no_wrap=True)
    for name in ("calls", "rows", "MB", "ms", "%", "pred.", "x"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.price_class,
            row.name,
            row.boundary,
            "+".join(row.fields),
            row.layouts,
            str(row.calls),
            str(row.rows),
            _short(row.nbytes / 1e6),
            _short(row.seconds * 1e3),
            f"{100 * row.seconds / total:.1f}",
            _short(row.predicted * 1e3) if row.predicted else "",
            f"{row.ratio:.3g}" if row.ratio is not None else "",
        )
    return table
