"""Choosing tokens from whole rows of logits: penalties, filters, and one uniform number per row.

Knows rows of logits and numbers per row; not requests, seeds or ranks. Equal logits and numbers give equal tokens.

Letters: T rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["penalize", "sample", "top_logprobs"]


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
) -> Tensor:
    """The token whose share of the filtered distribution holds ``uniform_T``, tokens laid out by falling probability.

    Shapes: logits [T, V] float32, the others [T] (uniform in [0, 1), float64; top_k 0 keeps all) -> ids [T] int64.
    Filters in the order temperature, top-k, top-p, min-p, each on what the one before has left, as transformers'
    warpers do; the best token always stays. Equal logits are laid out by rising id. At temperature 0 the best is taken.
    """
    values_TV, ids_TV = logits_TV.sort(dim=-1, descending=True, stable=True)
    warm_T1 = temperature_T.clamp_min(1e-9).unsqueeze(-1)
    rank_V = torch.arange(logits_TV.shape[-1], device=logits_TV.device)
    top_k_T1 = top_k_T.unsqueeze(-1)
    out_TV = (rank_V >= top_k_T1) & (top_k_T1 > 0)
    probs_TV = (values_TV.double() / warm_T1).masked_fill(out_TV, float("-inf")).softmax(dim=-1)
    before_TV = probs_TV.cumsum(dim=-1) - probs_TV
    out_TV = (before_TV >= top_p_T.unsqueeze(-1)) | (probs_TV < min_p_T.unsqueeze(-1) * probs_TV[:, :1])
    out_TV[:, 0] = False
    kept_TV = probs_TV.masked_fill(out_TV, 0.0).cumsum(dim=-1)
    target_T1 = uniform_T.unsqueeze(-1) * kept_TV[:, -1:]
    place_T1 = torch.searchsorted(kept_TV, target_T1, right=True).clamp_max(logits_TV.shape[-1] - 1)
    place_T1 = torch.where(temperature_T.unsqueeze(-1) > 0, place_T1, torch.zeros_like(place_T1))
    return ids_TV.gather(-1, place_T1).squeeze(-1)


def top_logprobs(logits_V: Tensor, chosen: int, count: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """The chosen token's log-probability, and the ``count`` most likely tokens with theirs.

    Shapes: logits [V]; computed in float32.
    """
    logprobs_V = logits_V.float().log_softmax(dim=-1)
    values, ids = logprobs_V.topk(count) if count else (logprobs_V[:0], logprobs_V[:0])
    best = tuple((int(i), float(v)) for i, v in zip(ids.tolist(), values.tolist(), strict=True))
    return float(logprobs_V[chosen]), best
