"""The sources of comm: transports have methods for what they support, so no code checks their type."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import narrows

SOURCES = sorted(Path(narrows.__file__).parent.rglob("*.py"))
TYPES = {"Communicator", "Transport", "ThreadTransport", "ShmTransport", "GlooTransport", "NcclTransport"}
COMM = [path for path in SOURCES if path.parent.name == "comm"]


def names(tree: ast.AST) -> set[str]:
    nodes = list(ast.walk(tree))
    return {node.id for node in nodes if isinstance(node, ast.Name)} | {
        node.attr for node in nodes if isinstance(node, ast.Attribute)
    }


def calls(node: ast.AST, *functions: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in functions


def questions(source: str) -> list[tuple[int, set[str]]]:
    """(line, names) of each check of a type: isinstance, issubclass, type(x) is ..., class patterns."""
    found = []
    for node in ast.walk(ast.parse(source)):
        compares = isinstance(node, ast.Compare) and any(calls(side, "type") for side in (node.left, *node.comparators))
        if compares or calls(node, "isinstance", "issubclass") or isinstance(node, ast.MatchClass):
            found.append((node.lineno, names(node)))
    return found


@pytest.mark.parametrize(
    "line",
    [
        "if isinstance(transport, ShmTransport): pass",
        "found = type(comm) is Communicator",
        "if issubclass(kind, comm.Transport): pass",
        "match transport:\n    case ShmTransport(): pass",
    ],
)
def test_an_isinstance_check_is_found(line: str) -> None:
    ((_, used),) = questions(line)
    assert used & {"ShmTransport", "Communicator", "Transport"}


def test_comm_has_no_isinstance_checks() -> None:
    assert len(COMM) > 10
    asked = {path.name: found for path in COMM if (found := questions(path.read_text()))}
    assert not asked


def test_no_code_checks_the_type_of_a_communicator_or_transport() -> None:
    for path in SOURCES:
        for line, used in questions(path.read_text()):
            kinds = used & {
                "Communicator",
                "Transport",
                "ThreadTransport",
                "ShmTransport",
                "GlooTransport",
                "NcclTransport",
            }
            assert not kinds, f"{path}:{line} asks for {kinds}"
