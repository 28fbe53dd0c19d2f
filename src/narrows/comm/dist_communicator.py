"""The communicator among processes, of one host or of several: shared memory or gloo on CPU, NCCL on GPUs.

`ranks/` starts the processes and watches them. It names a rank that does not come, from
:attr:`DistCommunicator.where`, which says at any moment what this rank waits at.
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
from narrows.comm.communicator import RowNorm
from narrows.comm.fingerprint import Fingerprint, mismatch, rank_names, say_columns, say_rows, say_sum, say_tensor
from narrows.comm.recording import Recording, Tape
from narrows.comm.segment import Segment
from narrows.comm.shm_calls import NOT_YET
from narrows.comm.shm_peers import ShmPeers, share
from narrows.comm.shm_transport import ShmTransport
from narrows.comm.sums import sum_rows
from narrows.comm.transport import DifferentCallsError, Transport, open_transports
from narrows.errors import CollectiveMismatchError
from narrows.layout import Mesh

__all__ = ["DistCommunicator", "Where", "connect"]

T = TypeVar("T")

_DIGEST = 16
"""Bytes of a fingerprint that travel when all fingerprints are equal."""


_CPU = torch.device("cpu")


class Where(NamedTuple):
    """The collective that a rank came to last: since when it is there, or that it has left (``since`` None)."""

    fingerprint: Fingerprint
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
) -> DistCommunicator:
    """Meets the other ranks of ``mesh`` and opens a transport for each of ``rank``'s groups along consecutive axes.

    Args:
        store: a ``torch.distributed`` store that all ranks have, and that nobody else uses.
        address: this host's address that the others can reach.

    Raises:
        PeersLostError: the ranks did not find each other.
    """
    spans = [(first, last) for first in range(mesh.num_axes) for last in range(first + 1, mesh.num_axes + 1)]
    groups = dict.fromkeys(mesh.group(rank, first, last) for first, last in spans)  # in the same order on every rank
    found: ShmPeers | str = f"tensors are on {device.type}"
    if device.type == "cpu" and mesh.size > 1:
        found = share(PrefixStore("shared memory", store), rank, mesh.size)
    transports: dict[tuple[int, ...], tuple[Transport, Transport]] = {}
    for slot, ranks in enumerate(groups):
        if isinstance(found, ShmPeers) and found.share(ranks):
            shm = ShmTransport(found, ranks, slot)
            transports[ranks] = shm, shm
        elif len(ranks) > 1:
            transports[ranks] = open_transports(store, ranks, rank, device, address)
    buffers = found.segment if isinstance(found, ShmPeers) else Buffers(device)
    said = _said(found, transports, device)
    return DistCommunicator(mesh, rank, transports, checked=checked, buffers=buffers, transport=said, device=device)


def _said(
    found: ShmPeers | str, transports: dict[tuple[int, ...], tuple[Transport, Transport]], device: torch.device
) -> str:
    """How the groups' collectives travel, for people."""
    if not transports:
        return "none among one rank"
    if device.type != "cpu":
        return "NCCL"
    others = [ranks for ranks, (transport, _) in transports.items() if not isinstance(transport, ShmTransport)]
    if not others:
        return "shared memory"
    why = found if isinstance(found, str) else "these ranks cannot open each other's memory"
    if len(others) == len(transports):
        return f"gloo over TCP ({why})"
    return "shared memory, and gloo over TCP where groups cross hosts"


