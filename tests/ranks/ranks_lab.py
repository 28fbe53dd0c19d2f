"""Functions of a communicator that rank processes import by name, and the worker of these tests."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from narrows.comm import Communicator
from narrows.errors import CollectiveMismatchError
from narrows.layout import Mesh
from narrows.ranks import ProcessRanks

DTYPES = (torch.float32, torch.bfloat16, torch.int8, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn)


@dataclass(frozen=True)
class Big:
    """Something that is sent once."""

    values: tuple[int, ...]


class OddError(Exception):
    """An error that cannot be rebuilt from its pickle: it wants two arguments and keeps one."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


class Lab:
    """A worker that runs functions of this module."""

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm
        self.kept: list[Any] = []
        comm.barrier(everyone(comm), "built")

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(self.comm, *args)

    def tell(self, value: int, pause: float = 0.0) -> int:
        time.sleep(pause * self.comm.rank)
        self.kept.append(value)
        return self.comm.rank * 100 + value

    def all_told(self) -> list[Any]:
        return list(self.kept)

    def keep(self, big: Big, note: str) -> tuple[int, int]:
        """Keeps it; says how many different objects came so far, and how many in all."""
        self.kept.append(big)
        return len({id(thing) for thing in self.kept}), len(self.kept)


class Broken:
    """A worker that one rank cannot build."""

    def __init__(self, comm: Communicator) -> None:
        if comm.rank == 1:
            raise FileNotFoundError("model-00002-of-00002.safetensors")
        comm.barrier(everyone(comm), "built")


class Dead:
    """A worker whose rank 1 does not live to be one."""

    def __init__(self, comm: Communicator) -> None:
        if comm.rank == 1:
            os._exit(7)
        comm.barrier(everyone(comm), "built")


def everyone(comm: Communicator) -> tuple[int, ...]:
    return tuple(range(comm.mesh.size))


def groups_of(mesh: Mesh, rank: int) -> list[tuple[int, ...]]:
    """Every group along consecutive axes that ``rank`` is in, once."""
    n = mesh.num_axes
    return list(dict.fromkeys(mesh.group(rank, i, j) for i in range(n) for j in range(i + 1, n + 1)))


