"""Attacks by shape: bodies of millions of wrong items, deep nesting, repeated keys, and numbers that do not end."""

from __future__ import annotations

import json

from hostile_load.attacker import CHATS, COMPLETIONS, Attack, Attacker, repeated, together

__all__ = ["ITEMS"]

_CHAT = '{"messages":[{"role":"user","content":"x"}],"max_tokens":2,'
_COMPLETION = '{"prompt":"x","max_tokens":2,'


async def wrong_messages(on: Attacker) -> None:
    """messages that are numbers, and messages without a role"""
    await on.ask(CHATS, repeated('{"messages":[', "1", "]}", on.num_bytes))
    await on.ask(CHATS, repeated('{"messages":[', "{}", "]}", on.num_bytes))


async def wrong_prompts(on: Attacker) -> None:
    """prompts of which the last one, or each, is of another type than the first"""
    await on.ask(COMPLETIONS, repeated('{"prompt":[', '"a"', ",1]}", on.num_bytes))
    await on.ask(COMPLETIONS, repeated('{"prompt":["a",', "[1]", "]}", on.num_bytes))


async def wrong_parts(on: Attacker) -> None:
    """content parts that are empty, and parts that are numbers"""
    for item in ("{}", "1"):
        await on.ask(CHATS, repeated('{"messages":[{"role":"user","content":[', item, "]}]}", on.num_bytes))


async def wrong_tool_calls(on: Attacker) -> None:
    """tool_calls and tools that are numbers"""
    await on.ask(CHATS, repeated('{"messages":[{"role":"assistant","tool_calls":[', "1", "]}]}", on.num_bytes))
    await on.ask(CHATS, repeated(f'{_CHAT}"tools":[', "1", "]}", on.num_bytes))


async def wrong_bias(on: Attacker) -> None:
    """a logit_bias of hundreds of thousands of words that are no tokens, with values that are no numbers"""
    entries = ",".join(f'"word {i}":"x"' for i in range(on.num_bytes // 20))
    await on.ask(COMPLETIONS, f'{_COMPLETION}"logit_bias":{{{entries}}}}}'.encode())


async def wrong_stops(on: Attacker) -> None:
    """stop strings that are numbers, too many of them, and stop tokens that are texts"""
    await on.ask(COMPLETIONS, repeated(f'{_COMPLETION}"stop":[', "1", "]}", on.num_bytes))
    await on.ask(COMPLETIONS, repeated(f'{_COMPLETION}"stop":[', '"a"', "]}", on.num_bytes))
    await on.ask(COMPLETIONS, repeated(f'{_COMPLETION}"stop_token_ids":[', '"a"', "]}", on.num_bytes))


async def wrong_token_ids(on: Attacker) -> None:
    """token ids that are negative, halves, or amid texts, in prompts and to /detokenize"""
    await on.ask(COMPLETIONS, repeated('{"prompt":[', "-1", "]}", on.num_bytes))
    await on.ask(COMPLETIONS, repeated('{"prompt":[[1],', "[0.5]", "]}", on.num_bytes))
    await on.ask("/detokenize", repeated('{"tokens":[', '"a"', "]}", on.num_bytes))


async def nested_lists(on: Attacker) -> None:
    """millions of empty lists as prompts"""
    await on.ask(COMPLETIONS, repeated('{"prompt":[', "[]", "]}", on.num_bytes))
    await on.ask(COMPLETIONS, repeated('{"prompt":[', "[[]]", "]}", on.num_bytes))


async def empty_objects(on: Attacker) -> None:
    """millions of empty objects in a field that is not known, and in a schema"""
    await on.ask(COMPLETIONS, repeated(f'{_COMPLETION}"nothing":[', "{}", "]}", on.num_bytes))
    await on.ask(COMPLETIONS, repeated(f'{_COMPLETION}"guided_json":{{"anyOf":[', "{}", "]}}", on.num_bytes))


async def deep_body(on: Attacker) -> None:
    """lists in lists as deep as the body allows, closed and unclosed, and objects likewise"""
    half = on.num_bytes // 2 - 20
    for inner in ("[" * half + "]" * half, "[" * half * 2, '{"a":' * (half // 3) + "1" + "}" * (half // 3)):
        await on.ask(COMPLETIONS, f'{{"prompt":{inner}}}'.encode())


async def deep_kwargs(on: Attacker) -> None:
    """chat_template_kwargs and an unknown field of a message nested 900 deep, 50 clients"""
    deep = "[" * 900 + "]" * 900
    kwargs = f'{_CHAT}"chat_template_kwargs":{{"a":{deep}}}}}'.encode()
    message = f'{{"messages":[{{"role":"user","content":"x","a":{deep}}}]}}'.encode()
    await together(on.ask(CHATS, body) for body in (kwargs, message) * 25)


async def deep_schemas(on: Attacker) -> None:
    """schemas nested 400 and 900 deep, as form and as a tool's parameters, 40 clients"""
    bodies = []
    for depth in (400, 900):
        schema = '{"type":"object","properties":{"a":' * depth + '{"type":"string"}' + "}}" * depth
        bodies.append(f'{_CHAT}"guided_json":{schema}}}')
        tool = f'{{"type":"function","function":{{"name":"f","parameters":{schema}}}}}'
        bodies.append(f'{_CHAT}"tools":[{tool}],"tool_choice":"required"}}')
    await together(on.ask(CHATS, body.encode()) for body in bodies * 10)


async def repeated_keys(on: Attacker) -> None:
    """one key millions of times, and hundreds of thousands of keys that are not known"""
    await on.ask(COMPLETIONS, repeated('{"prompt":"x",', '"max_tokens":2', "}", on.num_bytes))
    await on.ask(COMPLETIONS, json.dumps({f"key{i}": i for i in range(on.num_bytes // 22)} | {"prompt": 1}).encode())


async def huge_numbers(on: Attacker) -> None:
    """numbers of millions of digits, of millions of decimals, and of exponents beyond all floats"""
    digits = "9" * on.num_bytes
    for number in (digits[:4000], digits[:-100], f"0.{digits[:-100]}", "1e999999999", f"1e{digits[:1_000_000]}"):
        for field in ("seed", "temperature"):
            await on.ask(COMPLETIONS, f'{_COMPLETION}"{field}":{number}}}'.encode())


ITEMS: tuple[Attack, ...] = (
    wrong_messages,
    wrong_prompts,
    wrong_parts,
    wrong_tool_calls,
    wrong_bias,
    wrong_stops,
    wrong_token_ids,
    nested_lists,
    empty_objects,
    deep_body,
    deep_kwargs,
    deep_schemas,
    repeated_keys,
    huge_numbers,
)
