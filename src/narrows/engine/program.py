"""A plan bound to one rank's model and communicator: a flat tuple of callables that run in order once per step.

Binding resolves every name: fields become numbered registers, stages bound methods, moves movers. A step looks nothing
up by name and checks no layout. What changes from step to step (row counts) comes as a :class:`Frame`, computed once
per step for each distinct move.

An addend that joins an owed sum is not added when its op comes. It is kept for the move that completes the sum, which
adds it in float32. If rows are selected before that move, the addend's rows are selected too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from narrows.arch.stages import Field, Role, RowSet, StageKind
from narrows.comm.communicator import Communicator
from narrows.comm.movers import Geometry, Mover
from narrows.comm.transport import RowNorm
from narrows.engine.step_record import BoundOp, StepRecord
from narrows.layout import Encoding, Layout, MoveKind, RowSplit
from narrows.models.decoder import Decoder, StepInputs
from narrows.ops.add_rows import add_rows
from narrows.ops.encode_rows import decode_rows, encode_rows
from narrows.ops.step_block import Part, StepBlock
from narrows.plan.plan import Op, OpKind, Plan

__all__ = ["Frame", "Operation", "Program", "Registers", "Wrap", "bind"]

Registers = list[Any]
Operation = Callable[[Registers, "Frame"], None]
Wrap = Callable[[int | None, Op, tuple[int, ...], tuple[int, ...], Operation], Operation]
"""Puts something around one bound step: (layer, step, registers read, registers written, operation) -> operation."""
Selections = tuple[Part | None, ...]


_REDUCES = (MoveKind.ALL_REDUCE, MoveKind.REDUCE_SCATTER)
_CODES = {Encoding.INT8: torch.int8, Encoding.FP8: torch.float8_e4m3fn}


@dataclass(slots=True)
class Frame:
    """One step of the engine on this rank: the model's inputs, and the row counts of every move and selection."""

    inputs: StepInputs
    rows: RowSplit
    logits: RowSplit
    geometries: tuple[Geometry, ...]
    logit_rows: Sequence[int]
    """The rows, of all, that ask for logits."""
    selections: tuple[Tensor | None, ...]
    """Which of the rows held in a layout ask for logits, one tensor per layout that rows are selected in; None: all."""
    dead: tuple[Tensor | None, ...]
    """Which of the rows held where a router runs are dead, [rows, 1] bool; None: none. Their choice is no expert."""
    out_rows: tuple[int, ...]
    """Rows that this rank leaves in each layout and row set that a stage writes into a send buffer."""


class Program:
    """A bound plan. ``outputs`` are the registers of fields that are still there at the end."""

    def __init__(self, binder: _Binder) -> None:
        self.operations = tuple(binder.operations)
        self.ops = tuple(binder.ops)
        """What each of them is."""
        self.capturable = binder.capturable
        """Whether steps of it may be captured (`capture.py`): nothing is wrapped around its operations."""
        self._moves = tuple(binder.moves)
        self._selected = tuple(binder.selected)
        self._outs = tuple(binder.outs)
        self._routed = tuple(binder.routed)
        self._num_registers = len(binder.registers)
        self._rank = binder.comm.rank
        self.outputs = dict(binder.registers)

    def stage_selections(self, rows: RowSplit, logit_rows: Sequence[int], block: StepBlock) -> Selections:
        """Puts the numbers of the rows that are selected, in each layout that rows are selected in, into ``block``."""
        selections: list[Part | None] = []
        for layout in self._selected:
            start, stop = rows.span(layout, self._rank)
            picked = [row - start for row in logit_rows if start <= row < stop]
            selections.append(None if len(picked) == stop - start else block.put(picked))
        return tuple(selections)

    def frame(
        self,
        inputs: StepInputs,
        rows: RowSplit,
        logits: RowSplit,
        logit_rows: Sequence[int],
        selections: Selections,
        dead_T: Tensor | None = None,
    ) -> Frame:
        """The numbers of one step: ``rows`` and ``logits`` are its row splits, ``logit_rows`` the rows selected, and
        ``selections`` what :meth:`stage_selections` put into the block, which has been sent. ``dead`` [T] bool: rows
        that only pad, in a step whose rows all ask for logits."""
        splits = {RowSet.ALL: rows, RowSet.LOGITS: logits}
        return Frame(
            inputs=inputs,
            rows=rows,
            logits=logits,
            logit_rows=logit_rows,
            geometries=tuple(mover.geometry(splits[row_set]) for mover, row_set in self._moves),
            selections=tuple(None if part is None else part.tensor for part in selections),
            dead=tuple(self._dead_in(layout, splits[row_set], dead_T) for layout, row_set in self._routed),
            out_rows=tuple(splits[row_set].num_rows(layout, self._rank) for layout, row_set in self._outs),
        )

    def _dead_in(self, layout: Layout, split: RowSplit, dead_T: Tensor | None) -> Tensor | None:
        if dead_T is None:
            return None
        start, stop = split.span(layout, self._rank)
        return dead_T[start:stop].unsqueeze(-1)

    def run(self, frame: Frame, ids: Tensor, record: StepRecord | None = None) -> Registers:
        """Run the plan once; the registers then hold :attr:`outputs`. ``record``: keep times there."""
        registers = self.registers(ids)
        self.run_from(0, registers, frame, record)
        return registers

    def run_from(self, number: int, registers: Registers, frame: Frame, record: StepRecord | None) -> None:
        """Run the operations from ``number`` on."""
        operations = self.operations if not number else self.operations[number:]
        if record is None:
            for operation in operations:
                operation(registers, frame)
            return
        for at, operation in enumerate(operations, start=number):
            record.run(at, operation, registers, frame)

    def registers(self, ids: Tensor) -> Registers:
        """The registers before the first operation."""
        return [ids, *[None] * (self._num_registers - 1)]


