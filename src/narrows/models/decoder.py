"""What all model families share: loading weights, a step's inputs, norms, MLP, embedding, LM head, greedy choice.

This is no library of modules: a family's own file reads top to bottom and takes from here only what is the same in all.

Letters: T rows, H hidden_size, F this rank's intermediate columns, V this rank's vocabulary, W ranks of the world.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from narrows.arch.block_formats import BlockFormat
from narrows.arch.config import ModelConfig
from narrows.arch.weight_sharding import WeightSharding
from narrows.arch.weights import Weight, embed_weights, head_weights, layer_weights
from narrows.layout import Mesh
from narrows.ops.argmax import argmax, pick, shard_argmax
from narrows.ops.blocks import BlockLinear
from narrows.ops.embedding import Table, embedding
from narrows.ops.int8 import Quantization
from narrows.ops.large_pages import LargePages
from narrows.ops.linear import linear
from narrows.ops.mlp import mlp
from narrows.ops.packed import (
    ExpertStack,
    Held,
    LinearParts,
    LinearWeight,
    PackedLinear,
    empty_experts,
    empty_gate_up,
    empty_linear,
    fill,
)
from narrows.ops.paged import PagedRows, windowed_rows
from narrows.ops.rms_norm import add_rms_norm, rms_norm
from narrows.ops.rope_angles import Lengths, RopeAngles
from narrows.ops.route import gate_dtype
from narrows.weights.source import BlockSource, WeightSource

__all__ = ["Decoder", "DecoderLayer", "Loader", "RankContext", "StepInputs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankContext:
    """What one rank computes with: its number in the mesh, weight sharding, dtype, device, slots of its KV cache, and
    the most positions of a sequence. ``batch_invariant``: no row's bits depend on other rows. ``quantization``: how
    linear weights are held."""

    mesh: Mesh
    rank: int
    sharding: WeightSharding
    dtype: torch.dtype
    device: torch.device
    num_slots: int
    num_positions: int
    batch_invariant: bool = False
    quantization: Quantization = Quantization.NONE


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInputs:
    """What stages need to know of a step: how its group's rows meet the cache, their rotary angles, and how to sample
    (None: the best token). ``windowed``: the same rows for each window that a layer may have."""

    rows: PagedRows
    cos_TD2: Tensor
    sin_TD2: Tensor
    windowed: Mapping[int, PagedRows]
    sampler: Callable[[Tensor], Tensor] | None = None


class Loader:
    """Takes one rank's slices from a source, on its device and in its dtype."""

    def __init__(self, source: WeightSource, rank_context: RankContext, hidden_act: str = "silu") -> None:
        self.source, self.rank_context = source, rank_context
        self._gated = hidden_act == "silu"
        self.room = LargePages().empty
        """Where packed weights lie."""

    def __call__(self, weight: Weight) -> Tensor:
        rank_context = self.rank_context
        tensor = self.source.take(weight, weight.span(rank_context.mesh, rank_context.rank))
        # A copy, also where nothing changes: a view of the checkpoint would keep its whole file mapped.
        return tensor.to(
            device=rank_context.device, dtype=torch.float32 if weight.float32 else rank_context.dtype, copy=True
        )

    def gate(self, weight: Weight) -> Tensor:
        """A router's weight, in the type that its products want (`gate_dtype`)."""
        rank_context = self.rank_context
        tensor = self.source.take(weight, weight.span(rank_context.mesh, rank_context.rank))
        dtype = gate_dtype(tensor.dtype, rank_context.dtype, rank_context.device)
        return tensor.to(device=rank_context.device, dtype=dtype, copy=True)

    def if_held(self, weight: Weight) -> Tensor | None:
        """As a call, where this rank holds any of it: an addend of a sum over ranks joins once."""
        return self(weight) if weight.is_held(self.rank_context.mesh, self.rank_context.rank) else None

    def stacked(self, weights: Mapping[str, Weight], *roles: str) -> Tensor:
        """Several vectors one after the other."""
        return torch.cat([self(weights[role]) for role in roles])

    def linear(self, weights: Mapping[str, Weight], *roles: str) -> LinearWeight:
        """The rows of several matrices one after the other, ready for one product that computes them all."""
        rank_context, parts = self.rank_context, []
        for held, alike in groupby(roles, lambda role: self._held_as(weights[role])):
            shapes = [self._shape(weights[role]) for role in alike]
            num_outputs, num_inputs = sum(rows for rows, _ in shapes), shapes[0][1]
            ready = empty_linear(num_outputs, num_inputs, rank_context.dtype, rank_context.device, held, self.room)
            parts.append(ready)
        weight = parts[0] if len(parts) == 1 else LinearParts(tuple(parts))
        self._fill(weight, weights, roles)
        return weight

    def table(self, weight: Weight) -> Table:
        """A table of rows by token, in blocks where it is the head too and the checkpoint has it in some."""
        if not isinstance(self._held_as(weight), BlockFormat):
            return self(weight)
        found = self.linear({"table": weight}, "table")
        assert isinstance(found, PackedLinear | BlockLinear)
        return found

    def gate_up(self, weights: Mapping[str, Weight], gate: str, up: str) -> LinearWeight:
        """The gates' rows and the ups', ready for :func:`mlp`."""
        if self._held_as(weights[gate]) != self._held_as(weights[up]):
            return self.linear(weights, gate, up)
        rank_context, shape = self.rank_context, self._shape(weights[gate])
        ready = empty_gate_up(
            shape[0],
            shape[1],
            rank_context.dtype,
            rank_context.device,
            self._held_as(weights[gate]),
            self.room,
            gated=self._gated,
        )
        self._fill(ready, weights, (gate, up))
        return ready

    def _held_as(self, weight: Weight) -> Held:
        """In its own blocks, or rounded; the head and whatever else is not rounded stay wide."""
        quantization = self.rank_context.quantization
        if quantization is Quantization.STORED:
            return weight.blocks or Quantization.NONE
        return quantization if weight.int8 else Quantization.NONE

    def _take(self, weight: Weight, expert: int | None = None) -> Tensor:
        """This rank's slice as :func:`fill` takes it."""
        span = weight.span(self.rank_context.mesh, self.rank_context.rank)
        if not isinstance(self._held_as(weight), BlockFormat):
            return self.source.take(weight, span, expert)
        assert isinstance(self.source, BlockSource), "a checkpoint without blocks"
        return self.source.take_blocks(weight, span, expert)

    def _shape(self, weight: Weight) -> tuple[int, int]:
        """Of this rank's slice of a matrix."""
        span = weight.span(self.rank_context.mesh, self.rank_context.rank)
        rows, columns = weight.shape
        if span is None:
            return rows, columns
        return (span[1] - span[0], columns) if weight.dim == 0 else (rows, span[1] - span[0])

    def _fill(self, ready: LinearWeight, weights: Mapping[str, Weight], roles: Sequence[str]) -> None:
        """One matrix at a time, so that beside the ready weight only one is held."""
        first = 0
        for role in roles:
            rows = self._take(weights[role])
            fill(ready, first, rows)
            first += rows.shape[0]

    def experts(self, weights: Mapping[str, Weight]) -> tuple[ExpertStack, ExpertStack, int]:
        """(gate and up [E, 2F, H], down [E, H, F], first expert) of the experts this rank holds."""
        rank_context = self.rank_context
        gate, up, down = (weights[f"experts.{name}_proj"] for name in ("gate", "up", "down"))
        first, stop = gate.experts[rank_context.rank]
        span = gate.span(rank_context.mesh, rank_context.rank)
        columns = gate.shape[0] if span is None else span[1] - span[0]
        hidden = gate.shape[1]
        gate_up_EF2H, down_EHF = empty_experts(
            stop - first,
            columns,
            hidden,
            rank_context.dtype,
            rank_context.device,
            (self._held_as(gate), self._held_as(down)),
            self.room,
            gated=self._gated,
        )
        for i in range(stop - first):
            fill(gate_up_EF2H[i], 0, self._take(gate, first + i))
            fill(gate_up_EF2H[i], columns, self._take(up, first + i))
            fill(down_EHF[i], 0, self._take(down, first + i))
        return gate_up_EF2H, down_EHF, first


