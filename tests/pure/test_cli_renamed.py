"""Old spellings of flags."""

from __future__ import annotations

import argparse

import pytest

from narrows.cli.renamed import add_old_spelling


def test_an_old_spelling_sets_the_new_flag_with_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--new-rows", type=int, default=7)
    add_old_spelling(parser, "--old-rows", "--new-rows", type=int)
    assert parser.parse_args([]).new_rows == 7 and parser.parse_args(["--new-rows", "3"]).new_rows == 3
    assert not capsys.readouterr().err
    assert parser.parse_args(["--old-rows", "5"]).new_rows == 5
    assert capsys.readouterr().err == "--old-rows is now --new-rows; the old spelling ends with the next release\n"
    assert "--old-rows" not in parser.format_help()
