"""The help of every command: each flag has a description, and JSON output works alike everywhere."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from importlib import import_module

import pytest

from narrows.cli.main import COMMANDS, main, parse


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
        assert action.help, action
        if action.help is not argparse.SUPPRESS:  # an old spelling
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


ENGINE_COMMANDS = [name.split() for name in ("generate", "serve", "verify", "eval", "bench layer", "bench layout")]
RENAMED = [
    (["calibrate"], "--ranks", "--num-ranks", "3"),
    (["calibrate"], "--world", "--transport", "threads"),
    *((command, "--timeout", "--rank-timeout", "3") for command in ENGINE_COMMANDS),
]


@pytest.mark.parametrize(("command", "old", "new", "value"), RENAMED, ids=lambda each: "".join(each))
def test_an_old_spelling_works_and_warns(
    command: list[str], old: str, new: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    field, model = new.lstrip("-").replace("-", "_"), ["narrows-demo"] if command != ["calibrate"] else []
    needed = ["--rows", "8"] if command[0] == "bench" else []
    values = []
    for flag in (new, old):
        _, args = parse([*command, *model, *needed, flag, value])
        values.append(getattr(args, field))
        said = capsys.readouterr().err
        assert said == ("" if flag == new else f"{old} is now {new}; the old spelling ends with the next release\n")
    assert values[0] == values[1] and str(values[0]) in (value, f"{value}.0")
    parser = next(each for each in parsers() if each.prog == " ".join(command))
    assert new in parser.format_help() and f"{old} " not in parser.format_help().replace(new, "")


@pytest.mark.parametrize("command", ENGINE_COMMANDS, ids=" ".join)
@pytest.mark.parametrize(("name", "kind"), [("cuda", "cuda"), ("cuda:0", "cuda"), ("gpu", "cuda"), ("cpu", "cpu")])
def test_a_kind_of_device_is_refused_with_the_flag_for_it(
    command: list[str], name: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = {"generate": ["--prompt", "w"], "bench": ["--rows", "8"]}.get(command[0], [])
    assert main([*command, "org/nobody-has-fetched-this", *needed, "--device", name]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"narrows: error: --device {name}: ") and said.endswith(f"say --run-on {kind}\n")
    assert said.count("\n") == 1
