"""The memory that a step needs beside weights and KV cache, on the rank with the most rows.

The plan says which rows of which field a rank holds at every op, so the peak is counted. Fields live until they are
written again, as registers of the engine do. A stage also holds what is between its products, and a collective has a
buffer. How much a kernel needs depends on the backend: compiled code or plain torch on CPUs, torch on GPUs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from narrows.arch.stages import AttentionCore, Field, Gemm, GroupedGemm, PriceClass, Role, RowSet, Stage, Stream
from narrows.cost.imbalance import imbalance
from narrows.cost.pricer import StepShape
from narrows.layout import Layout, MoveKind
from narrows.plan.plan import Op, OpKind, Plan

__all__ = ["MASK_BYTES", "POOL", "Kernels", "Workspace", "workspace"]

EXPANDED_VALUES, FUSED_VALUES = 1 << 24, 1 << 29
"""Values of keys and values that plain latent attention expands at once, and those where one kernel attends to them, on
GPUs in 16 bits (`ops/mla_attention.py`)."""
SUMMED_VALUES = 1 << 26
"""Values of rows' experts that are weighted and summed at once on GPUs (`ops/experts.py`)."""
SCORES = 1 << 22
"""Scores that plain attention on CPUs holds at once (`ops/causal_attention.py`)."""
MASK_BYTES = 4
"""Per row and token of its context, where torch's 16-bit kernels on GPUs need a mask, for windows: the mask, its
inverse, and the two bytes of the addend that torch makes of it (`ops/causal_attention.py`). Not measured on a GPU."""
HEAP = 1.5
"""What glibc's heap takes for tensors of many sizes over what they hold: at most 1.4 in benchmarks/memory.py."""
POOL = 1.1
"""The same of a GPU's caching allocator, assumed."""
SAMPLED_ROWS = 3
"""Rows of float32 logits that sampling holds for each: as they came, changed, and sorted."""


@dataclass(frozen=True, slots=True)
class Kernels:
    """What computes. ``cpu``: ranks of one host; ``compiled``: products on packed weights (bf16 and int8 on CPUs);
    ``itemsize``: bytes of an activation; ``skew``: of the choice of experts (:mod:`narrows.cost.imbalance`)."""

    cpu: bool
    compiled: bool
    itemsize: int
    skew: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """Bytes of one step on the rank that needs most. ``activations``: fields and what stages hold between their
    products, at the op where they are most; ``kept``: what kernels keep for their next call; ``collectives``: buffers
    that ranks exchange through; ``logits``: rows of float32 logits while tokens are sampled."""

    activations: int = 0
    kept: int = 0
    collectives: int = 0
    logits: int = 0

    @property
    def total(self) -> int:
        return self.activations + self.kept + self.collectives + self.logits

    def most(self, other: Workspace) -> Workspace:
        """The one that takes more."""
        return max(self, other, key=lambda each: each.total)


def workspace(plan: Plan, fields: Mapping[str, Field], kernels: Kernels) -> Workspace:
    """The peak over the ops of ``plan``. ``fields`` are those of its chain."""
    shape = plan.shape
    held: dict[str, float] = {}
    peak = kept = buffers = logits = 0.0
    for segment in plan.segments:
        for op in segment.ops:
            written = {
                name: _field_bytes(fields[name], layout, op.row_set, shape)
                for name, layout in zip(op.writes, op.writes_at, strict=True)
            }
            if op.kind is OpKind.ADD and op.joins:  # the addend waits for the sum, whatever its field becomes
                held[f"{op.reads[1]} before {op.boundary}"] = held.get(op.reads[1], 0.0)
            inside, keeps, sampled = 0.0, 0.0, 0.0
            if op.kind is OpKind.STAGE and op.stage is not None:
                inside, keeps, sampled = _stage(op.stage, op, shape, kernels)
            peak = max(peak, sum(held.values()) + sum(written.values()) + inside)
            kept, logits = max(kept, keeps), max(logits, sampled)
            buffers = max(buffers, _buffer(op, fields, shape))
            held |= written
    return Workspace(
        activations=round(peak * (HEAP if kernels.cpu else POOL)),
        kept=round(kept),
        collectives=round(2 * buffers),  # one is read by others while the next is written
        logits=round(logits),
    )


def _field_bytes(field: Field, layout: Layout, row_set: RowSet, shape: StepShape) -> float:
    """Of the fullest rank."""
    rows = shape.split(row_set).largest(layout)
    if layout.holds_columns and field.columns:
        return rows * max(field.columns) * field.itemsize
    return rows * field.row_bytes


