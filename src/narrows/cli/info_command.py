"""``narrows info``: versions, machine, compiled targets, profiles and transports, for reports and first looks.

Imports no torch: what it prints of it is read from its files.
"""

from __future__ import annotations

import argparse
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from narrows.calibrate.machine import machine
from narrows.cli.console import console
from narrows.cli.output import add_output_flags, check_output, put_document
from narrows.cost.environment import no_shared_memory, this_machine
from narrows.cost.profile import profiles_folder, read_profile
from narrows.engine.free_memory import free_memory, total_memory
from narrows.errors import ConfigError
from narrows.native import Status, status

__all__ = ["add_parser", "gpus", "profiles", "run", "target_lines", "transports"]

_NO_TORCH = "there is no torch: pip install 'narrows[engine]'"
_GIB = 1 << 30
_DRIVER_S = 5.0


def add_parser(parser: argparse.ArgumentParser) -> None:
    """The flags of ``narrows info``."""
    add_output_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Run ``narrows info``."""
    check_output(args)
    compiled, cards, torch = status(), gpus(), _torch()
    document = {
        "narrows": _version("narrows"),
        "python": platform.python_version(),
        "torch": torch,
        "extras": _extras(),
        "compiled_code": {
            "running": compiled.running,
            "why_none": compiled.why_none,
            "targets": [asdict(line) for line in target_lines(compiled)],
        },
        "machine": {
            **machine(),
            "libc": " ".join(platform.libc_ver()).strip(),
            "memory_gib": round(total_memory() / _GIB, 1),
            "free_gib": round(free_memory() / _GIB, 1),
            "gpus": cards,
        },
        "transports": transports(torch, len(cards)),
        "profiles": {"folder": str(profiles_folder()), "found": profiles(cards[0]["name"] if cards else "")},
    }
    if not args.json:
        _print(document)
    put_document(args, document)
    return 0


# -- what there is -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetLine:
    """A target of the compiled code. ``why``: why it does not run, or that it is forced; empty if it is the best
    one."""

    name: str
    compiled: bool
    runs: bool
    missing: tuple[str, ...]
    """CPU features that it needs and this CPU, or the system on it, does not have."""
    why: str


def target_lines(compiled: Status) -> list[TargetLine]:
    """Every target of the sources, the best first."""
    there = {target.name: target.missing for target in compiled.compiled}
    names = [*there, *(name for name in compiled.known if name not in there)]
    lines, passed = [], False
    for name in names:
        runs, missing = name == compiled.running, there.get(name, ())
        passed |= runs
        if name not in there:
            why = f"not compiled: {compiled.why_none}"
        elif missing:
            why = f"this CPU lacks {', '.join(missing)}"
        elif runs:
            why = f"NARROWS_TARGET={name}" if compiled.forced else ""
        elif not compiled.running:
            why = compiled.why_none.partition(": ")[0]  # the switch or the target that the environment asks for
        elif passed:
            why = f"{compiled.running} is better"
        else:
            why = f"NARROWS_TARGET={compiled.forced} asks for another"
        lines.append(TargetLine(name=name, compiled=name in there, runs=runs, missing=missing, why=why))
    return lines


def gpus() -> list[dict[str, Any]]:
    """Name and memory of each NVIDIA GPU, as its driver says; none where there is no driver, or it does not answer.

    A GPU that shares the host's memory has none of its own (None)."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    ask = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(ask, capture_output=True, text=True, timeout=_DRIVER_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    lines = (line.rpartition(",") for line in output.splitlines() if "," in line)
    return [
        {"name": name.strip(), "memory_gib": round(int(mib) / 1024, 1) if mib.strip().isdigit() else None}
        for name, _, mib in lines
    ]


def profiles(card: str) -> list[dict[str, Any]]:
    """This user's profiles, and whether each fits this machine for ranks of its number, threads and world."""
    found = []
    for path in sorted(profiles_folder().glob("*.json")):
        try:
            profile = read_profile(path)
        except ConfigError as error:
            found.append({"file": path.name, "fits": False, "why": str(error)})
            continue
        fits = profile.fits
        try:
            here = this_machine(
                ranks=fits.ranks, threads=fits.threads, world=fits.world, card=card if fits.card else ""
            )
            why = fits.misfit(replace(here, world=fits.world))
        except ConfigError as error:  # NARROWS_TARGET names what cannot run
            why = str(error)
        found.append(
            {
                "file": path.name,
                "fits": not why,
                "why": why,
                "ranks": fits.ranks,
                "threads": fits.threads,
                "world": fits.world,
                "dtypes": list(profile.dtypes),
                "made": str(profile.made.get("date", "")),
            }
        )
    return found


