"""The World among processes, of one host or of several: through shared memory or gloo on CPU, and by NCCL on GPUs.

Knows tensors, stamps, and the wires of its groups (`wire.py`, `shm.py`). Does not know layouts or plans, nor who has
started the processes and watches them (`ranks/`): a rank that does not come is named by them,
from :attr:`DistWorld.where`, which says at any moment what this rank waits at.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from hashlib import blake2b
from time import monotonic
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from narrows.comm.buffers import Buffers
from narrows.comm.neighbours import Neighbours, share
from narrows.comm.recording import Recording, Tape
from narrows.comm.segment import Segment
from narrows.comm.shm import ShmWire
from narrows.comm.shm_calls import NOT_YET
from narrows.comm.stamps import Stamp, mismatch, rank_names, say_columns, say_rows, say_sum, say_tensor
from narrows.comm.sums import sum_rows
from narrows.comm.wire import DifferentCallsError, Wire, open_wires
from narrows.comm.world import RowNorm
from narrows.errors import CollectiveMismatchError
from narrows.layout import Mesh

__all__ = ["DistWorld", "Where", "connect"]

T = TypeVar("T")

_DIGEST = 16
"""Bytes of a stamp that travel when all stamps are equal."""


_CPU = torch.device("cpu")


class Where(NamedTuple):
    """The collective that a rank came to last: since when it is there, or that it has left (``since`` None)."""

    stamp: Stamp
    ranks: tuple[int, ...]
    since: float | None


def connect(
    mesh: Mesh,
    rank: int,
    store: Any,
    *,
    checked: bool = False,
    device: torch.device = _CPU,
    address: str = "127.0.0.1",
) -> DistWorld:
    """Meets the other ranks of ``mesh`` and opens a wire to every group along consecutive axes that ``rank`` is in.

    Args:
        store: a ``torch.distributed`` store that all ranks have, and that nobody else uses.
        address: this host's address that the others can reach.

    Raises:
        PeersLostError: the ranks did not find each other.
    """
    spans = [(first, last) for first in range(mesh.num_axes) for last in range(first + 1, mesh.num_axes + 1)]
    groups = dict.fromkeys(mesh.group(rank, first, last) for first, last in spans)  # in the same order on every rank
    found: Neighbours | str = f"tensors are on {device.type}"
    if device.type == "cpu" and mesh.size > 1:
        found = share(PrefixStore("shared memory", store), rank, mesh.size)
    wires: dict[tuple[int, ...], tuple[Wire, Wire]] = {}
    for slot, ranks in enumerate(groups):
        if isinstance(found, Neighbours) and found.share(ranks):
            shm = ShmWire(found, ranks, slot)
            wires[ranks] = shm, shm
        elif len(ranks) > 1:
            wires[ranks] = open_wires(store, ranks, rank, device, address)
    buffers = found.segment if isinstance(found, Neighbours) else Buffers(device)
    said = _said(found, wires, device)
    return DistWorld(mesh, rank, wires, checked=checked, buffers=buffers, transport=said, device=device)


def _said(found: Neighbours | str, wires: dict[tuple[int, ...], tuple[Wire, Wire]], device: torch.device) -> str:
    """How the groups' collectives travel, for people."""
    if not wires:
        return "none among one rank"
    if device.type != "cpu":
        return "NCCL"
    others = [ranks for ranks, (wire, _) in wires.items() if not isinstance(wire, ShmWire)]
    if not others:
        return "shared memory"
    why = found if isinstance(found, str) else "these ranks cannot open each other's memory"
    if len(others) == len(wires):
        return f"gloo over TCP ({why})"
    return "shared memory, and gloo over TCP where groups cross hosts"


