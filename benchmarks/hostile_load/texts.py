"""Attacks by size: texts, lists and variables of templates, each valid, that are millions of bytes long."""

from __future__ import annotations

import json

from hostile_load.attacker import CHATS, COMPLETIONS, Attack, Attacker, chat, completion, repeated, together

__all__ = ["TEXTS"]

_ID = "7"


def _words(num_bytes: int) -> str:
    return "hello world " * (num_bytes // 12)


async def long_prompt(on: Attacker) -> None:
    """one text of the largest body as a prompt, two clients"""
    body = completion(prompt=_words(on.num_bytes))
    await together(on.ask(COMPLETIONS, body) for _ in range(2))


async def long_message(on: Attacker) -> None:
    """one text of the largest body as a chat message"""
    await on.ask(CHATS, chat(messages=[{"role": "user", "content": _words(on.num_bytes)}]))


async def long_tokenize(on: Attacker) -> None:
    """one text of the largest body to /tokenize, two clients"""
    await together(on.ask("/tokenize", {"prompt": _words(on.num_bytes)}) for _ in range(2))


async def long_word(on: Attacker) -> None:
    """one word, half as long as the largest body, as a prompt and to /tokenize"""
    word = "a" * (on.num_bytes // 2)
    await together([on.ask(COMPLETIONS, completion(prompt=word)), on.ask("/tokenize", {"prompt": word})])


async def long_texts_elsewhere(on: Attacker) -> None:
    """a text of the largest body where other APIs take one: responses, messages, embeddings"""
    text = _words(on.num_bytes)
    await on.ask("/v1/responses", {"model": None, "input": text})
    await on.ask("/v1/messages", chat(messages=[{"role": "user", "content": text}]))
    await on.ask("/v1/embeddings", {"input": text})


async def long_fields(on: Attacker) -> None:
    """a text of the largest body in fields that should be short: model, a stop string, a tool's description"""
    text = _words(on.num_bytes)
    await on.ask(COMPLETIONS, completion(model=text))
    await on.ask(COMPLETIONS, completion(stop=text))
    await on.ask(CHATS, chat(tools=[{"type": "function", "function": {"name": "f", "description": text}}]))


async def many_prompts(on: Attacker) -> None:
    """1,000 prompts in one body, of which the last alone is too long for the context"""
    most = on.num_bytes // 1000 - 8
    prompts = [_words(min(most, 6000))] * 999 + [_words(most * 2)]
    await on.ask(COMPLETIONS, completion(prompt=prompts, max_tokens=1))


async def many_messages(on: Attacker) -> None:
    """a conversation of hundreds of thousands of short messages"""
    await on.ask(CHATS, repeated('{"messages":[', '{"role":"user","content":"x"}', "]}", on.num_bytes))


async def many_token_ids(on: Attacker) -> None:
    """millions of token ids: one prompt, a list of prompts, and to /detokenize"""
    await on.ask(COMPLETIONS, repeated('{"prompt":[', _ID, "]}", on.num_bytes))
    await on.ask(COMPLETIONS, repeated('{"prompt":[', f"[{_ID}]", "]}", on.num_bytes))
    await on.ask("/detokenize", repeated('{"tokens":[', _ID, "]}", on.num_bytes))


async def large_kwargs(on: Attacker) -> None:
    """chat_template_kwargs with one long text, and with hundreds of thousands of variables"""
    await on.ask(CHATS, chat(chat_template_kwargs={"text": _words(on.num_bytes)}))
    names = {f"v{i}": i for i in range(on.num_bytes // 20)}
    await on.ask(CHATS, chat(chat_template_kwargs=names))


async def wide_tools(on: Attacker) -> None:
    """512 tools, together as large as a body may be, one of which has to be called"""
    properties = {f"property_{i}": {"type": "string"} for i in range(on.num_bytes // 512 // 40)}
    schema = {"type": "object", "properties": properties}
    tools = [{"type": "function", "function": {"name": f"f{i}", "parameters": schema}} for i in range(512)]
    await on.ask(CHATS, json.dumps(chat(tools=tools, tool_choice="required")).encode())


TEXTS: tuple[Attack, ...] = (
    long_prompt,
    long_message,
    long_tokenize,
    long_word,
    long_texts_elsewhere,
    long_fields,
    many_prompts,
    many_messages,
    many_token_ids,
    large_kwargs,
    wide_tools,
)
