"""Keeps the output of every stage and encoded gather on every rank, and replays one run's choice of experts in another.

Put around the steps of an engine by :meth:`Recorder.wrap`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from narrows.arch.stages import RowSet
from narrows.comm.movers import assemble
from narrows.engine.program import Frame, Operation, Registers, Wrap
from narrows.engine.worker import Worker
from narrows.layout import Layout, RowSplit, scattered
from narrows.models.moe import MoeLayer
from narrows.plan.plan import Op

__all__ = ["Copy", "Flip", "Recorder", "Spot"]


@dataclass(frozen=True, slots=True)
class Spot:
    """Where a tensor was left: which stage of which layer (None outside the layers), and which field."""

    layer: int | None
    stage: str
    field: str

    def __str__(self) -> str:
        where = self.stage if self.layer is None else f"layer {self.layer} {self.stage}"
        return f"{where}: {self.field}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Flip:
    """A row whose experts this run would have chosen otherwise, and by how little its own choice was made."""

    step: int
    layer: int
    row: int
    margin: float

    def __str__(self) -> str:
        return f"layer {self.layer}, row {self.row} of step {self.step} (margin {self.margin:.1e})"


@dataclass(frozen=True, slots=True)
class Copy:
    """A whole tensor, and whose rows it was put together from: of ``ranks[r]``, where rank r holds the row too."""

    tensor: Tensor
    ranks: tuple[int, ...]
    layout: Layout
    row_set: RowSet

    def rank_of(self, row: int, rows: RowSplit) -> int | None:
        """The rank that row ``row`` of ``rows``, the split of its row set, was taken from; None where several ranks
        made it together."""
        if not self.layout.is_whole:
            return None
        spans = (rows.span(self.layout, rank) for rank in range(rows.mesh.size))
        return next(self.ranks[rank] for rank, (start, stop) in enumerate(spans) if start <= row < stop)


class Recorder:
    """One run's tensors, step by step.

    Args:
        num_ranks: ranks of the engine it is put around.
        replay: the routing of another run: (step, layer) -> chosen experts of all rows, [rows, K].
    """

    def __init__(self, num_ranks: int, replay: dict[tuple[int, int], Tensor] | None = None) -> None:
        self.num_ranks, self.replay = num_ranks, replay
        self.step = 0
        self.routing: dict[tuple[int, int], Tensor] = {}
        self.flips: list[Flip] = []
        self._layouts: dict[Spot, tuple[Layout, RowSet]] = {}
        self._shards: dict[Spot, list[Tensor | None]] = {}

    def begin(self, step: int) -> None:
        """Forget the tensors of the step before; the next ones belong to ``step``."""
        self.step = step
        self._shards = {}

    def copies(self, rows: RowSplit, logits: RowSplit) -> dict[Spot, list[Copy]]:
        """The output of every stage of this step, assembled from all ranks, in the order of the stages.

        Where several ranks hold the same rows there are as many copies, each assembled from other ranks, so that
        every rank's rows are in one of them. An owed sum is taken, and columns are laid side by side: one copy.
        ``rows`` and ``logits``: the step's row splits.
        """
        splits = {RowSet.ALL: rows, RowSet.LOGITS: logits}
        mesh, out = rows.mesh, dict[Spot, list[Copy]]()
        for spot, shards in self._shards.items():
            layout, row_set = self._layouts[spot]
            held = [_matrix(shard) for shard in shards if shard is not None]
            blocks = [mesh.group(rank, layout.num_leading, mesh.num_axes) for rank in range(mesh.size)]
            num_copies = len(blocks[0]) if layout.is_whole else 1
            out[spot] = []
            for i in range(num_copies):
                ranks = tuple(block[i] for block in blocks) if layout.is_whole else tuple(range(mesh.size))
                whole = assemble(layout, splits[row_set], [held[rank] for rank in ranks])
                out[spot].append(Copy(whole, ranks, layout, row_set))
        return out

    def wrap(self, worker: Worker) -> Wrap:
        """The wrapper that records, and replays if requested, every stage that ``worker`` binds."""
        rank = worker.rank_context.rank

        def around(
            layer: int | None, op: Op, reads: tuple[int, ...], writes: tuple[int, ...], operation: Operation
        ) -> Operation:
            if op.stage is None and not op.encoded:
                return operation
            if op.name == "router" and layer is not None:
                operation = self._router(worker, layer, op, reads, writes, operation)
            where = f"{op.name} before {op.boundary}" if op.stage is None else op.stage.name
            spots = [Spot(layer, where, name) for name in op.writes]

            def recorded(regs: Registers, frame: Frame) -> None:
                operation(regs, frame)
                for spot, register, layout in zip(spots, writes, op.writes_at, strict=True):
                    self._layouts[spot] = (layout, op.row_set)
                    shards = self._shards.setdefault(spot, [None] * self.num_ranks)
                    shards[rank] = regs[register].clone()  # the register may be a buffer that is used again

            return recorded

        return around

    def _router(
        self,
        worker: Worker,
        layer: int,
        op: Op,
        reads: tuple[int, ...],
        writes: tuple[int, ...],
        operation: Operation,
    ) -> Operation:
        routed = worker.model.layers[layer]
        assert isinstance(routed, MoeLayer)
        mesh, rank, layout = worker.rank_context.mesh, worker.rank_context.rank, op.layout
        ids, weights = writes

        def record(regs: Registers, frame: Frame) -> None:
            operation(regs, frame)
            self.routing[self.step, layer] = regs[ids].clone()

        def replayed(regs: Registers, frame: Frame) -> None:
            assert self.replay is not None
            held = _rows_held(frame, op.row_set, layout, rank)
            forced = self.replay[self.step, layer][held].to(torch.int64)
            hidden = regs[reads[0]]
            own = routed.route(hidden, with_margin=True)
            chosen = routed.route(hidden, forced)
            regs[ids], regs[weights] = forced.to(torch.int32), chosen.topk_weights_TK
            differs = (own.topk_ids_TK.sort(-1).values != forced.sort(-1).values).any(-1)
            assert own.margin_T is not None
            first, last = frame.rows.span(scattered(mesh), rank)  # others hold these rows too: one rank reports each
            for at in differs.nonzero().flatten().tolist():
                if first <= held[at] < last:
                    margin = float(own.margin_T[at])
                    self.flips.append(Flip(step=self.step, layer=layer, row=held[at], margin=margin))

        return record if self.replay is None else replayed


def _rows_held(frame: Frame, row_set: RowSet, layout: Layout, rank: int) -> list[int]:
    """Which rows of the step, of all in order, ``rank`` holds in ``layout``."""
    if row_set is RowSet.ALL:
        return list(range(*frame.rows.span(layout, rank)))
    start, stop = frame.logits.span(layout, rank)
    return list(frame.logit_rows[start:stop])


def _matrix(tensor: Tensor) -> Tensor:
    """Ids are one number per row; everything else has rows and columns already."""
    return tensor.unsqueeze(-1) if tensor.dim() == 1 else tensor
