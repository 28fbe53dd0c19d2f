"""``narrows serve``: starts the engine and an HTTP server with OpenAI's API, and prints one line when it is ready."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from time import perf_counter, time
from types import FrameType

from narrows.checkpoints import name_of
from narrows.cli.arguments import (
    add_engine_flags,
    add_host_flags,
    add_limit_flags,
    add_trace_flags,
    defaults,
    engine_options,
    launch_of,
    limit_options,
)
from narrows.cli.priced import add_prompt_rows_flag
from narrows.cli.renamed import add_old_spelling
from narrows.engine.config import EngineConfig, Resolved, resolve
from narrows.engine.model_text import load_model_text
from narrows.engine.ranks import prepare_ranks, run_local_ranks
from narrows.errors import ConfigError
from narrows.ranks.launch import Launch
from narrows.server.app import create_app, state_of
from narrows.server.http.connection_limits import (
    MAX_CONNECTIONS,
    RESERVED_SLOTS,
    connections_for,
    raise_descriptor_limit,
)
from narrows.server.http.middleware import checked_origins, hosts_to_check
from narrows.server.options import ConnectionLimits, ServedModel, ServerOptions
from narrows.server.parsers.formats import REASONING_PARSERS, TOOL_PARSERS
from narrows.server.run import bind, curl_line, serve, url_of
from narrows.service.service import EngineService
from narrows.service.step_times import DriftRule
from narrows.service.trace import ServiceTrace

__all__ = ["add_parser", "run"]

_DEFAULT = defaults(EngineConfig)
_SERVER = defaults(ServerOptions)
_KEY_VARIABLE = "NARROWS_API_KEY"
_MB = 1024 * 1024
_DAY_S = 24 * 60 * 60
_SWITCH_S = 0.001
"""How long a thread that prepares a request may keep the interpreter's lock while the engine's loop or the event loop
waits for it: a step takes milliseconds, and Python's own 5 ms would be added to each."""
_RANKS = "processes"
"""The default: HTTP and tokenizing then do not share a process with the ranks."""