def _buffer(op: Op, fields: Mapping[str, Field], shape: StepShape) -> float:
    """What a collective sends, and what an all-reduce makes on the way."""
    if op.move is None or op.move.kind is MoveKind.SLICE:
        return 0.0
    sent = sum(
        _field_bytes(fields[name], layout, op.row_set, shape)
        for name, layout in zip(op.reads, op.reads_at, strict=True)
    )
    return sent * (1 + 1 / op.move.num_ranks) if op.move.kind is MoveKind.ALL_REDUCE else sent


def _stage(stage: Stage, op: Op, shape: StepShape, kernels: Kernels) -> tuple[float, float, float]:
    """What a stage holds while it runs, what its kernels keep afterwards, and float32 logits."""
    rows = shape.split(op.row_set).largest(op.layout)
    if stage.price_class is PriceClass.ATTENTION:
        return _attention(stage, rows, shape, kernels), 0.0, 0.0
    if stage.price_class in (PriceClass.MLP, PriceClass.EXPERTS):
        return *_products(stage, rows, kernels), 0.0
    if stage.price_class is PriceClass.ROUTER:
        scores = 0.0 if kernels.compiled else sum(4.0 * item.n for item in stage.work if isinstance(item, Gemm))
        return 3 * rows * scores, 0.0, 0.0  # logits, scores, and what the choice is made of
    if stage.role is Role.SAMPLE:
        width = sum(item.row_bytes for item in stage.work if isinstance(item, Stream))
        return 0.0, 0.0, SAMPLED_ROWS * rows * width
    return 0.0, 0.0, 0.0


def _attention(stage: Stage, rows: int, shape: StepShape, kernels: Kernels) -> float:
    """Queries, what attends to them, and what plain torch needs beside: expanded keys and values, and scores in
    blocks; on GPUs, in 16 bits, no scores, but for windows a mask of all rows and their context."""
    gemms = [item for item in stage.work if isinstance(item, Gemm)]
    size, context = kernels.itemsize, max(shape.context, 1)
    between = rows * (gemms[0].n + gemms[-1].k) * size
    if kernels.compiled or shape.phase == "decode":
        return between
    if not kernels.cpu and size == 2:
        fused = sum(min(context * item.n, FUSED_VALUES) for item in gemms[1:-1])  # each as a product, and beside others
        mask = MASK_BYTES * min(rows, context) * context if stage.window is not None else 0
        return between + 2 * size * fused + mask
    expanded = sum(min(context * item.n, EXPANDED_VALUES) * (4 + size) for item in gemms[1:-1])
    heads = sum(item.heads for item in stage.work if isinstance(item, AttentionCore))
    return between + expanded + 4 * min(heads * min(rows, 64) * context, SCORES) * 2


def _products(stage: Stage, rows: int, kernels: Kernels) -> tuple[float, float]:
    """What is between the products of an MLP or of experts, and the float32 sums that compiled experts keep."""
    size, inside, keeps = kernels.itemsize, 0.0, 0.0
    grouped = [item for item in stage.work if isinstance(item, GroupedGemm)]
    gemms = [item for item in stage.work if isinstance(item, Gemm)]
    if gemms:
        up = gemms[-2].n
        inside = rows * size * (up / 2 if kernels.compiled else 1.5 * up)
    if grouped:
        first, last = grouped[0], grouped[-1]
        hidden = first.k
        ranks = first.ranks
        top_k = first.pairs_per_row * ranks if ranks > 1 else first.pairs_per_row
        uneven = imbalance(ranks, rows, experts=first.experts * ranks, top_k=max(1, round(top_k)), skew=kernels.skew)
        pairs = rows * first.pairs_per_row * uneven
        sums = 4.0 * rows * hidden
        if kernels.compiled:
            keeps, inside = sums + 16 * pairs, 0.0
        elif kernels.cpu:
            inside += sums + pairs * hidden * size + pairs / max(first.experts, 1) * (1.5 * first.n + 2 * hidden) * size
        else:
            laid_out = rows * top_k  # all pairs, with those of other ranks' experts at the end
            summed = min(laid_out * hidden, SUMMED_VALUES) * (size + 4)
            inside += sums + laid_out * size * (hidden + max(1.5 * first.n, last.k + hidden)) + summed
    return inside, keeps
