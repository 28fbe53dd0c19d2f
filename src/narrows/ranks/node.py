"""Runs the ranks of a host that is not the coordinator's, when a person started narrows there (``--nnodes``)."""

from __future__ import annotations

import os
import pickle
import sys

from narrows.errors import RankError
from narrows.ranks.channel import Channel
from narrows.ranks.launch import Launch, find_coordinator
from narrows.ranks.messages import BEAT, END, FAILED, HELLO, Failure, hello
from narrows.ranks.spawn import Processes, end_processes, ending, start, tell

__all__ = ["run_node"]


def run_node(launch: Launch, device: str) -> int:
    """Runs this node's ranks until the coordinator, on another host, ends them; returns its exit code.

    ``device``: what the ranks compute on.

    Raises:
        RankError: the coordinator was not found, or is gone.
    """
    contact = find_coordinator(launch)
    try:
        channel = Channel.connect(contact.address, contact.port, contact.key, contact.timing.silence_s)
        channel.send(HELLO, pickle.dumps(hello(None, launch.node, os.getpid())))
    except (OSError, EOFError) as error:
        raise RankError(f"node {launch.node} cannot reach its coordinator at {contact.address}: {error}") from None
    processes: Processes = {}
    try:
        tell(start(launch.ranks, processes), launch.node, contact, device)
        code, why = _wait_for_end(channel, processes, contact.timing.beat_s)
    except EOFError:
        raise RankError(f"node {launch.node}: the coordinator at {contact.address} is gone") from None
    finally:
        end_processes(processes, contact.timing.grace_s)
        channel.close()
    if why:
        print(f"narrows: node {launch.node} was ended by its coordinator: {why}", file=sys.stderr)
    return code


def _wait_for_end(channel: Channel, processes: Processes, beat_s: float) -> tuple[int, str]:
    """Waits until the coordinator ends this node. Reports ranks that end, since they may never have connected."""
    reported: set[int] = set()
    while True:
        message = channel.receive(beat_s)
        if message is not None and message[0] == END:
            code, why = pickle.loads(message[1])
            return code, why
        for rank, process in processes.items():
            if process.poll() is not None and rank not in reported:
                reported.add(rank)
                text = f"rank {rank} (pid {process.pid}) {ending(process)}"
                channel.try_send(FAILED, pickle.dumps(Failure(0, None, "", text, "")))
        channel.try_send(BEAT)
