"""Packaging: ranges that the pinned versions satisfy, extras, and licences beside the data."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from narrows.cli.main import main

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]


def requirements() -> list[Requirement]:
    lines = [*PROJECT["dependencies"], *(line for lines in EXTRAS.values() for line in lines)]
    return [each for each in map(Requirement, lines) if each.name != "narrows"]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in found.items()}


def test_each_requirement_is_a_range_that_holds_its_pinned_version() -> None:
    pinned = pins()
    for requirement in requirements():
        kinds = {spec.operator for spec in requirement.specifier}
        assert kinds == {">=", "<"}, f"{requirement} is no range"
        assert requirement.specifier.contains(pinned.pop(canonicalize_name(requirement.name))), requirement
    assert not pinned, "pinned, and asked for by nothing"


def test_torch_is_pinned_to_one_version() -> None:
    assert len(SpecifierSet(f"=={pins()['torch']}")) == 1 and pins()["torch"] == "2.13.0"


def test_the_bare_package_has_no_torch_and_serve_includes_the_engine() -> None:
    bare = {Requirement(line).name for line in PROJECT["dependencies"]}
    assert not bare & {"torch", "numpy", "safetensors", "tokenizers", "fastapi", "uvicorn"}
    assert "narrows[engine]" in EXTRAS["serve"]


def test_each_dependency_has_its_reason() -> None:
    page = (ROOT / "docs" / "dependencies.md").read_text()
    reasons = {name for row in re.findall(r"^\| ([^|]*) \|", page, re.MULTILINE) for name in row.split(", ")}
    assert not {each.name for each in requirements()} - reasons


def test_the_licence_and_the_notice_of_prices_are_packaged() -> None:
    licence = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in licence and "END OF TERMS AND CONDITIONS" in licence
    for file in PROJECT["license-files"]:
        assert (ROOT / file).is_file(), file
    tables = {path.name for path in (ROOT / "src/narrows/cost/data").glob("*.csv")}
    assert tables and all(name in (ROOT / "src/narrows/cost/data/NOTICE").read_text() for name in tables)


@pytest.mark.parametrize(
    ("command", "absent", "extra"),
    [
        ("generate", "torch", "engine"),
        ("serve", "torch", "serve"),
        ("serve", "uvicorn", "serve"),
        ("convert", "gguf", "engine"),
        ("bench layer", "torch", "engine"),
    ],
)
def test_a_command_without_its_extra_names_it_in_one_line(command: str, absent: str, extra: str) -> None:
    said = f"narrows {command.split()[0]} needs {absent}, which is not installed: pip install 'narrows[{extra}]'"
    code = f"import sys; sys.modules[{absent!r}] = None; from narrows.cli.main import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, *command.split(), "m"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"narrows: error: {said}\n")


def test_a_load_is_sent_without_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; from narrows.cli.main import main; sys.exit(main())"
    line = [sys.executable, "-c", code, "bench", "serve", "--url", "http://127.0.0.1:9"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "no OpenAI-compatible server answers at http://127.0.0.1:9" in done.stderr


def test_the_command_prints_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"narrows {version('narrows')}\n"


def test_the_version_has_a_released_section_below_an_unreleased_one() -> None:
    heads = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heads[0] == "[Unreleased]"
    assert re.fullmatch(rf"\[{re.escape(PROJECT['version'])}\] - \d{{4}}-\d\d-\d\d", heads[1])
