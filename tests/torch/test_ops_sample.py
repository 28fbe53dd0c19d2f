"""sample and penalize: the filtered distribution is transformers', draws reproduce it, the fast path is the twin."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from narrows.ops.sample import filtered_shares, penalize, sample, sample_reference, token_scores, top_logprobs

INF = float("inf")
CASES = [
    dict(temperature=1.0),
    dict(temperature=0.3),
    dict(temperature=5.0),
    dict(temperature=1.0, top_k=1),
    dict(temperature=0.7, top_k=7),
    dict(temperature=1.0, top_k=10**6),
    dict(temperature=1.0, top_p=0.5),
    dict(temperature=1.3, top_p=0.95),
    dict(temperature=1.0, top_p=1e-9),
    dict(temperature=1.0, min_p=0.1),
    dict(temperature=0.8, min_p=1.0),
    dict(temperature=1.5, top_k=20, top_p=0.8, min_p=0.05),
    dict(temperature=0.6, top_k=3, top_p=0.999, min_p=0.3),
]


def numbers(num_rows: int, *, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0) -> dict[str, Tensor]:
    return {
        "temperature_T": torch.full((num_rows,), temperature, dtype=torch.float64),
        "top_k_T": torch.full((num_rows,), top_k),
        "top_p_T": torch.full((num_rows,), top_p, dtype=torch.float64),
        "min_p_T": torch.full((num_rows,), min_p, dtype=torch.float64),
    }


def warped(logits: Tensor, *, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """transformers' distribution, with the warpers that its ``generate`` would make, in its order."""
    warpers = [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [MinPLogitsWarper(min_p)] if min_p else []
    scores = logits.double()
    for warper in warpers:
        scores = warper(torch.zeros((scores.shape[0], 1), dtype=torch.int64), scores)
    return scores.softmax(dim=-1)


def make_logits(kind: str, num_rows: int = 12, vocab: int = 150, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn((num_rows, vocab), generator=generator) * 3
    if kind == "ties":
        logits = logits.round()
    elif kind == "bf16":
        logits = logits.bfloat16()
    elif kind == "-inf":
        logits[torch.rand(logits.shape, generator=generator) < 0.5] = -INF
        logits[:, vocab // 2] = 0.0  # no row is all -inf
    elif kind == "one token possible":
        logits[:, 1:] = -INF
    elif kind == "all equal":
        logits[:] = 1.25
    return logits


KINDS = ["random", "ties", "bf16", "-inf", "one token possible", "all equal"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=str)
@torch.inference_mode()
def test_the_filtered_distribution_is_transformers(kind, case):
    logits = make_logits(kind)
    shares, ids = filtered_shares(logits, **numbers(logits.shape[0], **case))
    expected = warped(logits, **case)
    # By falling probability: the same shares. Which of several equal tokens top-p keeps is each one's own.
    torch.testing.assert_close(shares, expected.sort(dim=-1, descending=True).values, rtol=1e-9, atol=1e-12)
    assert torch.equal(shares > 0, expected.sort(dim=-1, descending=True).values > 0)
    by_id = torch.zeros_like(shares).scatter_(1, ids, shares)
    values = logits.double()
    alone = (values.unsqueeze(-1) == values.unsqueeze(-2)).sum(dim=-1) == 1
    torch.testing.assert_close(by_id[alone], expected[alone], rtol=1e-9, atol=1e-12)
    assert torch.equal(ids.sort(dim=-1).values, torch.arange(logits.shape[1]).expand(logits.shape))


@torch.inference_mode()
def test_equal_tokens_at_the_end_of_top_k_all_stay_and_of_top_p_the_lowest_ids():
    logits = torch.tensor([[0.0, 2.0, 1.0, 1.0, 1.0]])
    shares, ids = filtered_shares(logits, **numbers(1, temperature=1.0, top_k=2))
    assert ids[shares > 0].tolist() == [1, 2, 3, 4]
    shares, ids = filtered_shares(logits, **numbers(1, temperature=1.0, top_p=0.55))
    assert ids[shares > 0].tolist() == [1, 2]  # 0.45, then 0.17 each


@pytest.mark.parametrize("draw", [sample, sample_reference])
@pytest.mark.parametrize("case", CASES, ids=str)
@torch.inference_mode()
def test_a_grid_of_uniforms_reproduces_the_probabilities(draw, case):
    num_draws = 4000
    logits = make_logits("-inf", num_rows=1, vocab=40).expand(num_draws, -1)
    grid = (torch.arange(num_draws, dtype=torch.float64) + 0.5) / num_draws
    options = {} if draw is sample_reference else {"num_candidates": 9}
    ids = draw(logits, grid, **numbers(num_draws, **case), **options)
    share = torch.bincount(ids, minlength=40) / num_draws
    expected = warped(logits[:1], **case)[0]
    # Each token owns one interval, which holds its length in grid points, give or take one.
    assert (share - expected).abs().max() <= 1.01 / num_draws
    assert share[expected == 0].sum() == 0
    # and tokens are sorted by falling probability
    assert expected[ids].diff().max() <= 0


@torch.inference_mode()
def test_the_ends_of_the_unit_interval_and_filtered_tokens():
    """0 is the best token; the largest number below 1 the last that is kept, never one that was filtered out."""
    logits = make_logits("random", num_rows=400, vocab=300)
    logits[:, 200:] = -INF
    case = dict(temperature=1.7, top_k=40, top_p=0.97, min_p=0.01)
    shares, ids = filtered_shares(logits, **numbers(400, **case))
    last = (shares > 0).sum(dim=-1, keepdim=True) - 1
    for draw in (sample, sample_reference):
        assert torch.equal(draw(logits, torch.zeros(400, dtype=torch.float64), **numbers(400, **case)), ids[:, 0])
        most = torch.full((400,), 1 - 2.0**-53, dtype=torch.float64)
        assert torch.equal(draw(logits, most, **numbers(400, **case)), ids.gather(1, last).squeeze(1))
        plain = draw(logits, most, **numbers(400, temperature=1.7))
        assert (plain < 200).all()


@pytest.mark.parametrize("draw", [sample, sample_reference])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_temperature_0_is_greedy_with_ties_to_the_lowest_id(draw, dtype):
    logits = make_logits("ties", num_rows=60).to(dtype)
    uniforms = torch.rand(60, dtype=torch.float64)
    best = torch.tensor([row.index(max(row)) for row in logits.tolist()])
    assert (logits == logits.amax(dim=-1, keepdim=True)).sum() > 60, "there are ties"
    for case in (dict(), dict(top_k=5), dict(top_p=0.2), dict(min_p=0.9), dict(top_k=5, top_p=0.2, min_p=0.9)):
        assert torch.equal(draw(logits, uniforms, **numbers(60, **case)), best)
    flat = torch.zeros((2, 3000), dtype=dtype)
    assert draw(flat, uniforms[:2], **numbers(2)).tolist() == [0, 0]


@pytest.mark.parametrize("draw", [sample, sample_reference])
@torch.inference_mode()
def test_a_vocabulary_of_one_token_and_no_rows(draw):
    for case in CASES:
        assert (
            draw(torch.full((3, 1), -4.0), torch.rand(3, dtype=torch.float64), **numbers(3, **case)).tolist() == [0] * 3
        )
        nothing = draw(torch.empty((0, 9)), torch.empty(0, dtype=torch.float64), **numbers(0, **case))
        assert nothing.shape == (0,) and nothing.dtype == torch.int64


@torch.inference_mode()
def test_rows_with_different_parameters_are_independent():
    logits = make_logits("random", num_rows=len(CASES) + 2)
    uniforms = torch.rand(logits.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    cases = [dict(), *CASES, dict()]
    together = {name: torch.cat([numbers(1, **case)[name] for case in cases]) for name in numbers(1)}
    ids = sample(logits, uniforms, **together)
    for row, case in enumerate(cases):
        assert sample(logits[row : row + 1], uniforms[row : row + 1], **numbers(1, **case)).item() == ids[row]


@settings(deadline=None, max_examples=300)
@given(
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(KINDS),
    vocab=st.sampled_from([2, 5, 17, 60]),
    num_candidates=st.sampled_from([1, 2, 4, 16, 64]),
    temperature=st.sampled_from([0.0, 1e-6, 0.2, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 3, 4, 5, 30]),
    top_p=st.sampled_from([1e-9, 0.3, 0.9, 0.9999, 1.0]),
    min_p=st.sampled_from([0.0, 1e-4, 0.1, 1.0]),
)
@torch.inference_mode()
def test_few_candidates_and_a_full_sort_pick_the_same_token(
    seed, kind, vocab, num_candidates, temperature, top_k, top_p, min_p
):
    logits = make_logits(kind, num_rows=20, vocab=vocab, seed=seed)
    uniforms = torch.rand(20, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    params = numbers(20, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    expected = sample_reference(logits, uniforms, **params)
    assert torch.equal(sample(logits, uniforms, **params, num_candidates=num_candidates), expected)


# -- penalties -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [1.3, 0.7, 1e3])
@torch.inference_mode()
def test_the_repetition_penalty_is_transformers(penalty):
    logits = make_logits("-inf", num_rows=1, vocab=50)
    logits[0, 3] = 0.0
    ids = torch.randint(0, 50, (1, 30), generator=torch.Generator().manual_seed(0))
    ids[0, 0] = 3
    seen = torch.zeros(50, dtype=torch.bool)
    seen[ids[0]] = True
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())[0]
    numbers_ = dict(presence_penalty=0.0, frequency_penalty=0.0)
    unused = torch.randint(0, 5, (50,))
    assert torch.equal(penalize(logits[0], seen, unused, repetition_penalty=penalty, **numbers_), expected)


@torch.inference_mode()
def test_presence_and_frequency_are_subtracted_after_the_repetition_penalty():
    logits = torch.tensor([2.0, -2.0, 1.0, 4.0])
    seen, counts = torch.tensor([True, True, False, True]), torch.tensor([3, 1, 0, 0])
    got = penalize(logits, seen, counts, repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25)
    # l[j] - c[j] * frequency - (c[j] > 0) * presence, over the output only: token 3 was in the prompt
    torch.testing.assert_close(got, torch.tensor([1 - 0.75 - 0.5, -4 - 0.25 - 0.5, 1.0, 2.0]))
    assert logits.tolist() == [2.0, -2.0, 1.0, 4.0], "logprobs are of the unchanged logits"


# -- log-probabilities -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_top_logprobs(kind):
    for row in make_logits(kind):
        expected = row.double().log_softmax(dim=-1)
        for chosen, count in ((0, 0), (7, 1), (149, 20)):
            value, best = top_logprobs(row, chosen, count)
            assert value == pytest.approx(expected[chosen].item(), abs=1e-5)
            assert len(best) == count
            assert [v for _, v in best] == pytest.approx(
                expected.sort(descending=True).values[:count].tolist(), abs=1e-5
            )
            assert list(best) == sorted(best, key=lambda pair: (-pair[1], pair[0])), "equal ones by rising id"
            kept_out = [i for i in range(150) if i not in dict(best)]
            assert all((row[i], -i) <= min((row[j], -j) for j, _ in best) for i in kept_out) if best else True


@torch.inference_mode()
def test_top_logprobs_of_a_small_vocabulary_are_all_of_it():
    value, best = top_logprobs(torch.tensor([1.0]), 0, 20)
    assert (value, best) == (0.0, ((0, 0.0),))


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_token_scores(kind):
    """More rows than a block, in any order, some twice; ranks count equal logits with a lower id first."""
    logits_TV = make_logits(kind)
    rows = [(7 * i) % len(logits_TV) for i in range(40)]
    targets = [(31 * i) % 150 for i in range(40)]
    logprobs_S, ranks_S = token_scores(logits_TV, torch.tensor(rows), torch.tensor(targets))
    expected = logits_TV.double().log_softmax(dim=-1)
    order = logits_TV.float().sort(dim=-1, descending=True, stable=True).indices.tolist()
    for row, target, logprob, rank in zip(rows, targets, logprobs_S.tolist(), ranks_S.tolist(), strict=True):
        assert logprob == pytest.approx(expected[row, target].item(), abs=1e-5)
        assert order[row][rank - 1] == target
