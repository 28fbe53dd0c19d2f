"""Runs the ranks of a host that is not the coordinator's, when a person started narrows there (``--nnodes``)."""

from __future__ import annotations

import os
import pickle
import sys
import threading
import time
from functools import partial

from narrows.errors import RankError
from narrows.ranks.channel import Channel
from narrows.ranks.launch import Launch, find_coordinator, next_contact
from narrows.ranks.messages import BEAT, END, FAILED, HELLO, Contact, Failure, hello
from narrows.ranks.spawn import Processes, end_processes, ending, send_contact, start
from narrows.ranks.timing import TIMING

__all__ = ["run_node", "run_series"]

_LOOK_S = 0.1
"""Between two looks for the next world."""


def run_node(launch: Launch) -> int:
    """Runs this node's ranks until the coordinator, on another host, ends them; returns its exit code.

    Raises:
        RankError: the coordinator was not found, or is gone.
    """
    return _run(launch, find_coordinator(launch))


def run_series(launch: Launch) -> int:
    """Runs this node's ranks of every world that the coordinator starts, until it says that none follows, or one fails;
    returns the exit code of the first that did.

    Raises:
        RankError: there was no world for as long as processes wait for each other.
    """
    codes: list[int] = []
    worlds: list[threading.Thread] = []
    idle_since = time.monotonic()
    while not any(codes):
        contact = next_contact(launch.world(len(worlds)))
        if contact is None:
            break
        if contact:
            work = partial(_run_one, launch, contact, codes)
            worlds.append(threading.Thread(target=work, name=f"narrows world {len(worlds)}", daemon=True))
            worlds[-1].start()
        elif any(world.is_alive() for world in worlds):
            idle_since = time.monotonic()
            time.sleep(_LOOK_S)
        elif time.monotonic() - idle_since > TIMING.join_s:
            where = f"{launch.address} from port {launch.port} on"
            raise RankError(f"node {launch.node}: no coordinator at {where} for {TIMING.join_s:g} s")
        else:
            time.sleep(_LOOK_S)
    for world in worlds:
        world.join()
    return next((code for code in codes if code), 0)


def _run_one(launch: Launch, contact: Contact, codes: list[int]) -> None:
    try:
        codes.append(_run(launch, contact))
    except RankError as error:
        print(f"narrows: {error}", file=sys.stderr)
        codes.append(2)


def _run(launch: Launch, contact: Contact) -> int:
    try:
        channel = Channel.connect(contact.address, contact.port, contact.key, contact.timing.silence_s)
        channel.send(HELLO, pickle.dumps(hello(None, launch.node, os.getpid())))
    except (OSError, EOFError) as error:
        raise RankError(f"node {launch.node} cannot reach its coordinator at {contact.address}: {error}") from None
    processes: Processes = {}
    try:
        send_contact(start(launch.ranks, processes), launch.node, contact)
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
