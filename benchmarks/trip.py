"""Lists the files of narrows whose functions run, in the order of first entry: the way of a request, or of a price.

    python benchmarks/trip.py -- plan narrows-demo --rows 64 --device FILE             # every file that it enters
    python benchmarks/trip.py --within choose_device --within Planner.plan -- plan ... # only while these run

Code that runs when a module is imported does not count, nor do rank processes. :func:`trip` does the same for a block
of Python, in its thread and in those that it starts.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import narrows
from narrows.cli.main import main

ROOT = os.path.dirname(narrows.__file__) + os.sep


@contextmanager
def trip(within: Collection[str] = (), root: str = ROOT) -> Iterator[list[str]]:
    """The files below ``root`` whose functions are entered inside the block, as relative paths; filled as it runs.

    Args:
        within: qualified names of functions: files count only while one of these runs in their thread. Empty: always.
    """
    files: list[str] = []
    known: set[str] = set()
    state = threading.local()

    def seen(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event not in ("call", "return") or not code.co_filename.startswith(root):
            return
        importing, watched = getattr(state, "depths", (0, 0))
        by = 1 if event == "call" else -1
        importing += by * (code.co_name == "<module>")
        watched += by * (code.co_qualname in within)
        state.depths = max(importing, 0), max(watched, 0)
        if event == "call" and not importing and (watched or not within) and code.co_filename not in known:
            known.add(code.co_filename)
            files.append(code.co_filename.removeprefix(root))

    threading.setprofile(seen)
    sys.setprofile(seen)
    try:
        yield files
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def run() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--within", action="append", default=[], metavar="FUNCTION", help="count only while it runs")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="a command of narrows and its flags")
    args = parser.parse_args()
    command = args.command[args.command[:1] == ["--"] :]
    with trip(args.within) as files:
        status = main(command)
    for number, file in enumerate(files, 1):
        print(f"{number:3} {file}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(run())
