"""The ranks and nodes that have connected to the coordinator, and when each was last heard."""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import threading

from narrows.errors import ConfigError
from narrows.ranks.channel import Channel
from narrows.ranks.messages import HELLO, Hello, hello

__all__ = ["Peer", "Peers"]


class Peer:
    """One rank or node."""

    def __init__(self, channel: Channel, greeting: Hello, now: float) -> None:
        self.channel = channel
        self.rank, self.node, self.pid, self.host, self.versions = greeting
        self.heard = now
        self.gone = threading.Event()
        """Its connection has ended, and nothing more will be received."""

    def __str__(self) -> str:
        name = f"node {self.node}" if self.rank is None else f"rank {self.rank}"
        return f"{name} (pid {self.pid} on {self.host})"


class Peers:
    """All that have connected so far, in that order, and the ranks among them by number."""

    def __init__(self, num_ranks: int) -> None:
        self.all: list[Peer] = []
        self.ranks: dict[int, Peer] = {}
        self._num_ranks = num_ranks

    def accept(self, listener: socket.socket, key: bytes, silence_s: float, now: float) -> Peer | None:
        """The next peer that connects and proves the key; None if none does within the listener's time-out.

        Raises:
            ConfigError: it runs another version of Python, torch or narrows.
        """
        try:
            sock, _ = listener.accept()
        except TimeoutError:
            return None
        with contextlib.suppress(OSError, EOFError):  # a stranger, or one that has ended again
            return self.admit(Channel.accept(sock, key, silence_s), silence_s, now)
        return None

    def admit(self, channel: Channel, silence_s: float, now: float) -> Peer | None:
        """Adds the peer at the other end of a channel once it has sent its greeting."""
        message = channel.receive(silence_s)
        if message is None or message[0] != HELLO:
            channel.close()
            return None
        peer = Peer(channel, pickle.loads(message[1]), now)
        own = hello(None, 0, os.getpid()).versions
        if peer.versions != own:
            raise ConfigError(f"{peer} runs {peer.versions}, but its coordinator runs {own}: they must be the same")
        self.all.append(peer)
        if peer.rank is not None:
            self.ranks[peer.rank] = peer
        return peer

    @property
    def missing(self) -> list[int]:
        """Ranks that have not connected."""
        return [rank for rank in range(self._num_ranks) if rank not in self.ranks]

    @property
    def pids(self) -> tuple[int, ...]:
        """The process id of each rank, on its host."""
        return tuple(self.ranks[rank].pid for rank in range(self._num_ranks))

    def silence_s(self, now: float) -> tuple[float, ...]:
        """Seconds since each rank was last heard."""
        return tuple(max(now - self.ranks[rank].heard, 0.0) for rank in range(self._num_ranks))
