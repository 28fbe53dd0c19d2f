"""What the ranks of these tests do: functions of a world, which rank processes import by name, and their worker."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from narrows.comm import World
from narrows.errors import CollectiveMismatchError
from narrows.layout import Mesh

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

    def __init__(self, world: World) -> None:
        self.world = world
        self.kept: list[Any] = []
        world.barrier(everyone(world), "built")

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(self.world, *args)

    def tell(self, value: int, pause: float = 0.0) -> int:
        time.sleep(pause * self.world.rank)
        self.kept.append(value)
        return self.world.rank * 100 + value

    def all_told(self) -> list[Any]:
        return list(self.kept)

    def keep(self, big: Big, note: str) -> tuple[int, int]:
        """Keeps it; says how many different objects came so far, and how many in all."""
        self.kept.append(big)
        return len({id(thing) for thing in self.kept}), len(self.kept)


class Broken:
    """A worker that one rank cannot build."""

    def __init__(self, world: World) -> None:
        if world.rank == 1:
            raise FileNotFoundError("model-00002-of-00002.safetensors")
        world.barrier(everyone(world), "built")


class Dead:
    """A worker whose rank 1 does not live to be one."""

    def __init__(self, world: World) -> None:
        if world.rank == 1:
            os._exit(7)
        world.barrier(everyone(world), "built")


def everyone(world: World) -> tuple[int, ...]:
    return tuple(range(world.mesh.size))


def groups_of(mesh: Mesh, rank: int) -> list[tuple[int, ...]]:
    """Every group along consecutive axes that ``rank`` is in, once."""
    n = mesh.num_axes
    return list(dict.fromkeys(mesh.group(rank, i, j) for i in range(n) for j in range(i + 1, n + 1)))


def rough(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values of such different sizes that a float32 sum depends on its order."""
    source = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=source) * 10 ** (6 * torch.rand(*shape, generator=source) - 3)).to(dtype)


# --- values


