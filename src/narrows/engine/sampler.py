"""Sampling and scoring on a rank: the requests' parameters and their tokens so far, put to rows of logits.

Every rank holds the same logits and the same history, so every rank chooses the same token; nothing is sent. History is
kept only for requests whose parameters look at it, from the moment their prompt is first seen. Each token counts once:
rows that run again after a preemption are known already, and tokens without rows (a cached prefix) come in the chunk.
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
    num_tokens: int = 0


class Sampler:
    """One rank's sampling state over the life of an engine."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.vocab_size, self.device = vocab_size, device
        self._histories: dict[int, _History] = {}
        self._biases: dict[int, tuple[Tensor, Tensor]] = {}  # by request: ids, and the bias of their logits
        self._biases_of_batch: dict[int, tuple[Tensor, Tensor]] = {}  # by the identity of what they are made of

    def begin(self, batch: Batch, ids_T: Tensor) -> RowSampler | None:
        """The sampler of this batch's rows, whose token ids are ``ids_T``; None when every row is greedy."""
        for request in batch.ended:
            self._histories.pop(request, None)
            self._biases.pop(request, None)
        self._biases_of_batch.clear()
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
        if chunk.skipped:
            ids_T = torch.cat((torch.tensor(chunk.skipped, dtype=torch.int64, device=self.device), ids_T))
        start, stop = chunk.start - len(chunk.skipped), chunk.start + len(chunk.tokens)
        new_T = ids_T[max(history.num_tokens - start, 0) :]
        output_T = ids_T[max(history.num_tokens, chunk.num_prompt) - start :] if stop > chunk.num_prompt else ids_T[:0]
        history.num_tokens = max(history.num_tokens, stop)
        history.seen_V[new_T] = True
        history.counts_V.scatter_add_(0, output_T, torch.ones_like(output_T))

    def history(self, request: int) -> _History:
        return self._histories[request]

    def bias(self, request: int, logit_bias: tuple[tuple[int, float], ...]) -> tuple[Tensor, Tensor]:
        """A request's ids and the bias of their logits. Made once, as there may be one for each token; the texts of a
        request share it, since they come in one batch and share the tuple."""
        if request not in self._biases:
            made = self._biases_of_batch.get(id(logit_bias))
            if made is None:
                ids, biases = zip(*logit_bias, strict=True)
                made = (
                    torch.tensor(ids, device=self.device),
                    torch.tensor(biases, dtype=torch.float32, device=self.device),
                )
            self._biases[request] = self._biases_of_batch[id(logit_bias)] = made
        return self._biases[request]


class RowSampler:
    """Samples the logit rows of one batch. Its parameters are on the device before the rows."""

    def __init__(self, sampler: Sampler, batch: Batch) -> None:
        self._sampler = sampler
        self._rows: list[tuple[Chunk | None, SamplingParams, float]] = []
        self._bias: dict[int, tuple[Tensor, Tensor]] = {}  # by row: ids, and the bias of their logits
        self._barred: dict[int, Tensor] = {}  # by row: [V], true where a token may not be sampled
        self._scored: list[tuple[int, int, int]] = []  # row, the scored token, the number of best tokens
        for group in batch.groups:
            for chunk in group:
                params = chunk.sampling or GREEDY
                for row, target in enumerate(chunk.targets, start=len(self._rows)):
                    self._scored.append((row, target, params.prompt_logprobs or 0))
                self._rows += [(None, GREEDY, 0.0)] * (chunk.num_logits - chunk.is_sampled)
                if chunk.is_sampled:
                    self._constrain(len(self._rows), chunk, params)
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

    def _constrain(self, row: int, chunk: Chunk, params: SamplingParams) -> None:
        if params.logit_bias:
            self._bias[row] = self._sampler.bias(chunk.request, params.logit_bias)
        if chunk.allowed or chunk.banned:
            self._barred[row] = _barred(chunk, self._sampler.vocab_size).to(self._sampler.device)

    def __call__(self, logits_TV: Tensor) -> Tensor:
        """ids [T] int64 from logits [T, V]: biased, penalised, and masked."""
        wide_TV = logits_TV.float()
        changes = self._bias or self._barred or any(params.penalizes for _, params, _ in self._rows)
        changed_TV = wide_TV.clone() if changes else wide_TV
        for row, (chunk, params, _) in enumerate(self._rows):
            if row in self._bias:
                changed_TV[row].index_add_(0, *self._bias[row])
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
                changed_TV[row].masked_fill_(self._barred[row], float("-inf"))
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


def _barred(chunk: Chunk, vocab_size: int) -> Tensor:
    """[V] bool on the host: the tokens that a chunk may not sample. Ids that its mask does not reach are barred."""
    barred_V = torch.zeros(vocab_size, dtype=torch.bool)
    if chunk.allowed:
        bytes_B = torch.tensor(list(chunk.allowed), dtype=torch.uint8)
        allowed_V = ((bytes_B[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten()[:vocab_size].bool()
        barred_V.fill_(True)
        barred_V[: len(allowed_V)] = ~allowed_V
    barred_V[list(chunk.banned)] = True
    return barred_V
