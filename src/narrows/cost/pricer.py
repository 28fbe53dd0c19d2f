"""Prices stages, moves and adds: turns the work of a stage and the row counts of a step into picoseconds.

A stage costs its largest rank's rows. A collective on a device whose ranks need equal pieces costs the padded pieces.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field, replace
from math import ceil, prod
from operator import attrgetter

from narrows.arch.stages import AttentionCore, Gemm, GroupedGemm, Norm, PriceClass, RowSet, Stage, Stream, Work
from narrows.cost.attention import AttentionShape, attention_price
from narrows.cost.bands import band, work_band
from narrows.cost.devices import Device
from narrows.cost.engines import KERNELS_ALONE, EngineStyle
from narrows.cost.experts import experts_price
from narrows.cost.gemm import absorbed_price, gemm_price, grouped_gemm_price
from narrows.cost.imbalance import DEFAULT_SKEW, imbalance
from narrows.cost.internode import hierarchical_parts, internode_price
from narrows.cost.kernels import norm_price, stream_price
from narrows.cost.measured import AXES, REDUCE_NORM, Measured
from narrows.cost.network import Network, network
from narrows.cost.price import ZERO, Price, Source
from narrows.errors import ConfigError
from narrows.layout import Algorithm, Layout, Levels, Mesh, Move, MoveKind, RowSplit, Topology

__all__ = ["NOTHING", "PHASES", "OpPrice", "Pricer", "StepShape"]

PHASES = ("prefill", "decode")
_ITEMSIZES = {"fp32": 4}
_WEIGHT_BYTES = {"fp8": 1, "fp8-tensor": 1, "int8": 1, "int8-weight-only": 1, "bf16": 2, "fp32": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """What one step of the engine computes.

    ``context`` is the length of each sequence in tokens, this step's rows counted. A decode row attends to all of it.
    Prefill rows are whole sequences of that length, or, if a group has fewer rows, the last rows of one.
    """

    rows: RowSplit
    logits: RowSplit
    phase: str
    context: int

    @classmethod
    def of(
        cls, mesh: Mesh, group_rows: tuple[int, ...], *, phase: str, context: int, logit_rows: int | None = None
    ) -> StepShape:
        """The shape for rows per attention group; ``logit_rows`` in all, by default every row of a decode step and
        one per sequence of a prefill step. They are spread over the groups in proportion to their rows.

        Raises:
            ConfigError: an unknown phase, or counts that no step can have.
        """
        rows = RowSplit.from_groups(mesh, group_rows)
        if phase not in PHASES:
            raise ConfigError(f"phase {phase!r} is not known; phases: {', '.join(PHASES)}")
        if context < 1:
            raise ConfigError(f"context {context} must be at least 1 token")
        if logit_rows is None:
            sampled = group_rows if phase == "decode" else tuple(-(-n // context) for n in group_rows)
            return cls(rows=rows, logits=RowSplit.from_groups(mesh, sampled), phase=phase, context=context)
        if not 0 <= logit_rows <= rows.total:
            raise ConfigError(f"logit rows {logit_rows} must be between 0 and the {rows.total} rows of the step")
        counts, taken, seen = [], 0, 0
        for n in group_rows:
            seen += n
            upto = logit_rows * seen // rows.total if rows.total else 0
            counts.append(upto - taken)
            taken = upto
        return cls(rows=rows, logits=RowSplit.from_groups(mesh, tuple(counts)), phase=phase, context=context)

    @property
    def group_rows(self) -> tuple[int, ...]:
        """Rows of each attention group."""
        size = self.rows.mesh.group_size
        return tuple(sum(self.rows.counts[i : i + size]) for i in range(0, len(self.rows.counts), size))

    @property
    def kv_tokens(self) -> int:
        """Tokens of KV cache that the largest attention group holds during the step."""
        rows = max(self.group_rows)
        if self.phase == "decode":
            return rows * self.context
        return max(rows, self.context) if rows else 0

    def attended(self, rows: int, window: int | None = None) -> float:
        """Tokens of context that each of ``rows`` rows of a group attends to, on average; at most ``window`` each."""
        if window is None or window >= self.context:
            if self.phase == "decode":
                return self.context
            return self.context / 2 if rows >= self.context else self.context - rows / 2
        first = self.context if self.phase == "decode" else max(0, self.context - rows)
        if first >= window:
            return window
        # Rows grow up to the window, and those behind it see as much as it holds.
        growing = (window**2 - first**2) / 2
        return (growing + window * (self.context - window)) / (self.context - first)

    def split(self, row_set: RowSet) -> RowSplit:
        return self.rows if row_set is RowSet.ALL else self.logits


@dataclass(frozen=True, slots=True)
class OpPrice:
    """One op's predicted picoseconds, the rows of its largest rank, the bytes it moves, and where that comes from.

    ``error``: picoseconds that it may be off; None: what its source says (:mod:`narrows.cost.bands`).
    """

    ps: int
    rows: int
    nbytes: int
    source: Source
    error: int | None = field(default=None, compare=False)

    @property
    def seconds(self) -> float:
        return self.ps * 1e-12

    def plus(self, other: OpPrice) -> OpPrice:
        """This op's price with the time of ``other``, which is part of it; rows and bytes remain its own."""
        return OpPrice(self.ps + other.ps, self.rows, self.nbytes, max(self.source, other.source))


