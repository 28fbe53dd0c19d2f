"""Preparing requests has a lower priority than streaming tokens: nice values of threads and processes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from narrows.server.cpu_priority import lower_thread_priority

linux = pytest.mark.skipif(sys.platform != "linux", reason="nice values per thread are Linux's")


def nice_of_this_thread() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@linux
def test_one_thread_is_niced_and_others_are_not() -> None:
    before = nice_of_this_thread()
    with ThreadPoolExecutor(1, initializer=lower_thread_priority, initargs=(before + 3,)) as pool:
        assert pool.submit(nice_of_this_thread).result() == before + 3
        pool.submit(lower_thread_priority, before + 1).result()
        assert pool.submit(nice_of_this_thread).result() == before + 3, "never up again"
    assert nice_of_this_thread() == before


@linux
def test_a_process_does_not_add_to_its_inherited_priority() -> None:
    program = (
        "import os, sys; from narrows.server.cpu_priority import lower_process_priority; os.nice(int(sys.argv[1]));"
        "lower_process_priority(10); print(os.getpriority(os.PRIO_PROCESS, 0))"
    )

    def nice_after(extra: int) -> int:
        command = [sys.executable, "-c", program, str(extra)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    base = os.getpriority(os.PRIO_PROCESS, 0)
    if base > 5:
        pytest.skip("this process has a low priority itself")
    assert nice_after(0) == 10
    assert nice_after(4) == 10
    assert nice_after(12 - base) == 12
