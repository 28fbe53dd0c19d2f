"""The help of every command: each flag has a description, and JSON output works alike everywhere."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from importlib import import_module

import pytest

from narrows.cli.main import COMMANDS

WITHOUT_HELP = {
    f"--{name}" for name in ("temperature", "top-k", "top-p", "min-p", "seed", "min-tokens", "logprobs")
} | {f"--{name}" for name in ("repetition-penalty", "presence-penalty", "frequency-penalty", "prompt-logprobs")}
"""Of `narrows generate`: the field's names."""


def parsers() -> Iterator[argparse.ArgumentParser]:
    """Of every command, and of every kind of benchmark."""
    for name, module, _ in COMMANDS:
        parser = argparse.ArgumentParser(prog=name)
        import_module(module).add_parser(parser)
        kinds = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        for kind in kinds[0].choices.values() if kinds else ():
            kind.add_flags(kind)
            yield kind
        if not kinds:
            yield parser


@pytest.mark.parametrize("parser", list(parsers()), ids=lambda parser: parser.prog)
def test_each_flag_has_a_help_of_words(parser: argparse.ArgumentParser) -> None:
    for action in parser._actions:
        if not action.help:
            assert parser.prog == "generate" and action.option_strings[0] in WITHOUT_HELP, action
        elif action.help is not argparse.SUPPRESS:  # an old spelling
            assert action.help[0].isalnum() or action.help[0] == "'", f"{action.option_strings}: {action.help}"
    assert parser.format_help()


def test_results_are_had_as_json_in_one_way() -> None:
    with_tables = {"plan", "simulate", "advise", "verify", "eval", "info"}
    found = {
        parser.prog: {flag for action in parser._actions for flag in action.option_strings} for parser in parsers()
    }
    of_bench = {name for name in found if name.startswith("bench ")}
    assert len(of_bench) == 6
    for name, flags in found.items():
        assert (name in with_tables | of_bench) == ({"--json", "--out"} <= flags), name
