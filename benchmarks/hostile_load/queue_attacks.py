"""Attacks by quantity: valid requests that ask for many texts, many tokens, or simply often."""

from __future__ import annotations

from hostile_load.attacker import CHATS, COMPLETIONS, Attack, Attacker, chat, completion, together

__all__ = ["QUEUE_ATTACKS"]


async def many_texts(on: Attacker) -> None:
    """8 prompts x n 128 x 1,900 tokens"""
    await on.ask(COMPLETIONS, completion(prompt=["x"] * 8, n=128, max_tokens=1900, ignore_eos=True))


async def many_texts_first(on: Attacker) -> None:
    """the same with priority -100"""
    body = completion(prompt=["x"] * 8, n=128, max_tokens=1900, ignore_eos=True, priority=-100)
    await on.ask(COMPLETIONS, body)


async def thousand_requests(on: Attacker) -> None:
    """1,000 requests at once, 100 tokens each"""
    body = completion(max_tokens=100, ignore_eos=True)
    await together(on.ask(COMPLETIONS, body) for _ in range(1000))


async def thousand_prompts(on: Attacker) -> None:
    """1,000 prompts of 1,800 tokens in one body, one token each"""
    prompts = [[3 + number % 1000, *[5] * 1800] for number in range(1000)]
    await on.ask(COMPLETIONS, completion(prompt=prompts, max_tokens=1))


async def _flood(on: Attacker, path: str, body: dict[str, object] | None, clients: int, each: int) -> None:
    async def client() -> None:
        for _ in range(each):
            await on.ask(path, body)

    await together(client() for _ in range(clients))


async def tokenize_flood(on: Attacker) -> None:
    """2,000 times /tokenize of a text as long as the context, 50 clients"""
    await _flood(on, "/tokenize", {"prompt": "hello world " * 500}, 50, 40)


async def metrics_flood(on: Attacker) -> None:
    """3,000 times /metrics, 50 clients"""
    await _flood(on, "/metrics", None, 50, 60)


async def info_flood(on: Attacker) -> None:
    """1,000 times each /server_info and /openapi.json, 50 clients"""
    await together(_flood(on, path, None, 25, 40) for path in ("/server_info", "/openapi.json"))


async def long_stops(on: Attacker) -> None:
    """32 stop strings of 1,000 characters for 64 texts"""
    stops = [f"{number} " + "e" * 990 for number in range(32)]
    body = completion(stop=stops, n=64, max_tokens=200, ignore_eos=True, logit_bias={"5": 20})
    await on.ask(COMPLETIONS, body)


async def whole_bias(on: Attacker) -> None:
    """a logit_bias of the whole vocabulary for 64 texts, 4 clients"""
    bias = {str(token): 1.5 for token in range(2048)}
    await together(on.ask(COMPLETIONS, completion(logit_bias=bias, n=64, max_tokens=20)) for _ in range(4))


async def many_logprobs(on: Attacker) -> None:
    """20 log-probabilities of every token of 32 texts, the prompt's among them, 4 clients"""
    body = completion(prompt="hello world " * 300, echo=True, logprobs=20, n=32, max_tokens=50, ignore_eos=True)
    await together(on.ask(COMPLETIONS, body) for _ in range(4))


async def vanishing_prefills(on: Attacker) -> None:
    """30 rounds of 12 prompts of 1,900 tokens, whose clients vanish amid the prefill"""
    for number in range(30):
        prompt = [3 + number, *[7] * 1900]
        bodies = [completion(prompt=[*prompt, 3 + i], stream=True) for i in range(12)]
        await together(on.ask(COMPLETIONS, body, leave_after_s=0.1) for body in bodies)


async def vanishing_chats(on: Attacker) -> None:
    """1,000 chats whose clients vanish after 20 ms, 50 at a time"""

    async def client() -> None:
        for _ in range(20):
            await on.ask(CHATS, chat(max_tokens=500, n=8, stream=True), leave_after_s=0.02)

    await together(client() for _ in range(50))


QUEUE_ATTACKS: tuple[Attack, ...] = (
    many_texts,
    many_texts_first,
    thousand_requests,
    thousand_prompts,
    tokenize_flood,
    metrics_flood,
    info_flood,
    long_stops,
    whole_bias,
    many_logprobs,
    vanishing_prefills,
    vanishing_chats,
)