def transports(torch: dict[str, Any] | None, num_gpus: int) -> list[dict[str, Any]]:
    """How ranks can exchange here, by the names that ``narrows calibrate --transport`` takes."""
    try:
        shm = no_shared_memory()
    except ConfigError as error:  # NARROWS_TARGET names what cannot run
        shm = str(error)
    if torch is not None and not torch["cuda"]:
        nccl = f"torch {torch['version']} is a build for CPUs"
    else:
        nccl = "" if num_gpus else "no NVIDIA driver says that there is a GPU"
    what = {
        "shm": ("processes of one host, through shared memory", shm),
        "threads": ("threads of one process", ""),
        "gloo": ("processes of one host or several, over TCP", ""),
        "nccl": ("GPUs", nccl),
    }
    return [
        {"name": name, "among": among, "possible": torch is not None and not why, "why": why if torch else _NO_TORCH}
        for name, (among, why) in what.items()
    ]


def _torch() -> dict[str, Any] | None:
    """torch's version, and that of CUDA that it was built for (empty: for CPUs), without importing it."""
    found = _version("torch")
    if not found:
        return None
    try:
        spec = find_spec("torch")
        folder = Path(spec.origin).parent if spec is not None and spec.origin else Path()
        built = re.search(
            r"^cuda\b[^=]*= *'([^']+)'", (folder / "version.py").read_text(encoding="utf-8"), re.MULTILINE
        )
    except (OSError, ValueError):
        built = None
    return {"version": found, "cuda": built.group(1) if built else ""}


def _extras() -> dict[str, list[str]]:
    """By extra, those of its packages that are not installed."""
    missing: dict[str, list[str]] = {}
    try:
        lines = requires("narrows") or []
    except PackageNotFoundError:
        return {}
    for line in lines:
        extra, name = re.search(r"extra == ['\"](\w+)['\"]", line), re.match(r"[\w.-]+", line)
        if extra is None or name is None or extra.group(1) == "dev":
            continue
        lacking = missing.setdefault(extra.group(1), [])
        if not _version(name.group()):
            lacking.append(name.group())
    return missing


def _version(package: str) -> str:
    """Empty: it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


# -- tables ------------------------------------------------------------------------------------------------------------


def _print(document: dict[str, Any]) -> None:
    out = console()
    _put(out, ("", ""), _about(document))
    targets = document["compiled_code"]["targets"]
    _put(out, ("target", "here", "why"), [(t["name"], _state(t), t["why"]) for t in targets])
    ways = document["transports"]
    rows = [(w["name"], "yes" if w["possible"] else "no", w["why"] or w["among"]) for w in ways]
    _put(out, ("transport", "possible", "among, or why not"), rows)
    kept = document["profiles"]
    if not kept["found"]:
        out.print(f"no profiles in {kept['folder']}; narrows calibrate makes one", markup=False, soft_wrap=True)
        return
    out.print(f"profiles in {kept['folder']}", markup=False, soft_wrap=True)
    _put(out, ("file", "fits", "ranks that it is for, or why it does not fit"), [_profile(f) for f in kept["found"]])


def _put(out: Console, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(box=None, show_header=any(columns), pad_edge=False)
    for column in columns[:-1]:
        table.add_column(column, no_wrap=True)
    table.add_column(columns[-1], overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    out.print(table)
    out.print()


def _about(document: dict[str, Any]) -> list[tuple[str, str]]:
    torch, where, compiled = document["torch"], document["machine"], document["compiled_code"]
    built = f"built for {'CUDA ' + torch['cuda'] if torch['cuda'] else 'CPUs'}" if torch else ""
    rows = [
        ("narrows", document["narrows"] or "not installed as a package"),
        ("Python", document["python"]),
        ("torch", f"{torch['version']}, {built}" if torch else f"not installed: {_NO_TORCH.partition(': ')[2]}"),
    ]
    for extra, missing in document["extras"].items():
        lack = f"lacks {', '.join(missing)}: pip install 'narrows[{extra}]'"
        rows.append((f"narrows[{extra}]", lack if missing else "installed"))
    rows += [
        ("compiled code", f"kernels for {compiled['running']}" if compiled["running"] else compiled["why_none"]),
        ("system", ", ".join(filter(None, (where["system"], where["libc"])))),
        ("CPU", f"{where['cpu']}, {where['cores']} core(s) for this process"),
        ("its features", " ".join(where["features"]) or "none that narrows asks for"),
        ("memory", f"{where['memory_gib']} GiB, {where['free_gib']} free"),
    ]
    cards = [card["name"] + (f", {card['memory_gib']} GiB" if card["memory_gib"] else "") for card in where["gpus"]]
    return [*rows, ("GPUs", "; ".join(cards) or "none")]


def _state(target: dict[str, Any]) -> str:
    if target["runs"]:
        return "runs"
    if not target["compiled"]:
        return "is absent"
    return "cannot run" if target["missing"] else "could run"


def _profile(found: dict[str, Any]) -> tuple[str, str, str]:
    if not found["fits"]:
        return found["file"], "no", found["why"]
    words = [f"{found['ranks'] or 'any number of'} rank(s)"]
    words += [f"{found['threads']} thread(s) each"] if found["threads"] else []
    words += [found["world"]] if found["world"] else []
    words += [" ".join(found["dtypes"])] if found["dtypes"] else []
    words += [f"made {found['made']}"] if found["made"] else []
    return found["file"], "yes", ", ".join(words)
