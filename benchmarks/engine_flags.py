"""Builds the lists of flags in ``src/narrows/advise/data`` from the source of a serving engine.

    python benchmarks/engine_flags.py sglang SOURCE --version 0.5.23 --out src/narrows/advise/data/sglang.json

SOURCE is a checkout of the engine, or its unpacked wheel. Only names, aliases, choices and plain defaults are taken,
never sentences. Nothing of the engine is imported or run. Read are:

sglang   srt/arg_groups/fields/*.py and choices.py (Annotated fields), and the deprecated flags of srt/server_args.py
vllm     engine/arg_utils.py (add_argument), config/*.py (types of the fields), entrypoints/common/cli_args.py
trtllm   tests/unittest/api_stability/references/trtllm_serve_cli.yaml, the engine's own list of `trtllm-serve serve`
"""

from __future__ import annotations

import argparse
import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

Flag = dict[str, Any]
Flags = dict[str, Flag]

COMMANDS = {
    "sglang": ("SGLang", "sglang serve"),
    "vllm": ("vLLM", "vllm serve"),
    "trtllm": ("TensorRT-LLM", "trtllm-serve"),
}


def trees(files: Iterator[Path]) -> Iterator[ast.Module]:
    for file in sorted(files):
        yield ast.parse(file.read_text(encoding="utf-8"))


def literal(node: ast.expr | None, names: Mapping[str, Any]) -> Any:
    """The value of an expression of literals and known names; None if it is anything else."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        parts = literal(node.left, names), literal(node.right, names)
        return None if None in parts else [*parts[0], *parts[1]]
    try:
        return ast.literal_eval(node) if node is not None else None
    except (ValueError, TypeError):
        return None


def constants(modules: Iterator[ast.Module]) -> dict[str, Any]:
    """Lists and ``Literal`` types that are assigned to a name, at the top of the modules."""
    found: dict[str, Any] = {}
    for module in modules:
        for node in module.body:
            target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
            if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(target, ast.Name) and node.value is not None:
                value = choices_of(node.value, found)
                value = literal(node.value, found) if value is None else value
                if isinstance(value, list | tuple | set | frozenset):
                    found[target.id] = list(value)
    return found


def choices_of(annotation: ast.expr, names: Mapping[str, Any]) -> list[Any] | None:
    """The values that a type annotation allows, where it says them (``Literal``, alone or or None)."""
    if isinstance(annotation, ast.Name):
        return names.get(annotation.id)
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        sides = [side for side in (annotation.left, annotation.right) if not _is_none(side)]
        found = [choices_of(side, names) for side in sides]
        return found[0] if len(found) == 1 else None
    if isinstance(annotation, ast.Subscript) and isinstance(annotation.value, ast.Name):
        if annotation.value.id == "Literal":
            parts = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
            return [part.value for part in parts if isinstance(part, ast.Constant)]
        if annotation.value.id == "Optional":
            return choices_of(annotation.slice, names)
    return None


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def is_switch(annotation: ast.expr) -> bool:
    """Whether a field is a bool, so that its flag takes no value."""
    return bool(re.fullmatch(r"(Optional\[)?bool(\s*\|\s*None)?\]?", ast.unparse(annotation)))


def entry(aliases: list[str], choices: list[Any] | None, default: Any, switch: bool) -> Flag:
    made: Flag = {}
    if aliases:
        made["aliases"] = aliases
    if choices:
        made["choices"] = sorted(choices, key=str)
    if switch:
        made["switch"] = True
    elif isinstance(default, str | int | float) and default != "":
        made["default"] = default
    return made


def keywords(call: ast.Call, names: Mapping[str, Any]) -> dict[str, Any]:
    return {word.arg: literal(word.value, names) for word in call.keywords if word.arg}


def added(call: ast.Call, names: Mapping[str, Any]) -> tuple[str, Flag] | None:
    """The flag of a call of ``add_argument``, without what it takes from elsewhere."""
    if not (isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument"):
        return None
    words = [arg.value for arg in call.args if isinstance(arg, ast.Constant) and str(arg.value).startswith("-")]
    if not words:
        return None
    name = max(words, key=lambda word: word.startswith("--"))
    given = keywords(call, names)
    action = next((ast.unparse(word.value) for word in call.keywords if word.arg == "action"), "")
    switch = "store_true" in action or "StoreTrue" in action
    choices = given.get("choices")
    return name, entry([word for word in words if word != name], choices, given.get("default"), switch)


def calls(module: ast.Module) -> Iterator[ast.Call]:
    return (node for node in ast.walk(module) if isinstance(node, ast.Call))


def sglang(source: Path) -> Flags:
    root = next(path for path in (source / "python/sglang/srt", source / "sglang/srt") if path.is_dir())
    names = constants(trees(iter([root / "arg_groups/choices.py"])))
    flags: Flags = {}
    for module in trees((root / "arg_groups/fields").glob("*.py")):
        for node in ast.walk(module):
            if isinstance(node, ast.AnnAssign) and isinstance(node.annotation, ast.Subscript):
                found = _annotated(node, names)
                if found is not None:
                    flags[found[0]] = found[1]
    for call in calls(ast.parse((root / "server_args.py").read_text(encoding="utf-8"))):
        if (found := added(call, names)) is not None:
            flags.setdefault(*found)
    return flags


def _annotated(node: ast.AnnAssign, names: Mapping[str, Any]) -> tuple[str, Flag] | None:
    """The flag of one field ``name: A[type, "help" or Arg(...)] = default``."""
    annotation = node.annotation
    assert isinstance(annotation, ast.Subscript)
    if ast.unparse(annotation.value) != "A" or not isinstance(annotation.slice, ast.Tuple):
        return None
    kind, *meta = annotation.slice.elts
    given: dict[str, Any] = {}
    action = ""
    for part in meta:
        if isinstance(part, ast.Call) and ast.unparse(part.func) == "Arg":
            given = keywords(part, names)
            action = next((ast.unparse(word.value) for word in part.keywords if word.arg == "action"), "")
    if given.get("no_cli") or not isinstance(node.target, ast.Name):
        return None
    name = given.get("cli_name") or "--" + node.target.id.replace("_", "-")
    aliases = list(given.get("aliases") or [])
    switch = is_switch(kind) or "BooleanOptional" in action
    if "BooleanOptional" in action:
        aliases.append("--no-" + name.removeprefix("--"))
    choices = given.get("choices") or choices_of(kind, names)
    return name, entry(aliases, list(choices) if choices else None, literal(node.value, names), switch)


def vllm(source: Path) -> Flags:
    root = source / "vllm"
    modules = list(trees((root / "config").glob("*.py")))
    names = constants(iter(modules))
    fields: dict[str, tuple[ast.expr, ast.expr | None]] = {}
    for module in modules:
        for node in ast.walk(module):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                fields.setdefault(node.target.id, (node.annotation, node.value))
    flags: Flags = {}
    for call in calls(ast.parse((root / "engine/arg_utils.py").read_text(encoding="utf-8"))):
        if (found := added(call, names)) is not None:
            name, flag = found
            field = re.search(r"kwargs\['(\w+)'\]", ast.unparse(call))
            if field is not None and field[1] in fields:
                flag = _of_field(name, flag, *fields[field[1]], names)
            flags[name] = flag
    frontend = ast.parse((root / "entrypoints/common/cli_args.py").read_text(encoding="utf-8"))
    for call in calls(frontend):
        if (found := added(call, names)) is not None:
            flags.setdefault(*found)
    for node in ast.walk(frontend):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = "--" + node.target.id.replace("_", "-")
            flags.setdefault(name, _of_field(name, {}, node.annotation, node.value, names))
    return flags


def _of_field(name: str, flag: Flag, annotation: ast.expr, value: ast.expr | None, names: Mapping[str, Any]) -> Flag:
    """``flag`` with what the field of a config says of it: vLLM's bools have a flag with ``--no-`` too."""
    switch = is_switch(annotation)
    aliases = [*flag.get("aliases", []), *(["--no-" + name.removeprefix("--")] if switch else [])]
    if isinstance(value, ast.Call):  # Field(default=...)
        value = next((word.value for word in value.keywords if word.arg == "default"), None)
    return entry(aliases, flag.get("choices") or choices_of(annotation, names), literal(value, names), switch)


