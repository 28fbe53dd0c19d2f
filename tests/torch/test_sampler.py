"""What a rank's sampler keeps of requests."""

from __future__ import annotations

import torch
from torch import Tensor

from narrows.engine.sampler import Sampler
from narrows.ops.step_block import StepBlock
from narrows.sched.batch import Batch, Chunk
from narrows.sched.sampling import SamplingParams


def biased(bias: tuple[tuple[int, float], ...], *requests: int, ended: tuple[int, ...] = ()) -> Batch:
    params = SamplingParams(temperature=1.0, seed=1, logit_bias=bias)
    chunks = [
        Chunk(request=request, tokens=(1,), start=0, pages=(1,), num_logits=1, sampling=params.with_seed(request))
        for request in requests
    ]
    return Batch(groups=(tuple(chunks),), ended=ended)


def kept(sampler: Sampler, batch: Batch) -> list[Tensor]:
    block = StepBlock(sampler.device)
    _, see = sampler.stage(batch, block)
    block.send()
    see(torch.ones(batch.num_rows, dtype=torch.int64))
    return [sampler.bias(chunk.request, (), block)[1].tensor for group in batch.groups for chunk in group]


def test_texts_of_a_request_share_their_bias_and_later_ones_have_their_own() -> None:
    sampler = Sampler(vocab_size=8, device=torch.device("cpu"))
    first, second = kept(sampler, biased(((3, 1.5),), 1, 2))
    assert first is second and first.tolist() == [1.5]
    for number in range(20):  # a tuple that takes the place of another in memory is not the same
        (other,) = kept(sampler, biased(((3, float(number)),), 10 + number))
        assert other.tolist() == [number]
    assert kept(sampler, biased(((3, 9.0),), 1, ended=(1,)))[0].tolist() == [9.0], "the request that had it has ended"