def add_parser(parser: argparse.ArgumentParser) -> None:
    """The flags of ``narrows serve``."""
    add_engine_flags(parser, ranks=_RANKS, chosen=True)
    add_host_flags(parser)
    parser.add_argument("--layout", default=_DEFAULT["layout"], help="a named layout, or auto (default %(default)s)")
    add_limit_flags(parser)
    http = parser.add_argument_group("HTTP")
    http.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default %(default)s: this machine only)"
    )
    http.add_argument("--port", type=int, default=8000, help="port to listen on; 0: any free one (default %(default)s)")
    http.add_argument(
        "--api-key",
        action="append",
        metavar="KEY",
        help=f"accept only requests with this key; repeatable (default: ${_KEY_VARIABLE})",
    )
    http.add_argument(
        "--served-model-name",
        action="append",
        metavar="NAME",
        help="a name by which requests may ask for the model; repeatable",
    )
    http.add_argument(
        "--max-body-mb",
        type=float,
        default=_SERVER["max_body_bytes"] / _MB,
        metavar="MB",
        help="largest body (default %(default)g)",
    )
    http.add_argument(
        "--request-timeout",
        type=float,
        default=_SERVER["request_timeout_s"],
        metavar="S",
        help="longest time of a request (default %(default)g)",
    )
    http.add_argument(
        "--max-connections",
        type=int,
        metavar="N",
        help=f"connections at once (default {MAX_CONNECTIONS}, or as many as the limit of open files allows)",
    )
    http.add_argument(
        "--allow-host",
        action="append",
        metavar="HOST",
        help="accept requests for this Host; repeatable. Without a key, a server on loopback accepts only its own",
    )
    http.add_argument(
        "--allow-origin",
        action="append",
        metavar="ORIGIN",
        help="let web pages of this origin use the server (CORS); *: all; repeatable (default: none)",
    )
    http.add_argument(
        "--allow-priority",
        action="store_true",
        help="accept requests with a priority below 0, which are more urgent than normal",
    )
    http.add_argument(
        "--intake",
        choices=("process", "threads"),
        default="process",
        help="read bodies of more than 16 KB in their own process, or (to debug) in threads (default %(default)s)",
    )
    text = parser.add_argument_group("parsers of the model's text (auto: by the format of its chat template)")
    text.add_argument(
        "--tool-call-parser", default="auto", choices=TOOL_PARSERS, help="format of tool calls (default auto)"
    )
    text.add_argument(
        "--reasoning-parser", default="auto", choices=REASONING_PARSERS, help="format of reasoning (default auto)"
    )
    life = parser.add_argument_group("queue, start and end")
    life.add_argument(
        "--max-queue", type=int, default=1024, metavar="N", help="requests that may wait (default %(default)s)"
    )
    add_prompt_rows_flag(life)
    life.add_argument(
        "--drain-timeout",
        type=float,
        default=30.0,
        metavar="S",
        help="seconds that running requests get at the end (default %(default)g)",
    )
    life.add_argument(
        "--warmup-rows",
        type=int,
        default=_DEFAULT["warmup_rows"],
        metavar="N",
        help="warm up while idle: decode steps of 1 to N rows run once, so that later ones are fast from the first "
        "(default %(default)s; 0: no warm-up)",
    )
    add_old_spelling(life, "--rehearse-rows", "--warmup-rows", type=int)
    add_trace_flags(parser, "the steps between POST /start_profile and /stop_profile")
    watch = parser.add_argument_group("predicted and measured")
    watch.add_argument(
        "--drift-factor",
        type=float,
        default=DriftRule().factor,
        metavar="X",
        help="warn, once per plan-cache bucket, when its steps take more than X times, or less than 1/X of, the "
        "predicted time (default %(default)s)",
    )
    life.add_argument(
        "--no-restart",
        action="store_true",
        help="end with an error when a rank dies, instead of restarting the ranks; always so with --nnodes or torchrun",
    )


def run(args: argparse.Namespace) -> int:
    """Run ``narrows serve``; the ready line goes to standard output, everything else to standard error."""
    options = _options(args)
    _say_to_stderr()
    sys.setswitchinterval(_SWITCH_S)
    life = {name: getattr(args, name) for name in ("warmup_rows", "prompt_rows")}
    life["ranks"] = args.ranks or _RANKS
    engine = engine_options(args, layout=args.layout, **limit_options(args)) | life
    if (launch := launch_of(args, os.environ)) is not None:
        engine["launch"] = launch
    config = EngineConfig(model=args.model, **engine)
    drift, trace = DriftRule(factor=args.drift_factor), ServiceTrace(args.trace, args.trace_steps)
    if launch is not None and not launch.is_coordinator:
        return run_local_ranks(resolve(config))
    prepare_ranks(config)
    bound = bind(args.host, args.port)
    started = perf_counter()
    with bound, _sigterm_interrupts():
        hosts = hosts_to_check(bound.getsockname()[0], args.host, args.allow_host, has_key=bool(options.api_keys))
        options = replace(options, hosts=hosts, connections=_connection_limits(args.max_connections))
        resolved = resolve(config)
        for fact in resolved.facts:
            logging.getLogger("narrows.engine").warning("%s", fact)
        model = _served_model(args, resolved)
        restart = _may_restart(args, launch)
        service = EngineService(resolved, max_queue=args.max_queue, restart=restart, drift=drift, trace=trace)
        app = create_app(service, model, options)
        state = state_of(app)
        try:
            preparing = threading.Thread(target=state.prepare, name="narrows prepares", daemon=True)
            preparing.start()  # while the ranks load
            service.start()
            preparing.join()
            if service.evidence:
                logging.getLogger("narrows.engine").warning("%s", service.evidence)

            def ready() -> None:
                url = url_of(bound)
                chats = model.tokenizer is not None and model.tokenizer.has_chat_template
                curl = curl_line(url, model.names[0], has_key=bool(options.api_keys), chats=chats)
                seconds = perf_counter() - started
                where = f"{resolved.mesh}, {resolved.threads} thread(s) per rank"
                line = f"narrows: {model.names[0]} on {where} is ready at {url} ({seconds:.1f} s); try: {curl}"
                with suppress(OSError):  # no reader, or a full disk
                    print(line, flush=True)

            code = serve(app, service, bound, drain_timeout_s=args.drain_timeout, when_ready=ready)
            if service.failure:
                logging.getLogger("narrows.engine").error("error: %s", service.failure)
                return 1
            return code
        finally:
            state.close()
            service.close()


