"""Stages, fields and work: the vocabulary in which a model is described to the planner.

Widths and weight shapes inside ``work`` are those of the rank with the largest share, because a step lasts as long as
its slowest rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import Literal

from narrows.layout import Layout

__all__ = [
    "AttentionCore",
    "Chain",
    "Field",
    "FieldRoles",
    "Gemm",
    "GroupedGemm",
    "LayerType",
    "Norm",
    "PriceClass",
    "Role",
    "RoutedExperts",
    "RowSet",
    "Stage",
    "StageKind",
    "Stream",
    "Work",
]


class PriceClass(StrEnum):
    """The class under which an op's time is counted; the order is that of printed tables."""

    EMBED = "embed"
    QKV_A_PROJ = "qkv_a_proj"
    NORM = "norm"
    ADD = "add"
    ROUTER = "router"
    ATTENTION = "attention"
    MLP = "mlp"
    EXPERTS = "experts"
    COMMUNICATION = "communication"
    LM_HEAD = "lm_head"
    SAMPLE = "sample"
    HOST = "host"
    """Outside the plan: handing the step to the ranks, its inputs, its result. No stage's."""


class RowSet(StrEnum):
    """Which rows a field holds: all rows of the step, or only those with logits."""

    ALL = "all"
    LOGITS = "logits"


class StageKind(StrEnum):
    """How a stage treats layouts."""

    ROW = "row"
    """Works on each row alone: whole rows in any layout, the same layout out."""
    NORM = "norm"
    """A row stage over the stream that first adds the residual where that is still apart (fused), and writes both."""
    SHARDED = "sharded"
    """Weights split over ranks: accepts one layout, leaves another."""


