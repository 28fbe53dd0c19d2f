"""A sequence of calls of the compiled library, captured once and replayed by one call (csrc/runtime/capture.cpp)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from narrows.native.library import Library, library

__all__ = ["CapturedCalls"]


class CapturedCalls:
    """Captures the calls that this thread makes from now on until :meth:`end`; :meth:`run` replays them.

    A replay passes the same arguments: the caller keeps the memory that they point to.
    """

    def __init__(self) -> None:
        found = library()
        assert found is not None, "nothing is compiled here"
        self._library: Library = found
        found.narrows_capture_begin.restype = ctypes.c_void_p
        found.narrows_capture_size.restype = ctypes.c_int64
        found.narrows_capture_end.restype = found.narrows_capture_free.restype = None
        self._address = ctypes.c_void_p(found.narrows_capture_begin())
        self._at = ctypes.c_int64(0)
        self._times = (ctypes.c_int64 * 1)()

    @property
    def size(self) -> int:
        """Calls so far; -1 if one of them cannot be replayed."""
        return int(self._library.narrows_capture_size(self._address))

    @property
    def position(self) -> int:
        """The number of the call that is being made. Any thread may read it."""
        return self._at.value

    def end(self, count: int) -> None:
        """End the capture and keep the first ``count`` calls."""
        self._library.narrows_capture_end(self._address, ctypes.c_int64(count))
        self._times = (ctypes.c_int64 * (count + 1))()
        self._run = self._library.narrows_capture_run
        self._given = self._address, ctypes.byref(self._at), ctypes.byref(self._times)

    def rewind(self) -> None:
        """Let the next run begin with the first call."""
        self._at.value = 0

    def run(self) -> int:
        """Make the calls from :attr:`position` on. Returns 0, or the result of a call that has to be made again."""
        return int(self._run(*self._given))

    @property
    def times_ns(self) -> Sequence[int]:
        """When each call began in the last run, and when the last one ended: nanoseconds of CLOCK_MONOTONIC."""
        return self._times[:]

    def __del__(self) -> None:
        self._library.narrows_capture_free(self._address)
