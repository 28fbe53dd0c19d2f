"""Renders chat templates as transformers does. Knows jinja, not tokens.

A template is a program from the checkpoint, so it runs in jinja's immutable sandbox and sees plain JSON types only.
Settings, filters and globals follow transformers 5.23 (`utils/chat_template_utils.py`), since templates rely on them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

__all__ = ["compile_template", "plain"]


def compile_template(source: str) -> jinja2.Template:
    """The template, ready to render; raises `jinja2.TemplateError` when it is not valid jinja."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _TemplateDict(),
        "namespace": _TemplateNamespace,
    }
    return environment.from_string(source)


def plain(value: Any) -> Any:
    """``value`` rebuilt of exact JSON types, so that a template meets no object with methods of its own.

    Mappings become dicts and sequences lists; anything else becomes its type's name in angle brackets.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    for kind in (str, int, float):
        if isinstance(value, kind):  # a subclass, such as an enum: keep the value, drop what it can do
            return getattr(kind, "__str__" if kind is str else f"__{kind.__name__}__")(value)
    return f"<{type(value).__name__}>"


class _GenerationBlock(Extension):
    """``{% generation %}...{% endgeneration %}`` marks the assistant's text for training; here it only renders it."""

    tags = frozenset({"generation"})  # type: ignore[assignment]  # jinja says set, and only reads it

    def parse(self, parser: Parser) -> nodes.Node:
        """A scope around the block's body."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _TemplateDict:
    """``dict(...)`` and ``dict.fromkeys(...)``, without the type behind them."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """As `dict.fromkeys`."""
        return dict.fromkeys(*args)


class _TemplateNamespace(jinja2.utils.Namespace):
    """``namespace(...)`` that refuses names with a leading underscore, as they lead out of the sandbox."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # without `self`, so that namespace(self=...) works, as in jinja
        self, rest = args[0], args[1:]
        values = dict(*rest, **kwargs)
        for name in values:
            _refuse_private(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a chat template may not set {name!r} on a namespace")


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # jinja's own filter escapes HTML, which would change the prompt
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