class Role(Enum):
    """The role of a stage in its layer. `plan` identifies stages by their roles; their names are the model's own."""

    ATTENTION_NORM = "the norm before attention"
    LATENT_PROJ = "the projection to the narrow latent that attention reads"
    LATENT_NORM = "the norm of that latent"
    MLP_NORM = "the norm before the MLP or the experts"
    ROUTER = "the choice of experts"
    FINAL_NORM = "the norm after the last layer"
    LM_HEAD = "the product that makes logits"
    SAMPLE = "the choice of tokens from whole rows of logits"


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldRoles:
    """The roles of fields in a plan.

    ``input``: present before the first stage, on every rank: token ids. ``output``: the chosen tokens. ``stream``: what
    sharded stages leave as a sum still owed, and norms read. ``addends``: what a step must add to the stream before the
    next norm, in the order in which the search tries them; ``residual``: the one of them that a norm can add itself.

    ``encodable``: fields whose rows may be rounded to a byte per value on their way through a gather, and then only to
    be read by the stages up to the next norm. Never what is, or is about to be added to, the residual stream (addends,
    the stream before a norm): every later layer would keep those errors. Never the choice of experts, logits or ids.

    ``bundle_of``: for each field the name of what it always travels with (see :class:`Field`).
    """

    input: str
    output: str
    stream: str
    residual: str
    addends: tuple[str, ...]
    encodable: frozenset[str]
    bundle_of: Mapping[str, str] = field(hash=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """A named tensor of the activation: ``width`` values of ``itemsize`` bytes per row.

    Fields with the same ``bundle`` are written and read together and always travel together. ``columns`` is the width
    each rank holds where a stage leaves the field cut by columns, along the axes of that cut.
    """

    name: str
    width: int
    itemsize: int
    bundle: str
    columns: tuple[int, ...] = ()

    @property
    def row_bytes(self) -> int:
        return self.width * self.itemsize


Precision = Literal["weights", "activations", "float32_sums"]


@dataclass(frozen=True, slots=True)
class Gemm:
    """``rows x k`` times ``k x n``.

    ``precision``: ``weights``, the deployment's dtype; ``activations``, that of the activations (embedding and LM head
    are not quantised); ``float32_sums``, the router, whose reference multiplies in float32.
    """

    n: int
    k: int
    precision: Precision = "weights"


@dataclass(frozen=True, slots=True)
class GroupedGemm:
    """``rows * pairs_per_row`` rows spread over ``experts`` weight matrices of ``k x n`` held on the rank.

    ``ranks``: how many hold whole experts. Then ``pairs_per_row`` is the even share, and the fullest rank's are
    counted by the pricer; 1: each rank has a part of every expert, and all get the same.
    """

    experts: int
    pairs_per_row: float
    n: int
    k: int
    ranks: int = 1


@dataclass(frozen=True, slots=True)
class Norm:
    """RMSNorm of ``width`` values per row in the activation's dtype.

    ``fused`` with the add of the residual moves four tensors, alone two; ``streamed`` runs at the fused kernel's
    memory efficiency although it moves two (the norms of the latents).
    """

    width: int
    fused: bool
    streamed: bool = False


@dataclass(frozen=True, slots=True)
class Stream:
    """Element-wise work that moves this many bytes per row. ``uneven_bytes`` more go with the pairs of whole experts
    (see :class:`GroupedGemm`): per row if those were even."""

    row_bytes: float
    uneven_bytes: float = 0.0


@dataclass(frozen=True, slots=True)
class RoutedExperts:
    """The routed experts of one layer as one kernel: what the first items of a stage's work (:class:`GroupedGemm` and
    what lies between them, ``num_items`` in all) come to. ``whole``: each of ``ranks`` ranks holds whole experts;
    otherwise each holds a part of every expert."""

    hidden: int
    intermediate: int
    experts: int
    top_k: int
    ranks: int
    whole: bool
    num_items: int = 4


@dataclass(frozen=True, slots=True)
class AttentionCore:
    """Scores, softmax and values for ``heads`` heads; prefill and decode may run in different forms (MLA does).

    ``prefill_dims`` and ``decode_dims`` are query-key plus value dimensions per head in each form; ``kv_row_bytes``
    is what the cache holds per token on this rank.
    """

    heads: int
    prefill_dims: int
    decode_dims: int
    kv_row_bytes: int


Work = Gemm | GroupedGemm | Norm | Stream | AttentionCore


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One stage of the model. ``name`` is the method of the model class that computes it.

    ``reads`` are fields it needs, ``writes`` those it makes, ``frees`` those whose last reader it is. A sharded
    stage reads at ``accepts`` and leaves at ``leaves``; both are None for row stages. ``plain_work`` is what a norm
    costs when the residual was added before; ``work`` what it costs fused. ``any_rows``: it may also run on the rows
    whose logits are requested alone, because no stage from it on looks at other rows of a sequence. ``window``: rows of
    its context that a row sees at most, where that is not all. ``routed``: the experts that its first items of work
    are. ``absorbed``: the item of work that expands DeepSeek's latent to keys and values; in its place each head in
    decode multiplies its queries, and what it read, by its own part of those weights. ``role``: what it is to its
    layer, where a layout may have rules for that. ``cut_after``: few states are possible after it, so that the search
    may solve the stages up to it and those after it apart.
    """

    name: str
    kind: StageKind
    price_class: PriceClass
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    frees: tuple[str, ...] = ()
    work: tuple[Work, ...] = ()
    plain_work: tuple[Work, ...] = ()
    accepts: Layout | None = None
    leaves: Layout | None = None
    row_set: RowSet = RowSet.ALL
    any_rows: bool = False
    window: int | None = None
    routed: RoutedExperts | None = None
    absorbed: int | None = None
    role: Role | None = None
    cut_after: bool = False

    @property
    def key(self) -> tuple[str, bool, int | None]:
        """Identifies it in its chain: stages of one name differ only in this."""
        return self.name, self.any_rows, self.window

    @property
    def after_selection(self) -> bool:
        """Whether the rows with logits suffice for it: then rows may be selected before it."""
        return self.any_rows or self.row_set is RowSet.LOGITS


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerType:
    """A kind of decoder layer and its stages in forward order: dense or MoE, with or without a window, and each once
    more as the last layer, whose stages after attention may run on the rows whose logits are requested alone."""

    name: str
    stages: tuple[Stage, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """A whole model: stages before the layers, the type of every layer, and the stages after them."""

    prologue: tuple[Stage, ...]
    layer_types: tuple[LayerType, ...]
    layers: tuple[int, ...]
    epilogue: tuple[Stage, ...]
    fields: dict[str, Field]
    roles: FieldRoles
