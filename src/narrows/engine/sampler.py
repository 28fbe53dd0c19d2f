"""Sampling and scoring on a rank: the requests' parameters and their tokens so far, put to rows of logits.

Every rank holds the same logits and the same history, so every rank chooses the same token; nothing is sent. History is
kept only for requests whose parameters look at it, from the moment their prompt is first seen. Each token counts once:
rows that run again after a preemption are known already, and tokens without rows (a cached prefix) come in the chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from narrows.ops.sample import penalize, sample, token_scores, top_logprobs
from narrows.ops.step_block import Part, StepBlock
from narrows.sched.batch import Batch, Chunk
from narrows.sched.sampling import GREEDY, Logprobs, SamplingParams, TokenScore, uniform

__all__ = ["RowSampler", "Sampler"]


@dataclass(slots=True)
class _History:
    seen_V: Tensor
    counts_V: Tensor
    num_tokens: int = 0


class Sampler:
    """One rank's sampling state over the life of an engine."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.vocab_size, self.device = vocab_size, device
        self._histories: dict[int, _History] = {}
        self._biases: dict[int, tuple[Part, Part]] = {}  # by request: ids, and the bias of their logits
        self._biases_of_batch: dict[int, tuple[Part, Part]] = {}  # by the identity of what they are made of

    def stage(self, batch: Batch, block: StepBlock) -> tuple[RowSampler | None, Callable[[Tensor], None]]:
        """Puts what the batch's rows need into the step's block.

        Returns:
            the rows' sampler, None when every row is greedy; and what takes the token ids of all rows, once the block
            is sent.
        """
        for request in batch.ended:
            self._histories.pop(request, None)
            self._biases.pop(request, None)
        self._biases_of_batch.clear()
        sampler = RowSampler(self, batch, block) if batch.needs_logits else None
        new = [part for parts in self._biases_of_batch.values() for part in parts]
        seen: list[tuple[Chunk, slice, Part | None]] = []
        row = 0
        for group in batch.groups:
            for chunk in group:
                stop = row + len(chunk.tokens)
                if chunk.sampling is not None and chunk.sampling.penalizes:
                    seen.append((chunk, slice(row, stop), block.put(chunk.skipped) if chunk.skipped else None))
                row = stop

        def see(ids_T: Tensor) -> None:
            for part in new:
                part.outlive()
            for chunk, rows, skipped in seen:
                self._see(chunk, ids_T[rows] if skipped is None else torch.cat((skipped.tensor, ids_T[rows])))

        return sampler, see

    def _see(self, chunk: Chunk, ids_T: Tensor) -> None:
        """Adds to a request's history: ``ids`` are the chunk's skipped tokens, then those of its rows."""
        history = self._histories.get(chunk.request)
        if history is None:
            history = self._histories[chunk.request] = _History(
                torch.zeros(self.vocab_size, dtype=torch.bool, device=self.device),
                torch.zeros(self.vocab_size, dtype=torch.int64, device=self.device),
            )
        start, stop = chunk.start - len(chunk.skipped), chunk.start + len(chunk.tokens)
        new_T = ids_T[max(history.num_tokens - start, 0) :]
        output_T = ids_T[max(history.num_tokens, chunk.num_prompt) - start :] if stop > chunk.num_prompt else ids_T[:0]
        history.num_tokens = max(history.num_tokens, stop)
        history.seen_V.index_fill_(0, new_T, True)
        history.counts_V.scatter_add_(0, output_T, torch.ones_like(output_T))

    def history(self, request: int) -> _History:
        return self._histories[request]

    def bias(self, request: int, logit_bias: tuple[tuple[int, float], ...], block: StepBlock) -> tuple[Part, Part]:
        """A request's ids and the bias of their logits. Sent once, as there may be one for each token; the texts of a
        request share it, since they come in one batch and share the tuple."""
        if request not in self._biases:
            made = self._biases_of_batch.get(id(logit_bias))
            if made is None:
                ids, biases = zip(*logit_bias, strict=True)
                made = block.put(ids), block.put(biases, np.float32)
            self._biases[request] = self._biases_of_batch[id(logit_bias)] = made
        return self._biases[request]


