"""Every compiled function that works on tensors says whether a tape repeats it: who says nothing would be missed."""

from __future__ import annotations

import re
from pathlib import Path

import narrows.native

SOURCES = Path(narrows.native.__file__).parent / "csrc"
FUNCTION = re.compile(r"^NARROWS_EXPORT (?:void|int) (narrows_\w+)\((.*?)\) \{\n(.*?)^\}", re.S | re.M)
NOT_WORK = {"narrows_shm_layout", "narrows_tape_end", "narrows_tape_free", "narrows_tape_run"}


def test_functions_that_take_arguments_are_taped_or_say_that_they_are_not() -> None:
    seen = set()
    for file in SOURCES.glob("*.cpp"):
        for name, arguments, body in FUNCTION.findall(file.read_text()):
            if not arguments.strip() or name in NOT_WORK:
                continue
            seen.add(name)
            given = ", ".join(argument.split()[-1].lstrip("*&") for argument in arguments.split(","))
            call = re.search(r"NARROWS_TAPED\((\w+)\((.*?)\)\);", body, re.S)
            if call:
                assert call[1] == name and " ".join(call[2].split()) == given, name
            else:
                assert body.lstrip().startswith("NARROWS_NOT_TAPED") or f"tape({name}, wire, call," in body, name
    assert {"narrows_linear", "narrows_experts", "narrows_mla_decode", "narrows_shm_reduce"} <= seen