def collectives(world: World, counts: Sequence[int], width: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every collective in every group of this rank, on values that are its own; what each gave.

    ``counts``: rows by place in a group; a group takes as many of them as it has members.
    """
    out: dict[str, Tensor] = {}
    for ranks in groups_of(world.mesh, world.rank):
        me, split = ranks.index(world.rank), tuple(counts[: len(ranks)])
        total, own = sum(split), split[me]
        x = rough(world.rank, total, width, dtype=dtype)
        joined = [rough(100 + world.rank, own, width, dtype=dtype), rough(200 + world.rank, own, width)]
        said = f"{ranks} {split} "
        out[f"{said}all_reduce"] = world.all_reduce(x, ranks, split, "a")
        out[f"{said}all_reduce joined"] = world.all_reduce(x, ranks, split, "aj", joined)
        out[f"{said}reduce_scatter"] = world.reduce_scatter(x, ranks, split, "r")
        out[f"{said}reduce_scatter joined"] = world.reduce_scatter(x, ranks, split, "rj", joined)
        (out[f"{said}all_gather"],) = world.all_gather([joined[0]], ranks, split, "g")
        fields = [(rough(world.rank + 7, own, w) % 5).to(dt) for w, dt in enumerate(DTYPES)]
        packed = world.all_gather([joined[0], *fields], ranks, split, "gp")
        out |= {f"{said}packed {i}": field for i, field in enumerate(packed)}
        wide = rough(world.rank, total, sum(split) + width, dtype=dtype)
        out[f"{said}column_gather"] = world.column_gather(wide[:, :own], ranks, split, "c")  # not contiguous
        for root in ranks:
            out[f"{said}broadcast {root}"] = world.broadcast(x, ranks, root, "b")
        world.barrier(ranks, "w")
    out["scalar"] = world.broadcast(torch.tensor(world.rank + 1.5), everyone(world), 0, "scalar")
    return out


def sum_of(world: World, value: float) -> float:
    x = torch.full((world.mesh.size, 1), value + world.rank)
    return world.all_reduce(x, everyone(world), (1,) * world.mesh.size, "sum")[0, 0].item()


def facts(world: World) -> tuple[int, int, int, bool, bool, bool, str]:
    in_main = threading.current_thread() is threading.main_thread()
    deaf = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    inference = torch.is_inference_mode_enabled()
    return world.rank, os.getpid(), torch.get_num_threads(), inference, in_main, deaf, sys.argv[-1]


# --- whose memory


def results_are_nobody_elses(world: World) -> None:
    """Every result is overwritten by its owner; nobody's input may change."""
    ranks, me = everyone(world), world.rank
    counts = [2, 0, 1, 3][: len(ranks)]
    for dtype in (torch.float32, torch.bfloat16):
        whole = torch.full((sum(counts), 2), me + 1, dtype=dtype)
        mine = torch.full((counts[me], 2), me + 1, dtype=dtype)
        results = {
            "all_gather": world.all_gather([mine], ranks, counts, "g")[0],
            "all_gather packed": world.all_gather([mine, mine], ranks, counts, "gp")[1],
            "reduce_scatter": world.reduce_scatter(whole, ranks, counts, "r", [mine]),
            "all_reduce": world.all_reduce(whole, ranks, counts, "a", [mine]),
            "all_reduce alone": world.all_reduce(whole, ranks, counts, "a"),
            "column_gather": world.column_gather(whole, ranks, [2] * len(ranks), "c"),
            "broadcast": world.broadcast(whole, ranks, 0, "b"),
        }
        for name, result in results.items():
            result.fill_(-7 - me)
            world.barrier(ranks, "all have written")
            assert bool((whole == me + 1).all()) and bool((mine == me + 1).all()), f"{name} aliases an input"
            assert bool((result == -7 - me).all()), f"the result of {name} is shared"


def inputs_may_be_written_again(world: World, rounds: int, size: int) -> None:
    """As soon as a call has returned; ``size`` rows on every rank, so that pieces do not travel at once."""
    ranks, me, num = everyone(world), world.rank, world.mesh.size
    counts = (size,) * num
    x, mine = torch.empty(num * size, 8), torch.empty(size, 8)
    for i in range(rounds):
        if (i + me) % 3 == 0:
            time.sleep(0.001)
        x.fill_(i * 10 + me)
        mine.fill_(i * 10 + me)
        summed = float(num * i * 10 + num * (num - 1) // 2)
        assert bool((world.all_reduce(x, ranks, counts, "a") == summed).all())
        x.fill_(i * 10 + me)
        assert bool((world.reduce_scatter(x, ranks, counts, "r") == summed).all())
        x.fill_(i * 10 + me)
        (rows,) = world.all_gather([mine], ranks, counts, "g")
        mine.fill_(-1)
        assert rows[::size, 0].tolist() == [i * 10 + r for r in ranks]
        copied = world.broadcast(x, ranks, num - 1, "b")
        x.fill_(-1)
        assert bool((copied == i * 10 + num - 1).all())
        copied.fill_(-1)  # who sent the most came back the first: what is still under way must not change
        x.fill_(i * 10 + me)
        piece = world.reduce_scatter(x, ranks, (*(0,) * (num - 1), num * size), "r to the last")
        x.fill_(-1)
        assert bool((piece == summed).all())


def send_buffers(world: World) -> None:
    ranks = everyone(world)
    counts = (2, 1, 3, 1)[: len(ranks)]
    rows = counts[world.rank]
    seen: set[int] = set()
    for turn in range(12):
        first = world.send_buffer(rows, 4, torch.float32).fill_(1 + turn)
        second = world.send_buffer(rows, 4, torch.float32).fill_(2 + turn)
        lent = {first.data_ptr(), second.data_ptr()}
        assert len(lent) == 2, "two buffers at a time are two pieces of memory"
        a, b = world.all_gather([first, second], ranks, counts, "fields")
        again = world.send_buffer(rows, 4, torch.float32).fill_(100)  # whoever is slow still reads the first two
        (c,) = world.all_gather([again], ranks, counts, "field")
        assert not {a.data_ptr(), b.data_ptr()} & lent
        assert bool((a == 1 + turn).all()) and bool((b == 2 + turn).all()) and bool((c == 100).all())
        seen |= lent | {again.data_ptr()}
    assert len(seen) <= 6, "a buffer is free again soon after its collective"
    split = (5, *(0,) * (len(ranks) - 1))
    seen, kept = set(), []
    for turn, reduce in enumerate((world.all_reduce, world.reduce_scatter) * 8):
        x = world.send_buffer(5, 3, torch.float32).fill_(world.rank + turn)
        summed = reduce(x, ranks, split, "sum")
        seen.add(x.data_ptr())
        kept.append(world.send_buffer(5, 3, torch.float32).fill_(1000))  # never handed to a collective: never reused
        assert bool((summed == sum(r + turn for r in ranks)).all()), "a result lies in a send buffer"
    assert all(bool((x == 1000).all()) for x in kept)
    assert len(seen) <= len(kept) + 3


def groups_of_one(world: World) -> None:
    """Only rank 0 makes these calls: nobody else is needed."""
    if world.rank:
        return
    alone, x, more = (0,), rough(1, 4, 5, dtype=torch.bfloat16), rough(2, 4, 5, dtype=torch.bfloat16)
    assert world.all_gather([x, more], alone, (4,), "g") == [x, more]
    assert world.reduce_scatter(x, alone, (4,), "r") is x and world.all_reduce(x, alone, (4,), "a") is x
    assert world.column_gather(x, alone, (5,), "c") is x and world.broadcast(x, alone, 0, "b") is x
    world.barrier(alone, "w")
    want = ((x.float() + more.float()) + x.float()).to(torch.bfloat16)
    assert torch.equal(world.all_reduce(x, alone, (4,), "a", [more, x]), want)


# --- what differs between ranks


def differing(world: World, how: str) -> str:
    """Rank 1 comes with something else; what this rank is told, and a sum afterwards that shows all is well again."""
    ranks, odd = everyone(world), world.rank == 1
    num = len(ranks)
    split = tuple(range(1, num + 1))
    total, rows, label = sum(split), split[world.rank], "layer 3 input_norm"
    try:
        if how == "label":
            world.all_reduce(torch.ones(total, 4), ranks, split, "layer 3 experts" if odd else label)
        elif how == "operation" and odd:
            world.barrier(ranks, label)
        elif how in ("operation", "width"):
            world.all_reduce(torch.ones(total, 6 if odd and how == "width" else 4), ranks, split, label)
        elif how == "dtype":
            x = torch.ones(total, 4, dtype=torch.bfloat16 if odd else torch.float32)
            world.reduce_scatter(x, ranks, split, label)
        elif how == "counts":
            other = (split[0] + 1, split[1], *(n - 1 for n in split[2:3]), *split[3:])
            world.all_gather([torch.ones(rows, 4)], ranks, other if odd else split, label)
        elif how == "fields":
            world.all_gather([torch.ones(rows, 4)] * (1 if odd else 2), ranks, split, label)
        elif how == "addends":
            world.all_reduce(torch.ones(total, 4), ranks, split, label, [torch.ones(rows, 4)] * (2 if odd else 1))
        elif how == "root":
            world.broadcast(torch.ones(5), ranks, 1 if odd else 0, label)
        elif how == "number":
            if odd:  # begins one that cannot be, and goes on as if nothing had happened
                try:
                    world.all_reduce(torch.ones(total + 1, 4), ranks, split, label)
                except CollectiveMismatchError as error:
                    assert f"say {total} rows" in str(error)
            world.all_reduce(torch.ones(total, 4), ranks, split, label)
        text = "no rank was told"
    except CollectiveMismatchError as error:
        text = str(error)
    return text


def step_without(world: World, absent: int, label: str) -> None:
    """One rank short-circuits, as on zero rows."""
    world.barrier(everyone(world), "start")
    if world.rank != absent:
        world.all_reduce(torch.ones(world.mesh.size, 2), everyone(world), (1,) * world.mesh.size, label)


def in_different_groups(world: World) -> None:
    """The field's commonest deadlock: one rank idle and one not."""
    if world.rank == 1:
        world.barrier(everyone(world), "idle step")
    else:
        world.barrier(world.mesh.group(world.rank, 1, 2), "attention sum")


def in_different_labels(world: World) -> None:
    world.barrier(everyone(world), "layer 3 mlp" if world.rank == 1 else "layer 3 experts")


def late(world: World, rank: int, seconds: float) -> None:
    if world.rank == rank:
        time.sleep(seconds)
    world.barrier(everyone(world), "layer 7 experts")


def spin(world: World, rows: int = 1) -> None:
    """Sums without end; of many rows it is nearly always in the middle of a copy."""
    num = world.mesh.size
    while True:
        world.all_reduce(torch.ones(num * rows, 1024), everyone(world), (rows,) * num, "sum")


def die(world: World, rank: int) -> None:
    if world.rank == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    world.barrier(everyone(world), "after")


def fail(world: World, rank: int, error: BaseException | str) -> None:
    if world.rank == rank:
        raise OddError(1, 2) if isinstance(error, str) else error
    world.barrier(everyone(world), "after")


def cannot_be_sent(world: World) -> Any:
    return threading.Lock()