class RowSampler:
    """Samples the logit rows of one batch. Its parameters go to the device in the step's ``block``."""

    def __init__(self, sampler: Sampler, batch: Batch, block: StepBlock) -> None:
        self._sampler = sampler
        self._rows: list[tuple[Chunk | None, SamplingParams, float]] = []
        self._bias: dict[int, tuple[Part, Part]] = {}  # by row: ids, and the bias of their logits
        self._barred: dict[int, Part] = {}  # by row: [V], true where a token may not be sampled
        self._scored: list[tuple[int, int, int]] = []  # row, the scored token, the number of best tokens
        for group in batch.groups:
            for chunk in group:
                params = chunk.sampling or GREEDY
                for row, target in enumerate(chunk.targets, start=len(self._rows)):
                    self._scored.append((row, target, params.prompt_logprobs or 0))
                self._rows += [(None, GREEDY, 0.0)] * (chunk.num_logits - chunk.is_sampled)
                if chunk.is_sampled:
                    self._constrain(len(self._rows), chunk, params, block)
                    position = chunk.start + len(chunk.tokens)
                    draw = uniform(params.seed, position) if params.temperature and params.seed is not None else 0.0
                    self._rows.append((chunk, params, draw))
        params_of = [params for _, params, _ in self._rows]
        self._scored_S3 = block.put(np.reshape(self._scored, (-1, 3))) if self._scored else None
        self._uniform_T = block.put([draw for _, _, draw in self._rows], np.float64)
        self._temperature_T = block.put([params.temperature for params in params_of], np.float64)
        self._top_k_T = block.put([params.top_k for params in params_of])
        self._top_p_T = block.put([params.top_p for params in params_of], np.float64)
        self._min_p_T = block.put([params.min_p for params in params_of], np.float64)
        self._sampled: tuple[Tensor, Tensor] | None = None

    def _constrain(self, row: int, chunk: Chunk, params: SamplingParams, block: StepBlock) -> None:
        if params.logit_bias:
            self._bias[row] = self._sampler.bias(chunk.request, params.logit_bias, block)
        if chunk.allowed or chunk.banned:
            self._barred[row] = block.put(_barred(chunk, self._sampler.vocab_size), np.bool_)

    def __call__(self, logits_TV: Tensor) -> Tensor:
        """ids [T] int64 from logits [T, V]: biased, penalised, and masked."""
        wide_TV = logits_TV.float()
        changes = self._bias or self._barred or any(params.penalizes for _, params, _ in self._rows)
        changed_TV = wide_TV.clone() if changes else wide_TV
        for row, (chunk, params, _) in enumerate(self._rows):
            if row in self._bias:
                changed_TV[row].index_add_(0, *(part.tensor for part in self._bias[row]))
            if chunk is not None and params.penalizes:
                history = self._sampler.history(chunk.request)
                changed_TV[row] = penalize(
                    changed_TV[row],
                    history.seen_V,
                    history.counts_V,
                    repetition_penalty=params.repetition_penalty,
                    presence_penalty=params.presence_penalty,
                    frequency_penalty=params.frequency_penalty,
                )
            if row in self._barred:
                changed_TV[row].masked_fill_(self._barred[row].tensor, float("-inf"))
        ids_T = sample(
            changed_TV,
            self._uniform_T.tensor,
            temperature_T=self._temperature_T.tensor,
            top_k_T=self._top_k_T.tensor,
            top_p_T=self._top_p_T.tensor,
            min_p_T=self._min_p_T.tensor,
        )
        self._sampled = (wide_TV, ids_T)
        return ids_T

    def adopt(self, captured: RowSampler) -> None:
        """Takes over what ``captured``, of as many rows, has sampled: its tensors now hold this step's."""
        self._sampled = captured._sampled

    def logprobs(self) -> dict[int, Logprobs]:
        """By row, for the rows that requested them, once they are sampled. The host waits for the device."""
        if self._sampled is None:
            return {}
        logits_TV, ids_T = self._sampled
        return {
            row: top_logprobs(logits_TV[row], int(ids_T[row]), params.logprobs)
            for row, (_, params, _) in enumerate(self._rows)
            if params.logprobs is not None
        }

    def scores(self) -> dict[int, TokenScore]:
        """By row, for the rows that have a target, once all are sampled. The host waits for the device."""
        if self._sampled is None or self._scored_S3 is None:
            return {}
        logits_TV, _ = self._sampled
        rows_S, targets_S, _ = self._scored_S3.tensor.unbind(-1)
        logprobs_S, ranks_S = token_scores(logits_TV, rows_S, targets_S)
        return {
            row: TokenScore(logprob, rank, top_logprobs(logits_TV[row], target, best)[1] if best else ())
            for (row, target, best), logprob, rank in zip(
                self._scored, logprobs_S.tolist(), ranks_S.tolist(), strict=True
            )
        }


def _barred(chunk: Chunk, vocab_size: int) -> np.ndarray[Any, Any]:
    """[V] bool: the tokens that a chunk may not sample. Ids that its mask does not reach are barred."""
    barred_V = np.zeros(vocab_size, dtype=np.bool_)
    if chunk.allowed:
        allowed_V = np.unpackbits(np.frombuffer(chunk.allowed, dtype=np.uint8), bitorder="little")[:vocab_size]
        barred_V[:] = True
        barred_V[: len(allowed_V)] = allowed_V == 0
    barred_V[list(chunk.banned)] = True
    return barred_V