def bind(
    plan: Plan,
    model: Decoder,
    comm: Communicator,
    fields: dict[str, Field],
    *,
    checked: bool = False,
    validate: bool = True,
    wrap: Wrap | None = None,
) -> Program:
    """Bind ``plan`` to one rank's ``model`` and ``comm``.

    ``checked``: after every op the rows and columns of its outputs are compared with its layout. ``validate``: check
    the plan's layouts first; only tests that plant a fault switch that off.

    Raises:
        PlanError: the plan would read a field whose sum is owed, or in a wrong layout.
    """
    if validate:
        plan.validate()
    return Program(_Binder(plan, model, comm, fields, checked, wrap))


class _Binder:
    def __init__(
        self,
        plan: Plan,
        model: Decoder,
        comm: Communicator,
        fields: dict[str, Field],
        checked: bool,
        wrap: Wrap | None,
    ) -> None:
        self.plan, self.model, self.comm, self.fields = plan, model, comm, fields
        self.operations: list[Operation] = []
        self.ops: list[BoundOp] = []
        self.capturable = not checked
        self.registers: dict[str, int] = {plan.roles.input: 0}
        self.moves: list[tuple[Mover, RowSet]] = []
        self.selected: list[Layout] = []
        self.outs: list[tuple[Layout, RowSet]] = []
        self.routed: list[tuple[Layout, RowSet]] = []
        self._owed: list[tuple[int, Layout]] = []  # registers of addends that wait for a sum to be completed
        self._geometry_of: dict[tuple[Layout, Layout, RowSet], int] = {}
        ops = list(plan.ops())
        for i, (layer, op) in enumerate(ops):
            following = next((s for _, s in ops[i + 1 :] if s.kind is not OpKind.ADD or not s.joins), None)
            operation = self._bind(layer, op, following)
            reads = tuple(self._register(name) for name in op.reads)
            writes = tuple(self._register(name) for name in op.writes)
            if checked:
                operation = self._check(layer, op, operation)
            if wrap is not None:
                bare, operation = operation, wrap(layer, op, reads, writes, operation)
                self.capturable &= operation is bare
            self.operations.append(operation)
            self.ops.append(BoundOp.of(layer, op, reads, writes))

    def _register(self, name: str) -> int:
        return self.registers.setdefault(name, len(self.registers))

    def _index(self, known: list[Any], one: Any) -> int:
        if one not in known:
            known.append(one)
        return known.index(one)

    def _bind(self, layer: int | None, op: Op, following: Op | None) -> Operation:
        if op.kind is OpKind.STAGE:
            return self._stage(layer, op, following)
        if op.kind is OpKind.MOVE:
            return self._move(layer, op)
        if op.kind is OpKind.ADD:
            return self._add(op)
        return self._select(op)

    def _stage(self, layer: int | None, op: Op, following: Op | None) -> Operation:
        method = getattr(self.model if layer is None else self.model.layers[layer], op.name)
        reads = [self._register(name) for name in op.reads]
        writes = [self._register(name) for name in op.writes]
        if op.stage is not None and op.stage.role is Role.ROUTER:
            return self._router(op, method, reads, writes)
        if len(writes) == 2:
            first, second = writes

            def write_two(regs: Registers, frame: Frame) -> None:
                regs[first], regs[second] = method(frame.inputs, *[regs[i] for i in reads])

            return write_two
        (write,) = writes
        if following is not None and self._feeds(op, following):
            field = self.fields[op.writes[0]]
            at = self._index(self.outs, (op.leaves, op.row_set))
            lend, width, dtype = self.comm.send_buffer, field.width, self.model.rank_context.dtype

            def write_out(regs: Registers, frame: Frame) -> None:
                out = lend(frame.out_rows[at], width, dtype)
                regs[write] = method(frame.inputs, *[regs[i] for i in reads], out=out)

            return write_out

        def write_one(regs: Registers, frame: Frame) -> None:
            regs[write] = method(frame.inputs, *[regs[i] for i in reads])

        return write_one

    def _router(self, op: Op, method: Callable[..., Any], reads: list[int], writes: list[int]) -> Operation:
        """A router, whose choice for dead rows is no expert."""
        at = self._index(self.routed, (op.layout, op.row_set))
        ids, weights = writes

        def choose(regs: Registers, frame: Frame) -> None:
            regs[ids], regs[weights] = method(frame.inputs, *[regs[i] for i in reads])
            dead = frame.dead[at]
            if dead is not None:
                regs[ids].masked_fill_(dead, -1)

        return choose

    def _feeds(self, op: Op, following: Op) -> bool:
        """Whether the next step takes the sum that this stage leaves: then it writes where that move sends from."""
        return (
            op.stage is not None
            and op.stage.kind is StageKind.SHARDED
            and op.leaves.owes_sum
            and following.move is not None
            and following.move.kind in _REDUCES
            and following.reads[:1] == op.writes
        )

    def _move(self, layer: int | None, op: Op) -> Operation:
        assert op.move is not None
        columns = self._columns(op) if op.move.kind is MoveKind.COLUMN_GATHER else None
        where = op.boundary if layer is None else f"layer {layer} {op.boundary}"
        fields = "+".join(f"{name} as {op.encoded[name]}" if name in op.encoded else name for name in op.reads)
        mover = Mover(self.comm, op.move, f"{where}: {op.name} {fields}", columns)
        key = (op.move.src, op.move.dst, op.row_set)
        if key not in self._geometry_of:
            self._geometry_of[key] = len(self.moves)
            self.moves.append((mover, op.row_set))
        at = self._geometry_of[key]
        registers = [self._register(name) for name in op.reads]
        if op.stage is not None:
            return self._reduce_norm(layer, op, mover, at)
        if op.encoded:
            return self._encoded_gather(op, mover, at)
        if op.move.kind in _REDUCES and self._owed and not op.leaves.owes_sum:
            addends = [register for register, _ in self._owed]
            self._owed.clear()
            (register,) = registers

            def complete_sum(regs: Registers, frame: Frame) -> None:
                (regs[register],) = mover([regs[register]], frame.geometries[at], [regs[i] for i in addends])

            return complete_sum

        def move(regs: Registers, frame: Frame) -> None:
            moved = mover([regs[i] for i in registers], frame.geometries[at])
            for i, tensor in zip(registers, moved, strict=True):
                regs[i] = tensor

        return move

    def _reduce_norm(self, layer: int | None, op: Op, mover: Mover, at: int) -> Operation:
        """An all-reduce and its norm at once where the communicator can, else one after the other: equal bits."""
        module = self.model if layer is None else self.model.layers[layer]
        norm, (weight, eps) = getattr(module, op.boundary), module.norm_of(op.boundary)
        hidden, *apart = (self._register(name) for name in op.reads)
        writes = [self._register(name) for name in op.writes]
        addends = [register for register, _ in self._owed]
        self._owed.clear()

        def reduce_and_norm(regs: Registers, frame: Frame) -> None:
            x, joined = regs[hidden], [regs[i] for i in addends]
            residual = regs[apart[0]] if apart else None
            done = mover.reduce_norm(x, frame.geometries[at], joined, RowNorm(weight, eps, residual))
            if done is None:
                (x,) = mover([x], frame.geometries[at], joined)
                done = norm(frame.inputs, x, residual)
            if len(writes) == 2:
                regs[writes[0]], regs[writes[1]] = done
            else:
                regs[writes[0]] = done if isinstance(done, Tensor) else done[0]

        return reduce_and_norm

    def _encoded_gather(self, op: Op, mover: Mover, at: int) -> Operation:
        """Encode, gather, decode. This rank's own rows come back through the gather too, so that they are decoded
        like all others: the field has the same bits on every rank that holds it."""
        travels = [
            (self._register(name), _CODES.get(encoding)) for name, encoding in zip(op.reads, op.encodings, strict=True)
        ]
        lend, plain = self.comm.send_buffer, self.model.rank_context.dtype

        def gather(regs: Registers, frame: Frame) -> None:
            sent: list[Tensor] = []
            for i, codes in travels:
                if codes is None:
                    sent.append(regs[i])
                    continue
                rows, width = regs[i].shape
                encoded, scales = encode_rows(regs[i], codes, out=lend(rows, width, codes))
                sent += encoded.view(torch.uint8), scales  # as plain bytes: not every transport supports fp8
            came = iter(mover(sent, frame.geometries[at]))
            for i, codes in travels:
                tensor = next(came)
                regs[i] = tensor if codes is None else decode_rows(tensor.view(codes), next(came), plain)

        return gather

    def _columns(self, op: Op) -> tuple[int, ...]:
        """Columns per rank of the world; a cut along the last axes only repeats in every group."""
        columns = self.fields[op.reads[0]].columns
        return columns * (self.comm.mesh.size // len(columns))

    def _add(self, op: Op) -> Operation:
        hidden, addend = (self._register(name) for name in op.reads)
        if op.joins:
            # The addend waits in its own register, since its field may be written again before the sum is taken.
            waiting = self._register(f"{op.reads[1]} joining the sum before {op.boundary}")
            self._owed.append((waiting, op.reads_at[1]))

            def join(regs: Registers, frame: Frame) -> None:
                regs[waiting] = regs[addend]

            return join

        def add(regs: Registers, frame: Frame) -> None:
            regs[hidden] = add_rows(regs[hidden], regs[addend])

        return add

    def _select(self, op: Op) -> Operation:
        chosen = [
            (self._register(name), self._index(self.selected, layout))
            for name, layout in zip(op.reads, op.reads_at, strict=True)
        ]
        chosen += [(register, self._index(self.selected, layout)) for register, layout in self._owed]

        def select(regs: Registers, frame: Frame) -> None:
            for register, at in chosen:
                rows = frame.selections[at]
                if rows is not None:
                    regs[register] = regs[register].index_select(0, rows)

        return select

    def _check(self, layer: int | None, op: Op, operation: Operation) -> Operation:
        rank = self.comm.rank
        where = op.name if layer is None else f"layer {layer} {op.name}"
        expected = [
            (self._register(name), name, layout, self._width(name, layout))
            for name, layout in zip(op.writes, op.writes_at, strict=True)
        ]
        after_selection = op.row_set is RowSet.LOGITS

        def checked(regs: Registers, frame: Frame) -> None:
            operation(regs, frame)
            split = frame.logits if after_selection else frame.rows
            for register, name, layout, width in expected:
                shape = tuple(regs[register].shape)
                wanted = (split.num_rows(layout, rank), width)
                assert shape[0] == wanted[0] and (len(shape) == 1 or shape[1] == width), (
                    f"rank {rank}: {where} left {name} with shape {shape}, but {layout} means {wanted}"
                )

        return checked

    def _width(self, name: str, layout: Layout) -> int:
        field = self.fields[name]
        return self._columns_of(field)[self.comm.rank] if layout.holds_columns else field.width

    def _columns_of(self, field: Field) -> tuple[int, ...]:
        return field.columns * (self.comm.mesh.size // len(field.columns))