class DistCommunicator:
    """One rank's :class:`~narrows.comm.communicator.Communicator` among processes; :func:`connect` makes it.

    Groups other than those of the mesh's consecutive axes have no transport: to ask for one is an error in the plan.
    """

    def __init__(
        self,
        mesh: Mesh,
        rank: int,
        transports: dict[tuple[int, ...], tuple[Transport, Transport]],
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
        self._members = {ranks: _Member(ranks, *both) for ranks, both in transports.items()}
        self._buffers = buffers

    @property
    def came(self) -> dict[tuple[int, ...], int]:
        """How often this rank has come to a collective of each group."""
        repeating = self._repeating
        return {
            ranks: member.number + (repeating.came(member) if repeating else 0)
            for ranks, member in self._members.items()
        }

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
        fingerprint, ranks, since = at
        return Where(fingerprint._replace(call=self.call), ranks, since)

    def all_gather(
        self, xs: Sequence[Tensor], ranks: tuple[int, ...], counts: Sequence[int], label: str
    ) -> list[Tensor]:
        if len(ranks) == 1:
            return [self._buffers.owned(x) for x in xs]
        member = self._member(ranks)
        fingerprint = member.fingerprint("all_gather", label)
        if self.checked:
            fingerprint = say_rows(fingerprint, self.rank, member.me, xs, counts)
        out = self._meet(member, fingerprint, member.transport.gather_fields, xs, counts)
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
            member = self._member(ranks)
            fingerprint = member.fingerprint(op, label)
            if self.checked:
                fingerprint = say_sum(fingerprint, self.rank, member.me, x, counts, addends)
            out = self._meet(member, fingerprint, member.transport.reduce, x, counts, addends, op == "all_reduce")
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
        member = self._member(ranks)
        transport = member.transport
        if not isinstance(transport, ShmTransport) or not transport.norms(x, addends, norm):
            return None
        fingerprint = member.fingerprint("all_reduce_norm", label)
        if self.checked:
            fingerprint = say_sum(fingerprint, self.rank, member.me, x, counts, addends)
        out = self._meet(member, fingerprint, transport.reduce_norm, x, counts, addends, norm)
        self._buffers.give_back((x, *addends))
        return out

    def column_gather(self, x: Tensor, ranks: tuple[int, ...], widths: Sequence[int], label: str) -> Tensor:
        if len(ranks) == 1:
            return self._buffers.owned(x)
        member = self._member(ranks)
        fingerprint = member.fingerprint("column_gather", label)
        if self.checked:
            fingerprint = say_columns(fingerprint, self.rank, member.me, x, widths)
        out = self._meet(member, fingerprint, member.transport.gather_columns, x, widths)
        self._buffers.give_back((x,))
        return out

    def broadcast(self, x: Tensor, ranks: tuple[int, ...], root: int, label: str) -> Tensor:
        place = ranks.index(root)
        if len(ranks) == 1:
            return self._buffers.owned(x)
        member = self._member(ranks)
        fingerprint = member.fingerprint("broadcast", label)
        if self.checked:
            fingerprint = say_tensor(fingerprint, x, root)
        counts = [x.numel() if i == place else 0 for i in range(len(ranks))]
        mine = x.reshape(-1) if member.me == place else x.new_empty(0)
        out = self._meet(member, fingerprint, member.transport.gather, mine, counts).view(x.shape)
        self._buffers.give_back((x,))
        return out

    def barrier(self, ranks: tuple[int, ...], label: str) -> None:
        if len(ranks) > 1:
            member = self._member(ranks)
            self._meet(member, member.fingerprint("barrier", label), member.bytes.gather, member.byte, member.ones)

    def send_buffer(self, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        return self._buffers.lend(rows, width, dtype)

    def _member(self, ranks: tuple[int, ...]) -> _Member:
        member = self._members.get(ranks)
        assert member is not None, f"{ranks} is no group of rank {self.rank} along consecutive axes of {self.mesh}"
        return member

    def _meet(self, member: _Member, fingerprint: Fingerprint, work: Callable[..., T], *args: Any) -> T:
        """What ``work`` brings; in checked mode nothing is sent before all fingerprints agree."""
        if self.call:
            fingerprint = fingerprint._replace(call=self.call)
        self._where = Where(fingerprint, member.ranks, monotonic())
        if self.checked:
            member.compare(fingerprint)
        if self._recording is not None:
            self._recording.collective(member, member.ranks, fingerprint)
        try:
            out = work(*args)
        except DifferentCallsError:
            raise _met_others(self.rank, fingerprint, member.ranks) from None
        self._where = Where(fingerprint, member.ranks, None)
        return out

    # --- walks that are recorded

    def record(self, tape: Tape) -> Recording | None:
        if self.checked or not all(isinstance(member.transport, ShmTransport) for member in self._members.values()):
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
        for member in self._members.values():
            assert isinstance(member.transport, ShmTransport)
            member.transport.recording = recording
        if isinstance(self._buffers, Segment):
            self._buffers.found = None if recording is None else []

    def repeat(self, recording: Recording) -> None:
        recording.tape.rewind()
        self._repeating = recording
        while outcome := recording.tape.run():
            at = recording.at()
            assert at is not None, "only an exchange ends a run"
            fingerprint, ranks, _ = at
            if outcome != NOT_YET:
                raise _met_others(self.rank, fingerprint, ranks)
            recording.waits()
            transport = self._member(ranks).transport
            assert isinstance(transport, ShmTransport)
            transport.look()
        at = recording.at()
        if at is not None:
            self._where = Where(at[0]._replace(call=self.call), at[1], None)
        self._repeating = None
        recording.done()
        if recording.exchanges and isinstance(self._buffers, Segment):
            last = recording.exchanges[-1][1]
            self._buffers.latest = last, last.number


class _Member:
    """This rank's place in one group: its transports, and how often it has come there."""

    def __init__(self, ranks: tuple[int, ...], bytes_: Transport, transport: Transport) -> None:
        self.ranks, self.bytes, self.transport = ranks, bytes_, transport
        self.me = transport.me
        self.number = 0
        self.byte = torch.zeros(1, dtype=torch.uint8)
        self.ones = (1,) * len(ranks)

    def fingerprint(self, op: str, label: str) -> Fingerprint:
        self.number += 1
        return Fingerprint(self.number - 1, op, label, len(self.ranks))

    def compare(self, fingerprint: Fingerprint) -> None:
        """Raises if the members' fingerprints differ: first by their digests, then in full."""
        said = _encoded(fingerprint)
        num = len(self.ranks)
        digests = self.bytes.gather(_tensor(blake2b(said, digest_size=_DIGEST).digest()), (_DIGEST,) * num)
        data = digests.numpy().tobytes()
        if data == data[:_DIGEST] * num:
            return
        sizes = self.bytes.gather(torch.tensor([len(said)]), self.ones).tolist()
        texts = torch.split(self.bytes.gather(_tensor(said), sizes), sizes)
        fingerprints = [_decoded(text.numpy().tobytes()) for text in texts]
        raise CollectiveMismatchError(f"ranks met in different collectives: {mismatch(self.ranks, fingerprints)}")


def _met_others(rank: int, fingerprint: Fingerprint, ranks: tuple[int, ...]) -> CollectiveMismatchError:
    return CollectiveMismatchError(
        f"rank {rank} came to {fingerprint}, another of {rank_names(ranks)} to something else; "
        "in checked mode both are named"
    )


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _encoded(fingerprint: Fingerprint) -> bytes:
    shapes = [[dims, str(dtype).removeprefix("torch.")] for dims, dtype in fingerprint.shapes]
    return json.dumps(
        [*fingerprint._replace(shapes=())[:4], shapes, fingerprint.split, fingerprint.root, fingerprint.call]
    ).encode()


def _decoded(data: bytes) -> Fingerprint:
    """A fingerprint from a peer: plain values, nothing that could run."""
    number, op, label, num_ranks, shapes, split, root, call = json.loads(data)
    fields = tuple((tuple(dims), getattr(torch, name)) for dims, name in shapes)
    return Fingerprint(number, op, label, num_ranks, fields, tuple(split), root, call)
