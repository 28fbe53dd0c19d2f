"""Attacks by grammars: forms that take long to compile, long to start, or long amid the text."""

from __future__ import annotations

import asyncio
from typing import Any

from hostile_load.attacker import CHATS, COMPLETIONS, Attack, Attacker, chat, completion, together

__all__ = ["GRAMMARS"]


def _multiple_of(number: int) -> dict[str, Any]:
    return {"type": "integer", "multipleOf": number}


async def slow_compilation(on: Attacker) -> None:
    """multipleOf 99991: seconds of compilation; 12 clients that leave after 3 s"""
    body = chat(guided_json=_multiple_of(99991))
    await together(on.ask(CHATS, body, leave_after_s=3) for _ in range(12))


async def slower_compilation(on: Attacker) -> None:
    """multipleOf 999983: a minute of compilation; 8 clients that leave after 3 s"""
    body = chat(guided_json=_multiple_of(999983))
    await together(on.ask(CHATS, body, leave_after_s=3) for _ in range(8))


async def slow_tools(on: Attacker) -> None:
    """the same as parameters of 20 tools, one of which has to be called"""
    schema = {"type": "object", "properties": {"n": _multiple_of(99991)}, "required": ["n"]}
    tools = [{"type": "function", "function": {"name": f"f{i}", "parameters": schema}} for i in range(20)]
    await together(on.ask(CHATS, chat(tools=tools, tool_choice="required"), leave_after_s=3) for _ in range(4))


async def slow_compilation_of_many_texts(on: Attacker) -> None:
    """multipleOf 99991 for 128 texts of one request"""
    await on.ask(COMPLETIONS, completion(guided_json=_multiple_of(99991), n=128), leave_after_s=4)


async def slow_first_mask(on: Attacker) -> None:
    """(a{1000}){1000}: its first mask takes seconds; 6 clients"""
    await together(on.ask(COMPLETIONS, completion(guided_regex="(a{1000}){1000}")) for _ in range(6))


async def slow_later_mask(on: Attacker) -> None:
    """the same after some plain text: a mask amid the text takes seconds; 6 clients"""
    regexes = [f"Begin {i} (a{{1000}}){{1000}}" for i in range(6)]
    await together(on.ask(COMPLETIONS, completion(guided_regex=regex, max_tokens=64)) for regex in regexes)


async def slow_masks(on: Attacker) -> None:
    """a regex with more states at every token, for 128 texts at once"""
    body = completion(guided_regex="([a-z ]*[aeiou][a-z ]{400}){30}", n=128, max_tokens=200)
    await on.ask(COMPLETIONS, body)


async def long_choice(on: Attacker) -> None:
    """guided_choice of one text half as long as the largest body, two clients"""
    body = completion(guided_choice=["hello world " * (on.num_bytes // 24)])
    await together(on.ask(COMPLETIONS, body) for _ in range(2))


async def wide_forms(on: Attacker) -> None:
    """1,000 choices, an enum of 100,000 texts, and an object of 20,000 properties"""
    await on.ask(COMPLETIONS, completion(guided_choice=[f"choice {i} " * 50 for i in range(1000)]))
    await on.ask(COMPLETIONS, completion(guided_json={"enum": [f"word {i}" for i in range(100_000)]}))
    properties = {f"property {i}": {"type": "integer"} for i in range(20_000)}
    form = {"type": "object", "properties": properties, "required": list(properties)}
    await on.ask(COMPLETIONS, completion(guided_json=form))


async def distinct_schemas(on: Attacker) -> None:
    """1,000 schemas, no two alike, from 25 clients"""

    async def client(first: int) -> None:
        for number in range(first, 1000, 25):
            properties = {f"key_{number}_{i}": {"type": "string", "maxLength": number} for i in range(20)}
            await on.ask(COMPLETIONS, completion(guided_json={"type": "object", "properties": properties}))

    await together(client(first) for first in range(25))


async def leaves_compilation(on: Attacker) -> None:
    """40 clients, one after another, that leave while their grammar is compiled"""
    for number in range(40):
        body = completion(guided_json=_multiple_of(99991 + 2 * number))
        await on.ask(COMPLETIONS, body, leave_after_s=0.05)
        await asyncio.sleep(0.02)


GRAMMARS: tuple[Attack, ...] = (
    slow_compilation,
    slower_compilation,
    slow_tools,
    slow_compilation_of_many_texts,
    slow_first_mask,
    slow_later_mask,
    slow_masks,
    long_choice,
    wide_forms,
    distinct_schemas,
    leaves_compilation,
)