def rough(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values of such different sizes that a float32 sum depends on its order."""
    source = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=source) * 10 ** (6 * torch.rand(*shape, generator=source) - 3)).to(dtype)


# --- values


def collectives(comm: Communicator, counts: Sequence[int], width: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every collective in every group of this rank, on this rank's own values; the results.

    ``counts``: rows by index in a group; a group takes as many of them as it has members.
    """
    out: dict[str, Tensor] = {}
    for ranks in groups_of(comm.mesh, comm.rank):
        me, split = ranks.index(comm.rank), tuple(counts[: len(ranks)])
        total, own = sum(split), split[me]
        x = rough(comm.rank, total, width, dtype=dtype)
        joined = [rough(100 + comm.rank, own, width, dtype=dtype), rough(200 + comm.rank, own, width)]
        said = f"{ranks} {split} "
        out[f"{said}all_reduce"] = comm.all_reduce(x, ranks, split, "a")
        out[f"{said}all_reduce joined"] = comm.all_reduce(x, ranks, split, "aj", joined)
        out[f"{said}reduce_scatter"] = comm.reduce_scatter(x, ranks, split, "r")
        out[f"{said}reduce_scatter joined"] = comm.reduce_scatter(x, ranks, split, "rj", joined)
        (out[f"{said}all_gather"],) = comm.all_gather([joined[0]], ranks, split, "g")
        fields = [(rough(comm.rank + 7, own, w) % 5).to(dt) for w, dt in enumerate(DTYPES)]
        packed = comm.all_gather([joined[0], *fields], ranks, split, "gp")
        out |= {f"{said}packed {i}": field for i, field in enumerate(packed)}
        wide = rough(comm.rank, total, sum(split) + width, dtype=dtype)
        out[f"{said}column_gather"] = comm.column_gather(wide[:, :own], ranks, split, "c")  # not contiguous
        for root in ranks:
            out[f"{said}broadcast {root}"] = comm.broadcast(x, ranks, root, "b")
        comm.barrier(ranks, "w")
    out["scalar"] = comm.broadcast(torch.tensor(comm.rank + 1.5), everyone(comm), 0, "scalar")
    return out


def in_two_levels(comm: Communicator) -> Communicator:
    """The same communicator, which from now on makes every collective in two levels where it can."""
    for name in ("all_gather", "reduce_scatter", "all_reduce", "column_gather"):
        setattr(comm, name, partial(getattr(comm, name), levels=True))
    return comm


def sum_of(comm: Communicator, value: float) -> float:
    x = torch.full((comm.mesh.size, 1), value + comm.rank)
    return comm.all_reduce(x, everyone(comm), (1,) * comm.mesh.size, "sum")[0, 0].item()


def facts(comm: Communicator) -> tuple[int, int, int, bool, bool, bool, str]:
    in_main = threading.current_thread() is threading.main_thread()
    deaf = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    inference = torch.is_inference_mode_enabled()
    return comm.rank, os.getpid(), torch.get_num_threads(), inference, in_main, deaf, sys.argv[-1]


def surroundings(comm: Communicator, names: tuple[str, ...]) -> tuple[str, tuple[str | None, ...], tuple[int, ...]]:
    return os.getcwd(), tuple(os.environ.get(name) for name in names), tuple(sorted(os.sched_getaffinity(0)))


# --- whose memory


def results_are_nobody_elses(comm: Communicator) -> None:
    """Every result is overwritten by its owner; no input may change."""
    ranks, me = everyone(comm), comm.rank
    counts = [2, 0, 1, 3][: len(ranks)]
    for dtype in (torch.float32, torch.bfloat16):
        whole = torch.full((sum(counts), 2), me + 1, dtype=dtype)
        mine = torch.full((counts[me], 2), me + 1, dtype=dtype)
        results = {
            "all_gather": comm.all_gather([mine], ranks, counts, "g")[0],
            "all_gather packed": comm.all_gather([mine, mine], ranks, counts, "gp")[1],
            "reduce_scatter": comm.reduce_scatter(whole, ranks, counts, "r", [mine]),
            "all_reduce": comm.all_reduce(whole, ranks, counts, "a", [mine]),
            "all_reduce alone": comm.all_reduce(whole, ranks, counts, "a"),
            "column_gather": comm.column_gather(whole, ranks, [2] * len(ranks), "c"),
            "broadcast": comm.broadcast(whole, ranks, 0, "b"),
        }
        for name, result in results.items():
            result.fill_(-7 - me)
            comm.barrier(ranks, "all have written")
            assert bool((whole == me + 1).all()) and bool((mine == me + 1).all()), f"{name} aliases an input"
            assert bool((result == -7 - me).all()), f"the result of {name} is shared"


def inputs_may_be_written_again(comm: Communicator, rounds: int, size: int) -> None:
    """As soon as a call has returned; ``size`` rows on every rank, so that pieces do not travel at once."""
    ranks, me, num = everyone(comm), comm.rank, comm.mesh.size
    counts = (size,) * num
    x, mine = torch.empty(num * size, 8), torch.empty(size, 8)
    for i in range(rounds):
        if (i + me) % 3 == 0:
            time.sleep(0.001)
        x.fill_(i * 10 + me)
        mine.fill_(i * 10 + me)
        summed = float(num * i * 10 + num * (num - 1) // 2)
        assert bool((comm.all_reduce(x, ranks, counts, "a") == summed).all())
        x.fill_(i * 10 + me)
        assert bool((comm.reduce_scatter(x, ranks, counts, "r") == summed).all())
        x.fill_(i * 10 + me)
        (rows,) = comm.all_gather([mine], ranks, counts, "g")
        mine.fill_(-1)
        assert rows[::size, 0].tolist() == [i * 10 + r for r in ranks]
        copied = comm.broadcast(x, ranks, num - 1, "b")
        x.fill_(-1)
        assert bool((copied == i * 10 + num - 1).all())
        copied.fill_(-1)  # the largest sender returned first: data still under way must not change
        x.fill_(i * 10 + me)
        piece = comm.reduce_scatter(x, ranks, (*(0,) * (num - 1), num * size), "r to the last")
        x.fill_(-1)
        assert bool((piece == summed).all())


def send_buffers(comm: Communicator) -> None:
    ranks = everyone(comm)
    counts = (2, 1, 3, 1)[: len(ranks)]
    rows = counts[comm.rank]
    seen: set[int] = set()
    for turn in range(12):
        first = comm.send_buffer(rows, 4, torch.float32).fill_(1 + turn)
        second = comm.send_buffer(rows, 4, torch.float32).fill_(2 + turn)
        lent = {first.data_ptr(), second.data_ptr()}
        assert len(lent) == 2, "two buffers at a time are two pieces of memory"
        a, b = comm.all_gather([first, second], ranks, counts, "fields")
        again = comm.send_buffer(rows, 4, torch.float32).fill_(100)  # slow ranks still read the first two
        (c,) = comm.all_gather([again], ranks, counts, "field")
        assert not {a.data_ptr(), b.data_ptr()} & lent
        assert bool((a == 1 + turn).all()) and bool((b == 2 + turn).all()) and bool((c == 100).all())
        seen |= lent | {again.data_ptr()}
    assert len(seen) <= 6, "a buffer is free again soon after its collective"
    split = (5, *(0,) * (len(ranks) - 1))
    seen, kept = set(), []
    for turn, reduce in enumerate((comm.all_reduce, comm.reduce_scatter) * 8):
        x = comm.send_buffer(5, 3, torch.float32).fill_(comm.rank + turn)
        summed = reduce(x, ranks, split, "sum")
        seen.add(x.data_ptr())
        kept.append(comm.send_buffer(5, 3, torch.float32).fill_(1000))  # never handed to a collective: never reused
        assert bool((summed == sum(r + turn for r in ranks)).all()), "a result lies in a send buffer"
    assert all(bool((x == 1000).all()) for x in kept)
    assert len(seen) <= len(kept) + 3


def groups_of_one(comm: Communicator) -> None:
    """Only rank 0 makes these calls; no other rank is needed."""
    if comm.rank:
        return
    alone, x, more = (0,), rough(1, 4, 5, dtype=torch.bfloat16), rough(2, 4, 5, dtype=torch.bfloat16)
    assert comm.all_gather([x, more], alone, (4,), "g") == [x, more]
    assert comm.reduce_scatter(x, alone, (4,), "r") is x and comm.all_reduce(x, alone, (4,), "a") is x
    assert comm.column_gather(x, alone, (5,), "c") is x and comm.broadcast(x, alone, 0, "b") is x
    comm.barrier(alone, "w")
    want = ((x.float() + more.float()) + x.float()).to(torch.bfloat16)
    assert torch.equal(comm.all_reduce(x, alone, (4,), "a", [more, x]), want)


# --- what differs between ranks


def differing(comm: Communicator, how: str) -> str:
    """Rank 1 makes a different call. Returns this rank's error, and a later sum that shows the ranks have recovered."""
    ranks, odd = everyone(comm), comm.rank == 1
    num = len(ranks)
    split = tuple(range(1, num + 1))
    total, rows, label = sum(split), split[comm.rank], "layer 3 input_norm"
    try:
        if how == "label":
            comm.all_reduce(torch.ones(total, 4), ranks, split, "layer 3 experts" if odd else label)
        elif how == "operation" and odd:
            comm.barrier(ranks, label)
        elif how in ("operation", "width"):
            comm.all_reduce(torch.ones(total, 6 if odd and how == "width" else 4), ranks, split, label)
        elif how == "dtype":
            x = torch.ones(total, 4, dtype=torch.bfloat16 if odd else torch.float32)
            comm.reduce_scatter(x, ranks, split, label)
        elif how == "counts":
            other = (split[0] + 1, split[1], *(n - 1 for n in split[2:3]), *split[3:])
            comm.all_gather([torch.ones(rows, 4)], ranks, other if odd else split, label)
        elif how == "fields":
            comm.all_gather([torch.ones(rows, 4)] * (1 if odd else 2), ranks, split, label)
        elif how == "addends":
            comm.all_reduce(torch.ones(total, 4), ranks, split, label, [torch.ones(rows, 4)] * (2 if odd else 1))
        elif how == "root":
            comm.broadcast(torch.ones(5), ranks, 1 if odd else 0, label)
        elif how == "number":
            if odd:  # begins an impossible one, and continues regardless
                try:
                    comm.all_reduce(torch.ones(total + 1, 4), ranks, split, label)
                except CollectiveMismatchError as error:
                    assert f"say {total} rows" in str(error)
            comm.all_reduce(torch.ones(total, 4), ranks, split, label)
        text = "no rank was told"
    except CollectiveMismatchError as error:
        text = str(error)
    return text


def step_without(comm: Communicator, absent: int, label: str) -> None:
    """One rank short-circuits, as on zero rows."""
    comm.barrier(everyone(comm), "start")
    if comm.rank != absent:
        comm.all_reduce(torch.ones(comm.mesh.size, 2), everyone(comm), (1,) * comm.mesh.size, label)


def sum_without(comm: Communicator, absent: int) -> None:
    """One rank short-circuits, as on zero rows."""
    step_without(in_two_levels(comm), absent, "layer 7 experts")


def sum_late(comm: Communicator, late: int) -> None:
    """A rank that computes, or does nothing, while the others wait for its part of a sum."""
    if comm.rank == late:
        time.sleep(3600)
    sum_without(comm, comm.mesh.size)


def in_different_groups(comm: Communicator) -> None:
    """The field's commonest deadlock: one rank idle and one not."""
    if comm.rank == 1:
        comm.barrier(everyone(comm), "idle step")
    else:
        comm.barrier(comm.mesh.group(comm.rank, 1, 2), "attention sum")


def in_different_labels(comm: Communicator) -> None:
    comm.barrier(everyone(comm), "layer 3 mlp" if comm.rank == 1 else "layer 3 experts")


def late(comm: Communicator, rank: int, seconds: float) -> None:
    if comm.rank == rank:
        time.sleep(seconds)
    comm.barrier(everyone(comm), "layer 7 experts")


def spin(comm: Communicator, rows: int = 1, begun: str = "") -> None:
    """Sums without end; with many rows it is nearly always in the middle of a copy. ``begun``: a file to make then."""
    num = comm.mesh.size
    while True:
        comm.all_reduce(torch.ones(num * rows, 1024), everyone(comm), (rows,) * num, "sum")
        if begun:
            Path(begun).touch()
            begun = ""


def start_spinning(ranks: ProcessRanks[Lab], rows: int, begun: str) -> Future[list[Any]]:
    """The call of :func:`spin`, once it has begun."""
    future = ranks.submit(Lab.run, spin, rows, begun)
    while not (Path(begun).exists() or future.done()):
        time.sleep(0.005)
    return future


def die(comm: Communicator, rank: int) -> None:
    if comm.rank == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    comm.barrier(everyone(comm), "after")


def fail(comm: Communicator, rank: int, error: BaseException | str) -> None:
    if comm.rank == rank:
        raise OddError(1, 2) if isinstance(error, str) else error
    comm.barrier(everyone(comm), "after")


def cannot_be_sent(comm: Communicator) -> Any:
    return threading.Lock()