class DistWorld:
    """One rank's :class:`~narrows.comm.world.World` among processes; :func:`connect` makes it.

    Groups other than those of the mesh's consecutive axes have no wire: to ask for one is an error in the plan.
    """

    def __init__(
        self,
        mesh: Mesh,
        rank: int,
        wires: dict[tuple[int, ...], tuple[Wire, Wire]],
        *,
        checked: bool,
        buffers: Buffers | Segment,
        transport: str = "",
        device: torch.device = _CPU,
    ) -> None:
        self.rank = rank
        self.device = device
        self.mesh = mesh
        self.checked = checked
        self.call = 0
        self._where: Where | None = None
        self._recording: Recording | None = None
        self._repeating: Recording | None = None
        self.transport = transport
        self._seats = {ranks: _Seat(ranks, *both) for ranks, both in wires.items()}
        self._buffers = buffers

    @property
    def came(self) -> dict[tuple[int, ...], int]:
        """How often this rank has come to a collective of each group."""
        repeating = self._repeating
        return {ranks: seat.number + (repeating.came(seat) if repeating else 0) for ranks, seat in self._seats.items()}

    @property
    def num_collectives(self) -> int:
        return sum(self.came.values())

    @property
    def where(self) -> Where | None:
        """The collective that this rank came to last. Any thread may ask."""
        repeating = self._repeating
        at = repeating.at() if repeating else None
        if at is None:
            return self._where
        stamp, ranks, since = at
        return Where(stamp._replace(call=self.call), ranks, since)

    def all_gather(
        self, xs: Sequence[Tensor], ranks: tuple[int, ...], counts: Sequence[int], label: str
    ) -> list[Tensor]:
        if len(ranks) == 1:
            return [self._buffers.owned(x) for x in xs]
        seat = self._seat(ranks)
        stamp = seat.stamp("all_gather", label)
        if self.checked:
            stamp = say_rows(stamp, self.rank, seat.me, xs, counts)
        out = self._meet(seat, stamp, seat.wire.gather_fields, xs, counts)
        self._buffers.give_back(xs)
        return out

    def reduce_scatter(
        self,
        x: Tensor,
        ranks: tuple[int, ...],
        counts: Sequence[int],
        label: str,
        addends: Sequence[Tensor] = (),
    ) -> Tensor:
        return self._reduce("reduce_scatter", x, ranks, counts, label, addends)

    def all_reduce(
        self,
        x: Tensor,
        ranks: tuple[int, ...],
        counts: Sequence[int],
        label: str,
        addends: Sequence[Tensor] = (),
    ) -> Tensor:
        return self._reduce("all_reduce", x, ranks, counts, label, addends)

    def _reduce(
        self,
        op: str,
        x: Tensor,
        ranks: tuple[int, ...],
        counts: Sequence[int],
        label: str,
        addends: Sequence[Tensor],
    ) -> Tensor:
        if len(ranks) == 1:
            out = sum_rows([x], 0, x.shape[0], addends) if addends else self._buffers.owned(x)
        else:
            seat = self._seat(ranks)
            stamp = seat.stamp(op, label)
            if self.checked:
                stamp = say_sum(stamp, self.rank, seat.me, x, counts, addends)
            out = self._meet(seat, stamp, seat.wire.reduce, x, counts, addends, op == "all_reduce")
        self._buffers.give_back((x, *addends))
        return out

    def all_reduce_norm(
        self,
        x: Tensor,
        ranks: tuple[int, ...],
        counts: Sequence[int],
        label: str,
        addends: Sequence[Tensor],
        norm: RowNorm,
    ) -> tuple[Tensor, Tensor] | None:
        if len(ranks) == 1:
            return None
        seat = self._seat(ranks)
        wire = seat.wire
        if not isinstance(wire, ShmWire) or not wire.norms(x, addends, norm):
            return None
        stamp = seat.stamp("all_reduce_norm", label)
        if self.checked:
            stamp = say_sum(stamp, self.rank, seat.me, x, counts, addends)
        out = self._meet(seat, stamp, wire.reduce_norm, x, counts, addends, norm)
        self._buffers.give_back((x, *addends))
        return out

    def column_gather(self, x: Tensor, ranks: tuple[int, ...], widths: Sequence[int], label: str) -> Tensor:
        if len(ranks) == 1:
            return self._buffers.owned(x)
        seat = self._seat(ranks)
        stamp = seat.stamp("column_gather", label)
        if self.checked:
            stamp = say_columns(stamp, self.rank, seat.me, x, widths)
        out = self._meet(seat, stamp, seat.wire.gather_columns, x, widths)
        self._buffers.give_back((x,))
        return out

    def broadcast(self, x: Tensor, ranks: tuple[int, ...], root: int, label: str) -> Tensor:
        place = ranks.index(root)
        if len(ranks) == 1:
            return self._buffers.owned(x)
        seat = self._seat(ranks)
        stamp = seat.stamp("broadcast", label)
        if self.checked:
            stamp = say_tensor(stamp, x, root)
        counts = [x.numel() if i == place else 0 for i in range(len(ranks))]
        mine = x.reshape(-1) if seat.me == place else x.new_empty(0)
        out = self._meet(seat, stamp, seat.wire.gather, mine, counts).view(x.shape)
        self._buffers.give_back((x,))
        return out

    def barrier(self, ranks: tuple[int, ...], label: str) -> None:
        if len(ranks) > 1:
            seat = self._seat(ranks)
            self._meet(seat, seat.stamp("barrier", label), seat.bytes.gather, seat.byte, seat.ones)

    def send_buffer(self, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        return self._buffers.lend(rows, width, dtype)

    def _seat(self, ranks: tuple[int, ...]) -> _Seat:
        seat = self._seats.get(ranks)
        assert seat is not None, f"{ranks} is no group of rank {self.rank} along consecutive axes of {self.mesh}"
        return seat

    def _meet(self, seat: _Seat, stamp: Stamp, work: Callable[..., T], *args: Any) -> T:
        """What ``work`` brings; in checked mode nothing is sent before all stamps agree."""
        if self.call:
            stamp = stamp._replace(call=self.call)
        self._where = Where(stamp, seat.ranks, monotonic())
        if self.checked:
            seat.compare(stamp)
        if self._recording is not None:
            self._recording.collective(seat, seat.ranks, stamp)
        try:
            out = work(*args)
        except DifferentCallsError:
            raise _met_others(self.rank, stamp, seat.ranks) from None
        self._where = Where(stamp, seat.ranks, None)
        return out

    # --- walks that are recorded

    def record(self, tape: Tape) -> Recording | None:
        if self.checked or not all(isinstance(seat.wire, ShmWire) for seat in self._seats.values()):
            return None
        self._keep_for(Recording(tape))
        return self._recording

    def recorded(self, count: int) -> None:
        assert self._recording is not None, "nothing is recorded"
        buffers = self._buffers
        self._recording.end(count, buffers.found or () if isinstance(buffers, Segment) else ())
        self._keep_for(None)

    def _keep_for(self, recording: Recording | None) -> None:
        self._recording = recording
        for seat in self._seats.values():
            assert isinstance(seat.wire, ShmWire)
            seat.wire.recording = recording
        if isinstance(self._buffers, Segment):
            self._buffers.found = None if recording is None else []

    def repeat(self, recording: Recording) -> None:
        recording.tape.rewind()
        self._repeating = recording
        while outcome := recording.tape.run():
            at = recording.at()
            assert at is not None, "only an exchange ends a run"
            stamp, ranks, _ = at
            if outcome != NOT_YET:
                raise _met_others(self.rank, stamp, ranks)
            recording.waits()
            wire = self._seat(ranks).wire
            assert isinstance(wire, ShmWire)
            wire.look()
        at = recording.at()
        if at is not None:
            self._where = Where(at[0]._replace(call=self.call), at[1], None)
        self._repeating = None
        recording.done()
        if recording.exchanges and isinstance(self._buffers, Segment):
            last = recording.exchanges[-1][1]
            self._buffers.latest = last, last.number


class _Seat:
    """This rank's place in one group: its wires, and how often it has come there."""

    def __init__(self, ranks: tuple[int, ...], bytes_: Wire, wire: Wire) -> None:
        self.ranks, self.bytes, self.wire = ranks, bytes_, wire
        self.me = wire.me
        self.number = 0
        self.byte = torch.zeros(1, dtype=torch.uint8)
        self.ones = (1,) * len(ranks)

    def stamp(self, op: str, label: str) -> Stamp:
        self.number += 1
        return Stamp(self.number - 1, op, label, len(self.ranks))

    def compare(self, stamp: Stamp) -> None:
        """Raises if the members' stamps differ: first their digests travel, and only if those differ the stamps."""
        said = _encoded(stamp)
        num = len(self.ranks)
        digests = self.bytes.gather(_tensor(blake2b(said, digest_size=_DIGEST).digest()), (_DIGEST,) * num)
        data = digests.numpy().tobytes()
        if data == data[:_DIGEST] * num:
            return
        sizes = self.bytes.gather(torch.tensor([len(said)]), self.ones).tolist()
        texts = torch.split(self.bytes.gather(_tensor(said), sizes), sizes)
        stamps = [_decoded(text.numpy().tobytes()) for text in texts]
        raise CollectiveMismatchError(f"ranks met in different collectives: {mismatch(self.ranks, stamps)}")


def _met_others(rank: int, stamp: Stamp, ranks: tuple[int, ...]) -> CollectiveMismatchError:
    return CollectiveMismatchError(
        f"rank {rank} came to {stamp}, another of {rank_names(ranks)} to something else; in checked mode both are named"
    )


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _encoded(stamp: Stamp) -> bytes:
    shapes = [[dims, str(dtype).removeprefix("torch.")] for dims, dtype in stamp.shapes]
    return json.dumps([*stamp._replace(shapes=())[:4], shapes, stamp.split, stamp.root, stamp.call]).encode()


def _decoded(data: bytes) -> Stamp:
    """A stamp from a peer: plain values, nothing that could run."""
    number, op, label, num_ranks, shapes, split, root, call = json.loads(data)
    fields = tuple((tuple(dims), getattr(torch, name)) for dims, name in shapes)
    return Stamp(number, op, label, num_ranks, fields, tuple(split), root, call)
