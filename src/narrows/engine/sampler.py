"""Sampling and scoring on a rank: the requests' parameters and their tokens so far, put to rows of logits.

Every rank holds the same logits and the same history, so every rank chooses the same token; nothing is sent. History is
kept only for requests whose parameters look at it, from the moment their prompt is first seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from narrows.ops.sample import penalize, sample, token_scores, top_logprobs
from narrows.sched.batch import Batch, Chunk
from narrows.sched.sampling import GREEDY, Logprobs, SamplingParams, TokenScore, uniform

__all__ = ["RowSampler", "Sampler"]


@dataclass(slots=True)
class _History:
    seen_V: Tensor
    counts_V: Tensor


class Sampler:
    """One rank's sampling state over the life of an engine."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.vocab_size, self.device = vocab_size, device
        self._histories: dict[int, _History] = {}

    def begin(self, batch: Batch, ids_T: Tensor) -> RowSampler | None:
        """What samples this batch's rows, whose token ids are ``ids_T``; None when every row is greedy."""
        for request in batch.ended:
            self._histories.pop(request, None)
        row = 0
        for group in batch.groups:
            for chunk in group:
                stop = row + len(chunk.tokens)
                if chunk.sampling is not None and chunk.sampling.penalizes:
                    self._see(chunk, ids_T[row:stop])
                row = stop
        return RowSampler(self, batch) if batch.needs_logits else None

    def _see(self, chunk: Chunk, ids_T: Tensor) -> None:
        history = self._histories.get(chunk.request)
        if history is None:
            history = self._histories[chunk.request] = _History(
                torch.zeros(self.vocab_size, dtype=torch.bool, device=self.device),
                torch.zeros(self.vocab_size, dtype=torch.int64, device=self.device),
            )
        history.seen_V[ids_T] = True
        if chunk.start >= chunk.num_prompt:
            history.counts_V.scatter_add_(0, ids_T, torch.ones_like(ids_T))

    def history(self, request: int) -> _History:
        return self._histories[request]


class RowSampler:
    """Samples the logit rows of one batch. Its parameters are on the device before the rows are there."""

    def __init__(self, sampler: Sampler, batch: Batch) -> None:
        self._sampler = sampler
        self._rows: list[tuple[Chunk | None, SamplingParams, float]] = []
        self._scored: list[tuple[int, int, int]] = []  # row, the token that is scored there, how many best ones
        for group in batch.groups:
            for chunk in group:
                params = chunk.sampling or GREEDY
                for row, target in enumerate(chunk.targets, start=len(self._rows)):
                    self._scored.append((row, target, params.prompt_logprobs or 0))
                self._rows += [(None, GREEDY, 0.0)] * (chunk.num_logits - chunk.is_sampled)
                if chunk.is_sampled:
                    position = chunk.start + len(chunk.tokens)
                    draw = uniform(params.seed, position) if params.temperature and params.seed is not None else 0.0
                    self._rows.append((chunk, params, draw))
        params_of = [params for _, params, _ in self._rows]
        self._uniform_T = self._column([draw for _, _, draw in self._rows])
        self._temperature_T = self._column([params.temperature for params in params_of])
        self._top_k_T = torch.tensor([params.top_k for params in params_of], dtype=torch.int64, device=sampler.device)
        self._top_p_T = self._column([params.top_p for params in params_of])
        self._min_p_T = self._column([params.min_p for params in params_of])
        self._sampled: tuple[Tensor, Tensor] | None = None

    def __call__(self, logits_TV: Tensor) -> Tensor:
        """ids [T] int64 from logits [T, V]."""
        wide_TV = logits_TV.float()
        changed_TV = wide_TV.clone() if any(params.penalizes for _, params, _ in self._rows) else wide_TV
        for row, (chunk, params, _) in enumerate(self._rows):
            if chunk is not None and params.penalizes:
                history = self._sampler.history(chunk.request)
                changed_TV[row] = penalize(
                    wide_TV[row],
                    history.seen_V,
                    history.counts_V,
                    repetition_penalty=params.repetition_penalty,
                    presence_penalty=params.presence_penalty,
                    frequency_penalty=params.frequency_penalty,
                )
        ids_T = sample(
            changed_TV,
            self._uniform_T,
            temperature_T=self._temperature_T,
            top_k_T=self._top_k_T,
            top_p_T=self._top_p_T,
            min_p_T=self._min_p_T,
        )
        self._sampled = (wide_TV, ids_T)
        return ids_T

    def logprobs(self) -> dict[int, Logprobs]:
        """By row, for the rows that asked, once they are sampled. The host waits for the device."""
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
        if self._sampled is None or not self._scored:
            return {}
        logits_TV, _ = self._sampled
        rows_S, targets_S, _ = torch.tensor(self._scored, device=self._sampler.device).unbind(-1)
        logprobs_S, ranks_S = token_scores(logits_TV, rows_S, targets_S)
        return {
            row: TokenScore(logprob, rank, top_logprobs(logits_TV[row], target, best)[1] if best else ())
            for (row, target, best), logprob, rank in zip(
                self._scored, logprobs_S.tolist(), ranks_S.tolist(), strict=True
            )
        }

    def _column(self, values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=self._sampler.device)