def _may_restart(args: argparse.Namespace, launch: Launch | None) -> bool:
    """Whether failed ranks are replaced. Those of other processes end with these, and cannot be started from here."""
    if args.no_restart or launch is None:
        return not args.no_restart
    by = "torchrun" if launch.by_torchrun else "--nnodes"
    logging.getLogger("narrows.engine").warning(
        "ranks started by %s are not restarted: if one dies, the server ends with an error, as with --no-restart", by
    )
    return False


def _say_to_stderr() -> None:
    """Send the log to standard error; if that is full or closed, the server continues."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("narrows: %(message)s"))
    handler.handleError = lambda record: None  # type: ignore[method-assign]
    log = logging.getLogger("narrows")
    log.handlers[:], log.propagate = [handler], False


def _options(args: argparse.Namespace) -> ServerOptions:
    for flag, value, least, most in (
        ("--drain-timeout", args.drain_timeout, 0, _DAY_S),
        ("--request-timeout", args.request_timeout, 0.001, _DAY_S),
        ("--max-body-mb", args.max_body_mb, 0.001, 1 << 20),
        ("--max-queue", args.max_queue, 1, 1 << 30),
        ("--max-connections", 1 if args.max_connections is None else args.max_connections, 1, 1 << 20),
    ):
        if not least <= value <= most:
            raise ConfigError(f"{flag} is {value:g}; it must be between {least:g} and {most}")
    keys = args.api_key or [key for key in [os.environ.get(_KEY_VARIABLE)] if key]
    return ServerOptions(
        origins=checked_origins(args.allow_origin),
        api_keys=tuple(keys),
        max_body_bytes=int(args.max_body_mb * _MB),
        request_timeout_s=args.request_timeout,
        allow_priority=args.allow_priority,
        tool_call_parser=args.tool_call_parser,
        reasoning_parser=args.reasoning_parser,
        body_process=args.intake == "process",
    )


def _connection_limits(given: int | None) -> ConnectionLimits:
    connections, warning = connections_for(given, raise_descriptor_limit())
    if warning:
        logging.getLogger("narrows.server").warning("%s", warning)
    return ConnectionLimits(max_connections=connections, reserved_slots=RESERVED_SLOTS)


def _served_model(args: argparse.Namespace, resolved: Resolved) -> ServedModel:
    text = load_model_text(resolved.engine_config.model)
    if text.lack:
        logging.getLogger("narrows.engine").warning("%s; requests must send token ids", text.lack)
    more = text.tokenizer.eos_ids if text.tokenizer is not None else frozenset()
    return ServedModel(
        names=tuple(args.served_model_name or [name_of(Path(resolved.engine_config.model))]),
        tokenizer=text.tokenizer,
        generation=text.generation,
        max_context=resolved.limits.max_context,
        vocab_size=resolved.config.vocab_size,
        eos_ids=more | {*resolved.config.eos_token_id, *text.generation.eos_token_id},
        created=int(time()),
    )


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Until the server handles signals itself, let SIGTERM end it as Ctrl-C does, so that everything is closed."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