NOTHING = OpPrice(0, 0, 0, Source.MEASURED)
"""The price of nothing."""

_seconds = attrgetter("seconds")


class Pricer:
    """Prices ops of one shape of step on one device.

    ``dtype`` is that of the GEMMs (``bf16`` or ``fp8``); activations are ``itemsize`` bytes wide. ``graph``: launched
    from a CUDA graph rather than eagerly. ``window``: tokens that a row attends to at most. ``expert_skew``: how
    unequally experts are chosen (:mod:`narrows.cost.imbalance`), which decides what the fullest rank gets of whole
    experts. ``block_scales``: whether ``fp8`` weights have scales by block, or one per tensor. ``kv_dtype``: of the KV
    cache, ``fp8`` or that of the activations. ``stored_bytes``: of a value of ``stored`` weights. ``engine``: what an
    engine adds to its kernels, and saves of them. ``topology``: how ranks lie on nodes (None: all on one);
    ``between``: the network that connects these (None: the device's usual one).
    """

    def __init__(
        self,
        device: Device,
        mesh: Mesh,
        shape: StepShape,
        dtype: str,
        *,
        itemsize: int,
        graph: bool,
        window: int | None = None,
        expert_skew: float = DEFAULT_SKEW,
        block_scales: bool = True,
        kv_dtype: str = "bf16",
        stored_bytes: float = 1.0,
        engine: EngineStyle = KERNELS_ALONE,
        topology: Topology | None = None,
        between: Network | None = None,
    ) -> None:
        self.device, self.mesh, self.shape, self.dtype = device, mesh, shape, dtype
        self.itemsize, self.graph, self.window, self.expert_skew = itemsize, graph, window, expert_skew
        self.block_scales, self.kv_dtype, self.engine = block_scales, kv_dtype, engine
        self.stored_bytes = stored_bytes
        self.topology = topology or Topology.one_node(mesh.size)
        self.network = between or network(device.network)
        self._windowed: dict[int, Pricer] = {}
        self._largest: dict[tuple[RowSet, Layout], int] = {}

    def stage(self, stage: Stage, layout: Layout, fused: bool, row_set: RowSet) -> OpPrice:
        """One stage that reads its fields at ``layout``; ``fused``: a norm that adds the residual on the way."""
        if stage.window != self.window and stage.window is not None:
            return self._within(stage.window).stage(stage, layout, fused, row_set)
        rows = self._rows(row_set, layout)
        work = stage.plain_work if stage.plain_work and not fused else stage.work
        price, nbytes = self._composed(work, rows, self.dtype, stage)
        if self.device.measured is not None and rows:
            at_work = self.shape.split(row_set).at_work(layout)
            price = self._measured(self.device.measured, stage.price_class, work, rows, at_work)
        return OpPrice(price.ps, rows, round(nbytes), price.source, self._error(stage.price_class, price))

    def _error(self, price_class: PriceClass, price: Price) -> int | None:
        """Picoseconds that a price may be off: by the scatter of this machine's own measurement, or by its parts; None:
        what its source says."""
        measured = self.device.measured
        scatter = measured.scatter(price_class) if measured is not None else None
        if scatter is not None and price.source <= Source.INTERPOLATED:
            return round(price.ps * band(price_class, price.source, scatter))
        return round(price.error * 1e12) if price.error else None

    def _within(self, window: int) -> Pricer:
        """A pricer of the same to which a row attends to so many tokens at most."""
        if window not in self._windowed:
            self._windowed[window] = pricer = copy(self)
            pricer.window, pricer._windowed, pricer._largest = window, {}, {}
        return self._windowed[window]

    def _composed(
        self, work: tuple[Work, ...], rows: int, dtype: str, stage: Stage | None = None
    ) -> tuple[Price, float]:
        """The price of each item of a stage's work, one after the other, and the bytes that they move. Items of
        ``stage`` that were measured together are priced so."""
        nbytes, uneven = 0.0, self._uneven(work, rows)
        together = self._together(stage, work, rows, dtype) if stage is not None and rows else {}
        prices: list[Price] = []
        errors: list[float] = []
        for i, item in enumerate(work):
            item_price, item_bytes = self._work(item, rows, dtype, uneven)
            prices.append(price := self._in_engine(together.get(i, item_price)))
            errors.append(price.seconds * work_band(item, price.source))
            nbytes += item_bytes
        seconds, error = sum(price.seconds for price in prices), sum(errors)
        source = max((price.source for price in prices), default=Source.MEASURED)
        if stage is not None and stage.routed is not None and self.engine.parallel_shared_expert:
            count = stage.routed.num_items
            routed, shared = (sum(price.seconds for price in part) for part in (prices[:count], prices[count:]))
            seconds, error = max((routed, sum(errors[:count])), (shared, sum(errors[count:])))
        return Price(seconds, source, error), nbytes

    def _in_engine(self, price: Price) -> Price:
        """A kernel that begins before the one in front of it has ended."""
        saved = min(self.engine.launch_overlap_s, price.seconds / 2)
        return Price(price.seconds - saved, price.source) if saved else price

    def _together(self, stage: Stage, work: tuple[Work, ...], rows: int, dtype: str) -> dict[int, Price]:
        """What items cost, by index in ``work``, that a GPU's kernels do together or in another form."""
        found: dict[int, Price] = {}
        if stage.routed is not None:
            price = experts_price(self.device, stage.routed, rows, self._fp8(dtype), self.expert_skew)
            if price is not None:
                found = dict.fromkeys(range(stage.routed.num_items), ZERO) | {0: price}
        if stage.absorbed is not None and self.shape.phase == "decode":
            heads = next(item.heads for item in work if isinstance(item, AttentionCore))
            if (price := absorbed_price(self.device, heads, rows, dtype)) is not None:
                found[stage.absorbed] = price
        return found

    def _fp8(self, dtype: str) -> str:
        """The class of products: FP8 with scales by block, or one per tensor."""
        return "fp8-tensor" if dtype == "fp8" and not self.block_scales else dtype

    def _measured(
        self, measured: Measured, price_class: str, work: tuple[Work, ...], rows: int, at_work: float
    ) -> Price:
        """As the stage was measured on this machine; or as its nearest like was, of this dtype before others, in
        proportion to their work; or the items of its work one after the other, each as measured where it was."""
        phase, attended = self.shape.phase, self.shape.attended(rows, self.window)
        if (found := measured.stage(price_class, work, self.dtype, at_work, phase, attended)) is not None:
            return found
        others = (other for other in measured.dtypes if other != self.dtype and self.device.has_rate(other))
        for dtype in (self.dtype, *others):
            like = measured.nearest(price_class, work, dtype)
            seen = like and measured.stage(price_class, like, dtype, at_work, phase, attended)
            if like and seen:
                wanted, known = self._composed(work, rows, self.dtype)[0], self._composed(like, rows, dtype)[0]
                return Price(seen.seconds * wanted.seconds / known.seconds, Source.SCALED)
        price, uneven = ZERO, self._uneven(work, rows)
        for item in work:
            found = measured.item(item, self.dtype, at_work, phase, attended)
            price += found or self._work(item, rows, self.dtype, uneven)[0]
        return price

    def _uneven(self, work: tuple[Work, ...], rows: int) -> float:
        """How many times its even share of whole experts the fullest rank gets."""
        for item in work:
            if isinstance(item, GroupedGemm) and item.ranks > 1:
                experts, top_k = item.experts * item.ranks, max(1, round(item.pairs_per_row * item.ranks))
                return imbalance(item.ranks, rows, experts=experts, top_k=top_k, skew=self.expert_skew)
        return 1.0

    def step(self) -> OpPrice:
        """What a step costs beside the ops of its plan: handing it to the ranks, its inputs, its result. Nothing where
        the device has no measurement of it."""
        rows = self.shape.rows.total
        price = self.device.measured.step(self.shape.phase, rows) if self.device.measured is not None else None
        if price is None and (host := self.engine.host_s + self.engine.host_row_s * self.shape.logits.total):
            price = Price(host, Source.SCALED)
        return OpPrice(price.ps, rows, 0, price.source) if price is not None else NOTHING

    def move(self, move: Move, row_bytes: int, row_set: RowSet) -> OpPrice:
        """One move of fields with ``row_bytes`` bytes per row in all; ``nbytes`` is what the collective carries."""
        n = move.num_ranks
        if move.kind is MoveKind.SLICE:
            return OpPrice(0, self._rows(row_set, move.dst), 0, Source.MEASURED)  # a view: no kernel, no bytes
        if move.kind is MoveKind.COLUMN_GATHER:
            rows, op = self._rows(row_set, move.src), "all_gather"
        elif move.kind is MoveKind.ALL_REDUCE:
            rows, op = self._rows(row_set, move.src), "all_reduce"
        elif move.kind is MoveKind.ALL_GATHER:
            rows, op = self._gathered(row_set, move.dst, move.src, n), "all_gather"
        else:
            assert move.kind is MoveKind.REDUCE_SCATTER, f"no price for {move.kind}"
            rows, op = self._gathered(row_set, move.src, move.dst, n), "reduce_scatter"
        nbytes = rows * row_bytes
        price = max((self._moved(move, op, levels, nbytes) for levels in self._levels(move)), key=_seconds)
        return OpPrice(price.ps, rows, nbytes, price.source, self._error(PriceClass.COMMUNICATION, price))

    def _levels(self, move: Move) -> tuple[Levels, ...]:
        """How the groups that make ``move`` lie on nodes; all are done when the slowest is."""
        return self.topology.levels_along(move.mesh, move.first, move.last)

    def _moved(self, move: Move, op: str, levels: Levels, nbytes: int) -> Price:
        """One collective of ``nbytes``, or what it does level by level, in a group that lies so on nodes."""
        parts: tuple[tuple[str, Levels, int], ...] = ((op, levels, nbytes),)
        if move.algorithm is Algorithm.HIERARCHICAL and levels.spans:
            axis = self._axis(move, levels, levels)
            whole = self._measured_in_plan(move.kind.value, levels, axis, nbytes, Algorithm.HIERARCHICAL)
            if whole is not None:
                return whole
            parts = hierarchical_parts(op, levels, nbytes)
        price = ZERO
        for part, among, size in parts:
            name = move.kind.value if part == op else part
            found = self._measured_in_plan(name, among, self._axis(move, among, levels), size)
            price += found or self._in_engine(
                internode_price(self.device, self.network, part, among, size, graph=self.graph)
            )
        return price

    def _axis(self, move: Move, among: Levels, levels: Levels) -> str:
        """Whether the ranks of a group lie next to each other; those of equal rank on their nodes do not."""
        adjacent = prod(self.mesh.sizes[move.last :]) == 1 and (among == levels or not among.spans)
        return AXES[0] if adjacent else AXES[1]

    def _measured_in_plan(
        self, op: str, among: Levels, axis: str, nbytes: int, algorithm: Algorithm = Algorithm.FLAT
    ) -> Price | None:
        """What a collective was measured to take among such ranks."""
        if self.device.measured is None or not nbytes:
            return None
        group = among.num_ranks, axis
        return self.device.measured.collective(op, *group, nbytes, self.shape.phase, among.num_nodes, algorithm)

    def reduce_norm(self, move: Move, stage: Stage, fused: bool, row_bytes: int, row_set: RowSet) -> OpPrice:
        """An all-reduce and the norm of its rows in one pass: the reduction, and half of what the norm moves (the sum
        is in cache, and writing it is the reduction's), launched once. Where the device has no such op of that size
        it is the two, and a picosecond, so that the search never prefers it."""
        price, normed = self.move(move, row_bytes, row_set), self.stage(stage, move.dst, fused, row_set)
        levels = self._levels(move)[0]
        if price.nbytes > self.device.fused_norm_bytes or levels.spans:
            return price.plus(replace(normed, ps=normed.ps + 1))
        axis = self._axis(move, levels, levels)
        if (found := self._measured_in_plan(REDUCE_NORM, levels, axis, price.nbytes)) is not None:
            return OpPrice(found.ps, price.rows, price.nbytes, found.source)
        launch = round(self.device.launch_s * 1e12) if normed.nbytes else 0
        return price.plus(replace(normed, ps=(normed.ps - launch) // 2))

    def _rows(self, row_set: RowSet, layout: Layout) -> int:
        """Rows of the largest rank; the same few layouts come again and again."""
        rows = self._largest.get((row_set, layout))
        if rows is None:
            rows = self._largest[row_set, layout] = self.shape.split(row_set).largest(layout)
        return rows

    def _gathered(self, row_set: RowSet, outer: Layout, inner: Layout, num_ranks: int) -> int:
        """Rows of the full tensor of a gather or scatter, padded to equal pieces where the backend needs those."""
        if self.device.shared_memory:
            return self._rows(row_set, outer)
        return num_ranks * self._rows(row_set, inner)

    def add(self, layout: Layout, row_bytes: int, row_set: RowSet, *, joins: bool) -> OpPrice:
        """Adding an addend held at ``layout`` to rows (or to this rank's rows of an owed sum): two reads, one write.

        ``joins``: to an owed sum. Where collectives were measured in plans, an addend that they take along is in their
        price, and what is left is the handing over.
        """
        rows = self._rows(row_set, layout)
        if joins and rows and self.device.measured is not None and (least := self.device.measured.copy(1)) is not None:
            return OpPrice(least.ps, rows, 3 * row_bytes * rows, least.source)
        return self._streamed(rows, 3 * row_bytes)

    def recode(self, layout: Layout, row_bytes: int, row_set: RowSet) -> OpPrice:
        """Encoding or decoding the rows held at ``layout``: one pass that reads and writes ``row_bytes`` per row."""
        return self._streamed(self._rows(row_set, layout), row_bytes)

    def select(self, layout: Layout, row_bytes: int) -> OpPrice:
        """Copying out the rows whose logits are requested."""
        return self._streamed(self._rows(RowSet.LOGITS, layout), 2 * row_bytes)

    def _streamed(self, rows: int, row_bytes: int) -> OpPrice:
        """One pass over ``rows`` rows that reads and writes ``row_bytes`` of each."""
        nbytes = rows * row_bytes
        price = self.device.measured.copy(nbytes) if self.device.measured is not None and nbytes else None
        price = price or stream_price(self.device, nbytes)
        return OpPrice(price.ps, rows, rows * row_bytes, price.source)

    def _work(self, item: Work, rows: int, dtype: str, uneven: float) -> tuple[Price, float]:
        device, size = self.device, self._itemsize(dtype)
        if isinstance(item, Gemm):
            dtype = self._fp8(self._gemm_dtype(item.precision, dtype))
            touched = rows * (item.k + item.n) * size + item.n * item.k * self._weight_bytes(dtype)
            of_w = self.stored_bytes if dtype == "stored" else None
            return gemm_price(device, rows, item.n, item.k, dtype, of_w), touched if rows else 0
        if isinstance(item, GroupedGemm):
            pairs = ceil(rows * item.pairs_per_row * (uneven if item.ranks > 1 else 1.0))
            of_w = self.stored_bytes if dtype == "stored" else None
            price = grouped_gemm_price(device, pairs, item.experts, item.n, item.k, self._fp8(dtype), of_w)
            weights = min(item.experts, pairs) * item.n * item.k * self._weight_bytes(dtype)
            return price, pairs * (item.n + item.k) * size + weights
        if isinstance(item, Norm):
            moved = rows * item.width * size * (4 if item.fused else 2)
            return norm_price(device, moved, fused=item.fused or item.streamed), moved
        if isinstance(item, Stream):
            streamed = rows * (item.row_bytes + item.uneven_bytes * uneven)
            return stream_price(device, streamed), streamed
        return self._attention(item, rows, size)

    def _weight_bytes(self, dtype: str) -> float:
        return self.stored_bytes if dtype == "stored" else _WEIGHT_BYTES[dtype]

    def _itemsize(self, dtype: str) -> int:
        """Of activations beside weights of ``dtype``."""
        return self.itemsize if dtype == self.dtype else _ITEMSIZES.get(dtype, 2)

    def _gemm_dtype(self, precision: str, dtype: str) -> str:
        """The rate a GEMM runs at. Products of bf16 values summed in float32 (the router) are what tensor cores compute
        at their bf16 rate; a CPU without such an instruction for float32 results casts, and multiplies in float32."""
        if precision == "weights" or dtype == "fp32":
            return dtype
        return "fp32" if precision == "float32_sums" and self.device.shared_memory else "bf16"

    def _attention(self, item: AttentionCore, rows: int, size: int) -> tuple[Price, float]:
        pairs = round(rows * self.shape.attended(rows, self.window))
        if self.shape.phase == "decode":
            kv_rows, dims = pairs, item.decode_dims
        else:
            kv_rows, dims = max(rows, self.shape.context) if rows else 0, item.prefill_dims
            if self.window is not None:
                kv_rows = min(kv_rows, rows + self.window)
        kv_bytes = kv_rows * item.kv_row_bytes
        if self.kv_dtype == "fp8":
            kv_bytes //= size
        flops = 2 * pairs * item.heads * dims
        latent = item.prefill_dims != item.decode_dims
        head_dim = item.prefill_dims // 2
        kv_heads = max(1, round(item.kv_row_bytes / (item.prefill_dims * size)))
        core = AttentionShape(
            latent=latent,
            heads=item.heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            decode=self.shape.phase == "decode",
            rows=rows,
            context=self.shape.context,
            flops=flops,
            kv_bytes=kv_bytes,
            share=self.shape.attended(rows, self.window) / self.shape.attended(rows),
        )
        dtype = "bf16" if size == 2 else "fp32"
        kv_dtype = self.kv_dtype if dtype == "bf16" else dtype
        price = attention_price(self.device, core, dtype=dtype, kv_dtype=kv_dtype)
        return price, kv_bytes