class DecoderLayer:
    """The stages of a layer that do not depend on its kind of attention. Families add the others in forward order."""

    def __init__(self, config: ModelConfig, load: Loader, layer: int) -> None:
        rank_context = load.rank_context
        self.config, self.rank_context = config, rank_context
        self.linear = partial(linear, batch_invariant=rank_context.batch_invariant)
        self.gated_mlp = partial(mlp, hidden_act=config.hidden_act, batch_invariant=rank_context.batch_invariant)
        self.weights = layer_weights(config, rank_context.mesh, rank_context.sharding, layer)
        self.eps = config.rms_norm_eps
        self.input_layernorm_H = load(self.weights["input_layernorm"])
        self.post_attention_layernorm_H = load(self.weights["post_attention_layernorm"])
        self.down_bias_H: Tensor | None = None
        self.gate_up_bias_F2: Tensor | None = None
        if "gate_proj" in self.weights:
            self.gate_up_F2H = load.gate_up(self.weights, "gate_proj", "up_proj")
            self.down_HF = load.linear(self.weights, "down_proj")
            if config.mlp_bias:
                self.gate_up_bias_F2 = load.stacked(self.weights, "gate_proj.bias", "up_proj.bias")
                self.down_bias_H = load.if_held(self.weights["down_proj.bias"])

    def norm_of(self, stage: str) -> tuple[Tensor, float]:
        """Weight and epsilon of the norm that ``stage`` is."""
        weights = {"input_norm": self.input_layernorm_H, "post_attn_norm": self.post_attention_layernorm_H}
        return weights[stage], self.eps

    def input_norm(
        self, step: StepInputs, hidden_TH: Tensor, residual_TH: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``residual += hidden; hidden = RMSNorm(residual)``; without a residual apart, hidden is the residual."""
        return _norm(hidden_TH, residual_TH, self.input_layernorm_H, self.eps)

    def post_attn_norm(
        self, step: StepInputs, hidden_TH: Tensor, residual_TH: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`input_norm`, before the MLP or the experts."""
        return _norm(hidden_TH, residual_TH, self.post_attention_layernorm_H, self.eps)

    def mlp(self, step: StepInputs, hidden_TH: Tensor, *, out: Tensor | None = None) -> Tensor:
        """``down(act(gate(x)) * up(x))`` over this rank's columns: an addend of the sum over the world."""
        return self.gated_mlp(
            hidden_TH, self.gate_up_F2H, self.down_HF, self.gate_up_bias_F2, self.down_bias_H, out=out
        )


def _norm(hidden_TH: Tensor, residual_TH: Tensor | None, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if residual_TH is None:
        return rms_norm(hidden_TH, weight_H, eps), hidden_TH
    return add_rms_norm(hidden_TH, residual_TH, weight_H, eps)


class Decoder:
    """A decoder-only model on one rank: what comes before and after the layers, and the rotary table.

    Args:
        rope_dim: rotated columns per head. ``rope_dtype``: of the cos and sin table.
    """

    layers: list[DecoderLayer]

    def __init__(
        self, config: ModelConfig, load: Loader, *, rope_dim: int, rope_dtype: torch.dtype | None = None
    ) -> None:
        rank_context = load.rank_context
        self.config, self.rank_context = config, rank_context
        self.linear = partial(linear, batch_invariant=rank_context.batch_invariant)
        embed = embed_weights(config, rank_context.mesh, rank_context.sharding)["embed_tokens"]
        head = head_weights(config, rank_context.mesh)
        span = embed.span(rank_context.mesh, rank_context.rank)
        head_span = head["lm_head"].span(rank_context.mesh, rank_context.rank)
        assert head_span is not None
        self.embed_VH = load.table(embed)
        self.first_embedded = span[0] if span else 0
        self.first_id = head_span[0]
        self.lm_head_VH: LinearWeight
        if config.tie_word_embeddings and isinstance(self.embed_VH, Tensor):
            offset = self.first_id - self.first_embedded
            self.lm_head_VH = self.embed_VH[offset : offset + head_span[1] - head_span[0]]
        elif config.tie_word_embeddings and self._is_head(head_span):
            self.lm_head_VH = self.embed_VH
        else:
            self.lm_head_VH = load.linear(head, "lm_head")
        self.norm_H = load(head["norm"])
        of_layers = (config.sliding_window(layer) for layer in range(config.num_hidden_layers))
        self.windows = tuple(sorted({window for window in of_layers if window is not None}))
        self.angles = RopeAngles(
            rope_dim,
            config.rope.rope_theta,
            scaling=config.rope.as_mapping(),
            max_position=config.max_position_embeddings,
            num_positions=rank_context.num_positions,
            dtype=rope_dtype or rank_context.dtype,
            device=rank_context.device,
        )

    def _is_head(self, head_span: tuple[int, int]) -> bool:
        """Whether the embedding's ids here are those of the head."""
        return head_span == (self.first_embedded, self.first_embedded + self.embed_VH.shape[0])

    def begin_step(
        self,
        rows: PagedRows,
        sampler: Callable[[Tensor], Tensor] | None = None,
        *,
        lengths: Lengths | None = None,
        into: StepInputs | None = None,
    ) -> StepInputs:
        """What the stages need of a step in which this rank's group has these rows.

        ``lengths``: of the rows' sequences, from ``angles.stage``. ``into``: an earlier step's inputs of as
        many rows, in whose memory the angles are put.
        """
        cos, sin = (None, None) if into is None else (into.cos_TD2, into.sin_TD2)
        cos_TD2, sin_TD2 = self.angles.rows(rows.positions_T, lengths, cos=cos, sin=sin)
        return StepInputs(
            rows=rows,
            cos_TD2=cos_TD2,
            sin_TD2=sin_TD2,
            windowed={
                window: windowed_rows(rows, window, None if into is None else into.windowed[window])
                for window in self.windows
            },
            sampler=sampler,
        )

    def embed(self, step: StepInputs, ids_T1: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Rows of the embedding; ids outside this rank's part of the vocabulary give zeros, an addend of the sum."""
        return embedding(ids_T1.squeeze(-1), self.embed_VH, self.first_embedded, out=out)

    def norm_of(self, stage: str) -> tuple[Tensor, float]:
        """Weight and epsilon of the norm that ``stage`` is."""
        assert stage == "final_norm"
        return self.norm_H, self.config.rms_norm_eps

    def final_norm(self, step: StepInputs, hidden_TH: Tensor, residual_TH: Tensor | None = None) -> Tensor:
        """RMSNorm of hidden plus residual, before the LM head."""
        return _norm(hidden_TH, residual_TH, self.norm_H, self.config.rms_norm_eps)[0]

    def lm_head(self, step: StepInputs, hidden_TH: Tensor) -> Tensor:
        """Logits of this rank's part of the vocabulary."""
        return self.linear(hidden_TH, self.lm_head_VH)

    def shard_argmax(self, step: StepInputs, logits_TV: Tensor) -> Tensor:
        """This rank's best token per row and its logit, as [T, 2]."""
        return shard_argmax(logits_TV, self.first_id)

    def pick(self, step: StepInputs, candidates_T2W: Tensor) -> Tensor:
        """The best of all ranks' candidates; ties go to the lowest id."""
        return pick(candidates_T2W)

    def sample(self, step: StepInputs, logits_TV: Tensor) -> Tensor:
        """A token for each whole row of logits: the step's sampler chooses, or the best does, ties to the lowest id."""
        if step.sampler is not None:
            return step.sampler(logits_TV)
        return argmax(logits_TV)
