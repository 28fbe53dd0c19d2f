"""Ranks as threads of this process, joined by any transport that runs on one host."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import ranks_lab as lab
import torch
from torch.distributed import HashStore

from narrows.comm import connect_process
from narrows.comm.shm_calls import functions
from narrows.layout import Mesh
from narrows.ranks import run_ranks

TRANSPORTS = ("threads", *(("shared memory",) if functions() else ()), "gloo")
BOTH = "shared memory within hosts"
"""Needs ``hosts``; every collective that can is made in two levels."""


def run_over(
    transport: str, mesh: Mesh, fn: Callable[[Any], Any], *, checked: bool = False, hosts: Sequence[int] = ()
) -> list[Any]:
    """``fn`` on every rank of ``mesh``, in a thread each, connected like rank processes.

    ``hosts``: of each rank the number of its host; empty: all on one.

    Raises:
        an error of any rank.
    """
    if transport == "threads":
        return run_ranks(mesh, fn, checked=checked)
    store, results = HashStore(), [None] * mesh.size
    errors: list[BaseException] = []

    def rank(me: int) -> None:
        try:
            comm = connect_process(mesh, me, store, checked=checked, node=hosts[me] if hosts else 0)
            assert mesh.size == 1 or comm.transport.startswith(transport), comm.transport
            if transport == BOTH:
                lab.in_two_levels(comm)
            with torch.inference_mode():
                results[me] = fn(comm)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=rank, args=(me,), daemon=True) for me in range(mesh.size)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NARROWS_SHM", "0" if transport == "gloo" else "1")
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive() and not errors:
                thread.join(0.1)
    if errors:
        for thread in threads:
            thread.join(1)  # ranks that met in the same error; the others wait for one that will not come
        raise errors[0]
    return results