def trtllm(source: Path) -> Flags:
    """Of the engine's reference list, which is YAML of one form: two spaces for each level."""
    text = (source / "tests/unittest/api_stability/references/trtllm_serve_cli.yaml").read_text(encoding="utf-8")
    served = re.split(r"(?m)^  serve:$", text)[1]
    served = re.split(r"(?m)^  \w+:$", served)[0]
    flags: Flags = {}
    for block in re.split(r"(?m)^      \w+:$", served)[1:]:
        said = dict(re.findall(r"(?m)^        (\w+): (.+)$", block))
        words = re.findall(r'(?m)^        - "(.+)"$', block)
        name = min((word for word in words if not word.startswith("--no-")), key=len)
        choices = re.search(r"Choice\((\[.*\])\)", said["type"])
        default = {"null": None, "true": True, "false": False}.get(said["default"], _number(said["default"]))
        flags[name] = entry(
            [word for word in words if word != name],
            ast.literal_eval(choices[1]) if choices else None,
            default,
            said["is_flag"] == "true",
        )
    return flags


def _number(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


READERS: Mapping[str, Callable[[Path], Flags]] = {"sglang": sglang, "vllm": vllm, "trtllm": trtllm}


def document(engine: str, version: str, flags: Flags) -> str:
    """One flag a line, sorted by name."""
    title, command = COMMANDS[engine]
    head = {"engine": engine, "title": title, "version": version, "command": command}
    lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in head.items()]
    listed = ",\n".join(f"    {json.dumps(name)}: {json.dumps(flags[name])}" for name in sorted(flags))
    return "{\n" + ",\n".join([*lines, '  "flags": {\n' + listed + "\n  }"]) + "\n}\n"


def main() -> None:
    """Write one list."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=tuple(READERS))
    parser.add_argument("source", type=Path)
    parser.add_argument("--version", required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.write_text(document(args.engine, args.version, READERS[args.engine](args.source)), encoding="utf-8")


if __name__ == "__main__":
    main()
