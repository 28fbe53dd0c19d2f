"""Attacks below HTTP's surface: heads, bodies and connections that do not end, and answers that stay unread."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from hostile_load.attacker import COMPLETIONS, Attack, Attacker, together

__all__ = ["CONNECTIONS"]

_HEAD = b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\n"
_POST = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n".encode()
_HELD_S = 4.0
"""How long connections are held by a client that sends nothing more."""


async def _written(writer: asyncio.StreamWriter, pieces: Iterable[bytes], pause_s: float = 0.0) -> None:
    for piece in pieces:
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(pause_s)


async def _held(on: Attacker, count: int, first: bytes) -> None:
    """Connections that say one thing and then nothing, for some seconds."""

    async def talk(writer: asyncio.StreamWriter) -> None:
        await _written(writer, [first] if first else [])
        await asyncio.sleep(_HELD_S)

    async def client(delay_s: float) -> None:
        await asyncio.sleep(delay_s)  # faster, the kernel's queue of connections would be what refuses them
        async with asyncio.timeout(_HELD_S + 1):
            await on.bare(talk)

    await asyncio.gather(*(client(number / 2000) for number in range(count)), return_exceptions=True)


async def endless_header(on: Attacker) -> None:
    """one header of 80 MB, never ended"""
    piece = b"a" * 65536
    await on.bare(lambda writer: _written(writer, [_HEAD + b"x: ", *[piece] * (80_000_000 // len(piece))]))


async def many_headers(on: Attacker) -> None:
    """40 MB of small headers, never ended"""
    pieces = (b"".join(b"x%d: a\r\n" % i for i in range(first, first + 5000)) for first in range(0, 4_000_000, 5000))
    await on.bare(lambda writer: _written(writer, [_HEAD, *pieces]))


async def silent_1100(on: Attacker) -> None:
    """1,100 connections that say nothing"""
    await _held(on, 1100, b"")


async def silent_2000(on: Attacker) -> None:
    """2,000 connections that say nothing"""
    await _held(on, 2000, b"")


async def half_heads(on: Attacker) -> None:
    """1,100 connections that send half a head"""
    await _held(on, 1100, _HEAD)


async def slow_heads(on: Attacker) -> None:
    """300 connections that send a head byte by byte"""
    letters = [bytes([letter]) for letter in _HEAD + b"x: " + b"a" * 1000]
    await together(on.bare(lambda writer: _written(writer, letters, 0.1)) for _ in range(300))


async def absent_bodies(on: Attacker) -> None:
    """1,100 connections that announce a body of 15 MB and send none"""
    await _held(on, 1100, _POST + b"content-length: 15000000\r\n\r\n")


async def late_bodies(on: Attacker) -> None:
    """30 bodies of the largest size of which the last byte never comes"""
    pieces = [b" " * 65536] * (on.num_bytes // 65536)
    head = _POST + b"content-length: %d\r\n\r\n" % (65536 * len(pieces) + 1)
    await together(on.bare(lambda writer: _written(writer, [head, *pieces])) for _ in range(30))


async def tiny_chunks(on: Attacker) -> None:
    """a body of 3 MB in chunks of one byte, two clients"""
    pieces = [_POST + b"transfer-encoding: chunked\r\n\r\n", *[b"1\r\n \r\n" * 10_000] * 300]
    await together(on.bare(lambda writer: _written(writer, pieces)) for _ in range(2))


async def pipelined(on: Attacker) -> None:
    """20 connections with 2,000 requests each, sent without waiting for an answer"""
    pieces = [(_HEAD + b"\r\n") * 100] * 20
    await together(on.bare(lambda writer: _written(writer, pieces)) for _ in range(20))


async def unread(on: Attacker) -> None:
    """20 connections that ask 500 times for the API's document and read nothing"""
    pieces = [b"GET /openapi.json HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n" * 10] * 50
    await together(on.bare(lambda writer: _written(writer, pieces), reads=False) for _ in range(20))


async def unread_streams(on: Attacker) -> None:
    """40 streams of 4 texts of 1,000 tokens that are not read"""
    body = b'{"prompt":"x","stream":true,"max_tokens":1000,"ignore_eos":true,"n":4,"logprobs":5}'
    request = _POST + b"content-length: %d\r\n\r\n" % len(body) + body
    await together(on.bare(lambda writer: _written(writer, [request]), reads=False) for _ in range(40))


async def brief_connections(on: Attacker) -> None:
    """5,000 connections that are opened and closed at once, 50 at a time"""

    async def nothing(writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    async def client() -> None:
        for _ in range(100):
            await on.bare(nothing)

    await together(client() for _ in range(50))


CONNECTIONS: tuple[Attack, ...] = (
    endless_header,
    many_headers,
    silent_1100,
    silent_2000,
    half_heads,
    slow_heads,
    absent_bodies,
    late_bodies,
    tiny_chunks,
    pipelined,
    unread,
    unread_streams,
    brief_connections,
)
