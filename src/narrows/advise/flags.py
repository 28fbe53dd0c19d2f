"""The flags that serving engines take, from lists in ``data`` that ``benchmarks/engine_flags.py`` makes.

A command line is checked against its engine's list before it is printed, so that no flag of another release gets in.
"""

from __future__ import annotations

import json
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any

__all__ = ["FLAG_LISTS", "Flag", "FlagList", "flag_list"]

FLAG_LISTS = ("sglang", "vllm", "trtllm")
"""The engines that there is a list of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """One flag. ``switch``: it takes no value. ``choices``: the values that it takes; empty: any."""

    name: str
    aliases: tuple[str, ...] = ()
    switch: bool = False
    choices: tuple[str, ...] = ()
    default: str | int | float | bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FlagList:
    """All flags of one engine's server. ``command``: what starts it. ``flags``: by name and by alias."""

    engine: str
    title: str
    version: str
    command: str
    flags: Mapping[str, Flag]

    def fault(self, name: str, value: object = None) -> str:
        """Why the server would not take this flag with this value (None: without one); empty if it would."""
        flag = self.flags.get(name)
        if flag is None:
            return f"{self.title} {self.version} has no {name}"
        if flag.switch != (value is None):
            return f"{name} of {self.title} {self.version} takes {'no' if flag.switch else 'a'} value"
        if flag.choices and str(value) not in flag.choices:
            return f"{name} of {self.title} {self.version} is one of {', '.join(flag.choices)}, not {value}"
        return ""


def flag_list(engine: str) -> FlagList:
    """The list of ``engine``, one of :data:`FLAG_LISTS`."""
    return _flag_list(engine)


@cache
def _flag_list(engine: str) -> FlagList:
    assert engine in FLAG_LISTS, f"there is no list of {engine}"
    data = pkgutil.get_data(__package__, f"data/{engine}.json")
    assert data is not None, f"data/{engine}.json is missing from the package"
    document: dict[str, Any] = json.loads(data)
    flags: dict[str, Flag] = {}
    for name, entry in document["flags"].items():
        flag = Flag(
            name=name,
            aliases=tuple(entry.get("aliases", ())),
            switch=entry.get("switch", False),
            choices=tuple(map(str, entry.get("choices", ()))),
            default=entry.get("default"),
        )
        flags |= dict.fromkeys((name, *flag.aliases), flag)
    return FlagList(
        engine=document["engine"],
        title=document["title"],
        version=document["version"],
        command=document["command"],
        flags=MappingProxyType(flags),
    )
