"""Choosing and scoring tokens from whole rows of logits: penalties, filters, one uniform number per row; ranks.

Equal logits and numbers give equal tokens.

Letters: T rows, V vocabulary, C candidates: the best tokens of a row by falling logit, equal ones by rising id.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["filtered_shares", "penalize", "sample", "sample_reference", "token_scores", "top_logprobs"]

NUM_CANDIDATES = 1024
"""Tokens of a row that `sample` tries to do with. Drawing from a row of 49152 (151936) by sorting it takes 3.7 (13) ms
on one CPU thread, from its best 1024 tokens 0.7 (1.3)."""

BLOCK_ROWS = 16
"""Rows at a time: float64 copies of whole rows stay small."""


def penalize(
    logits_V: Tensor,
    seen_V: Tensor,
    counts_V: Tensor,
    *,
    repetition_penalty: float,
    presence_penalty: float,
    frequency_penalty: float,
) -> Tensor:
    """``l / r if l > 0 else l * r`` where seen, then ``l - presence * (count > 0) - frequency * count``.

    Shapes: logits [V] float32, seen [V] bool (prompt and output), counts [V] int64 (output) -> [V] float32.
    Source: transformers ``RepetitionPenaltyLogitsProcessor``; OpenAI's API reference for the other two.
    """
    if repetition_penalty != 1.0:
        penalized_V = torch.where(logits_V > 0, logits_V / repetition_penalty, logits_V * repetition_penalty)
        logits_V = torch.where(seen_V, penalized_V, logits_V)
    if presence_penalty or frequency_penalty:
        logits_V = logits_V - presence_penalty * (counts_V > 0) - frequency_penalty * counts_V
    return logits_V


def sample(
    logits_TV: Tensor,
    uniform_T: Tensor,
    *,
    temperature_T: Tensor,
    top_k_T: Tensor,
    top_p_T: Tensor,
    min_p_T: Tensor,
    num_candidates: int = NUM_CANDIDATES,
) -> Tensor:
    """The token whose share of the filtered distribution holds ``uniform_T``, tokens laid out by falling probability.

    Shapes: logits [T, V] of any float dtype, the others [T] (uniform in [0, 1), float64; top_k 0 keeps all) -> ids [T]
    int64. Filters in the order temperature, top-k, top-p, min-p, each on what the one before has left, in float64; the
    best token always stays, and all that equal the k-th. Equal logits are laid out by rising id. At temperature 0 the
    best token is taken, the lowest id of several.

    On CPU only ``num_candidates`` tokens of a row are sorted where those settle it. Seeing that needs the values, so
    elsewhere all are, as in the twin: no shape depends on data.
    Source: transformers' warpers ``Temperature``, ``TopK``, ``TopP`` and ``MinPLogitsWarper``; of tokens with equal
    logits at the end of top-p it keeps the highest ids, this the lowest.
    """
    if logits_TV.device.type != "cpu":
        return sample_reference(
            logits_TV,
            uniform_T,
            temperature_T=temperature_T,
            top_k_T=top_k_T,
            top_p_T=top_p_T,
            min_p_T=min_p_T,
            num_candidates=num_candidates,
        )
    ids_T = logits_TV.max(dim=-1).indices
    for start in range(0, logits_TV.shape[0], BLOCK_ROWS):
        rows_B = (temperature_T[start : start + BLOCK_ROWS] > 0).nonzero().squeeze(-1) + start
        if rows_B.numel():
            ids_T[rows_B] = _draw_rows(
                logits_TV[rows_B],
                *(x[rows_B].unsqueeze(-1) for x in (uniform_T, temperature_T, top_k_T, top_p_T, min_p_T)),
                num_candidates=num_candidates,
            )
    return ids_T


def sample_reference(
    logits_TV: Tensor,
    uniform_T: Tensor,
    *,
    temperature_T: Tensor,
    top_k_T: Tensor,
    top_p_T: Tensor,
    min_p_T: Tensor,
    num_candidates: int = NUM_CANDIDATES,
) -> Tensor:
    """Twin of `sample`: all tokens of every row are sorted."""
    shares_TV, ids_TV = filtered_shares(
        logits_TV, temperature_T=temperature_T, top_k_T=top_k_T, top_p_T=top_p_T, min_p_T=min_p_T
    )
    at_TV = shares_TV.cumsum(dim=-1)
    return _token_at(at_TV, ids_TV, uniform_T.unsqueeze(-1) * at_TV[:, -1:])


def filtered_shares(
    logits_TV: Tensor, *, temperature_T: Tensor, top_k_T: Tensor, top_p_T: Tensor, min_p_T: Tensor
) -> tuple[Tensor, Tensor]:
    """``(shares, ids)``: the filtered distribution that `sample` draws from, by falling probability, and whose it is.

    Shapes: as of `sample` -> shares [T, V] float64 with sum 1 (0 where filtered out), ids [T, V] int64.
    """
    values_TV, ids_TV = logits_TV.double().sort(dim=-1, descending=True, stable=True)
    temperature_T1, top_k_T1, top_p_T1, min_p_T1 = (p.unsqueeze(-1) for p in (temperature_T, top_k_T, top_p_T, min_p_T))
    weights_TV = _weights(values_TV, values_TV[:, :1], temperature_T1)
    weights_TV[:, 1:].masked_fill_(temperature_T1 == 0, 0.0)
    total_T1 = weights_TV.sum(dim=-1, keepdim=True)
    kept_TV = _kept(values_TV, weights_TV, total_T1, top_k_T1, top_p_T1, min_p_T1)
    return kept_TV / kept_TV.sum(dim=-1, keepdim=True), ids_TV


def _draw_rows(
    logits_TV: Tensor,
    uniform_T1: Tensor,
    temperature_T1: Tensor,
    top_k_T1: Tensor,
    top_p_T1: Tensor,
    min_p_T1: Tensor,
    *,
    num_candidates: int,
) -> Tensor:
    """`sample` of rows with a temperature, from candidates, or from all tokens where those do not settle it."""
    num_candidates = min(num_candidates, logits_TV.shape[1])
    best_TC, ids_TC = logits_TV.topk(num_candidates, dim=-1)
    ids_TC, order_TC = ids_TC.sort(dim=-1)  # by rising id first: topk promises no order among equal values
    values_TC, place_TC = best_TC.double().gather(-1, order_TC).sort(dim=-1, descending=True, stable=True)
    ids_TC = ids_TC.gather(-1, place_TC)
    weights_TC = _weights(values_TC, values_TC[:, :1], temperature_T1)
    tail_T1 = weights_TC[:, -1:].clone()  # nothing outside weighs more
    # Which of the tokens that equal the last candidate are among them is chance, so none of those counts as known.
    known_TC = values_TC > values_TC[:, -1:]
    weights_TC.masked_fill_(~known_TC, 0.0)
    total_T1 = _weights(logits_TV.double(), values_TC[:, :1], temperature_T1).sum(dim=-1, keepdim=True)
    kept_TC = _kept(values_TC, weights_TC, total_T1, top_k_T1, top_p_T1, min_p_T1)
    at_TC = kept_TC.cumsum(dim=-1)
    known_T1 = weights_TC.sum(dim=-1, keepdim=True)
    all_stay_T1 = (top_k_T1 == 0) & (top_p_T1 >= 1) & (min_p_T1 <= 0)
    target_T1 = uniform_T1 * torch.where(all_stay_T1, total_T1, at_TC[:, -1:])
    ends_inside_T1 = (top_k_T1 > 0) & (top_k_T1 <= known_TC.sum(dim=-1, keepdim=True))
    ends_inside_T1 |= (top_k_T1 == 0) & (((top_p_T1 < 1) & (known_T1 >= top_p_T1 * total_T1)) | (tail_T1 < min_p_T1))
    settled_T1 = ends_inside_T1 | (all_stay_T1 & (target_T1 < at_TC[:, -1:]))
    ids_T = _token_at(at_TC, ids_TC, target_T1)
    open_T = (~settled_T1.squeeze(-1)).nonzero().squeeze(-1)
    if open_T.numel():
        ids_T[open_T] = sample_reference(
            logits_TV[open_T],
            uniform_T1[open_T].squeeze(-1),
            temperature_T=temperature_T1[open_T].squeeze(-1),
            top_k_T=top_k_T1[open_T].squeeze(-1),
            top_p_T=top_p_T1[open_T].squeeze(-1),
            min_p_T=min_p_T1[open_T].squeeze(-1),
        )
    return ids_T


def _weights(values_TC: Tensor, best_T1: Tensor, temperature_T1: Tensor) -> Tensor:
    """``exp((value - best) / temperature)``: probabilities but for their sum."""
    return ((values_TC - best_T1) / torch.where(temperature_T1 > 0, temperature_T1, 1.0)).exp_()


def _kept(
    values_TC: Tensor, weights_TC: Tensor, total_T1: Tensor, top_k_T1: Tensor, top_p_T1: Tensor, min_p_T1: Tensor
) -> Tensor:
    """The weights with 0 where a filter takes a token out; ``total_T1`` is the sum over all tokens of the row."""
    kth_T1 = values_TC.gather(-1, (top_k_T1 - 1).clamp(0, values_TC.shape[1] - 1))
    weights_TC = weights_TC.masked_fill((top_k_T1 > 0) & (values_TC < kth_T1), 0.0)
    total_T1 = torch.where(top_k_T1 > 0, weights_TC.sum(dim=-1, keepdim=True), total_T1)
    before_TC = weights_TC.cumsum(dim=-1) - weights_TC
    out_TC = ((top_p_T1 < 1) & (before_TC >= top_p_T1 * total_T1)) | (weights_TC < min_p_T1)
    out_TC[:, 0].fill_(False)
    return weights_TC.masked_fill_(out_TC, 0.0)


def _token_at(at_TC: Tensor, ids_TC: Tensor, target_T1: Tensor) -> Tensor:
    """The first token whose cumulated weight exceeds the target.

    There is one, and it is kept: a number below 1 in float64 is at most 1 - 2^-53, and its product with the last sum
    rounds to less than that sum. (The clamp is for rows whose result is not used, and for NaN.)
    """
    place_T1 = torch.searchsorted(at_TC, target_T1, right=True)
    return ids_TC.gather(-1, place_T1.clamp_max(ids_TC.shape[1] - 1)).squeeze(-1)


def token_scores(logits_TV: Tensor, rows_S: Tensor, targets_S: Tensor) -> tuple[Tensor, Tensor]:
    """``(logprobs, ranks)`` of one token in each of some rows: ``logit - logsumexp``, and 1 + how many come before it.

    Shapes: logits [T, V], rows and targets [S] int64 -> logprobs [S] float32, ranks [S] int64. Of equal logits the
    lower id comes first.
    """
    logprobs_S, ranks_S = [], []
    ids_V = torch.arange(logits_TV.shape[1], device=logits_TV.device)
    for rows_B, targets_B in zip(torch.split(rows_S, BLOCK_ROWS), torch.split(targets_S, BLOCK_ROWS), strict=True):
        logits_BV = logits_TV[rows_B].float()
        target_B1 = targets_B.unsqueeze(-1)
        logit_B1 = logits_BV.gather(-1, target_B1)
        logprobs_S.append((logit_B1 - logits_BV.logsumexp(dim=-1, keepdim=True)).squeeze(-1))
        before_BV = (logits_BV > logit_B1) | ((logits_BV == logit_B1) & (ids_V < target_B1))
        ranks_S.append(1 + before_BV.sum(dim=-1))
    return torch.cat(logprobs_S), torch.cat(ranks_S)


def top_logprobs(logits_V: Tensor, chosen: int, count: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """The chosen token's log-probability, and the ``count`` most likely tokens with theirs, equal ones by rising id.

    Shapes: logits [V]; computed in float32. A vocabulary of fewer tokens gives all of them.
    """
    logprobs_V = logits_V.float().log_softmax(dim=-1)
    count = min(count, logprobs_V.shape[0])
    best: tuple[tuple[int, float], ...] = ()
    if count:
        least = logprobs_V.topk(count).values[-1]
        ids_C = (logprobs_V >= least).nonzero().squeeze(-1)  # rising; with all that equal the last
        order_C = logprobs_V[ids_C].sort(descending=True, stable=True).indices[:count]
        ids_C = ids_C[order_C]
        best = tuple(zip(ids_C.tolist(), logprobs_V[ids_C].tolist(), strict=True))
    return float(logprobs_V[chosen]), best
