"""What one CUDA graph per bucket of a decode step needs, and what its launches cost, seen on fake CUDA tensors.

A captured step is replayed with other numbers in the same memory. So steps of one key (program, rows, pages of the
longest context) must give the device the same ops, with equal shapes and equal scalars, whatever their contexts, pages
and lengths are: a number of the host that reaches an op would be stale in a replay, silently.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from fake_cuda import CUDA, FAMILIES, PAGE, Called, Ranks, cuda_device_guard, nccl, prefixes
from torch import Tensor
from torch.utils._pytree import tree_map

from narrows.engine.sampler import Sampler
from narrows.layout import Mesh
from narrows.ops import mlp, paged
from narrows.ops.step_block import StepBlock
from narrows.sched.batch import Batch, Chunk, sample_ref
from narrows.sched.sampling import SamplingParams

__all__ = ["cuda_device_guard", "nccl", "prefixes"]

ONE = Mesh.of(dp=1, tp=1)
Made = Callable[[str], Ranks]
"""The ranks of a family."""


def decode(lengths: Sequence[int], *, shift: int = 0, sampling: SamplingParams | None = None) -> Batch:
    """Rows of requests with contexts of so many tokens, their own included, in pages that ``shift`` moves."""
    rows = []
    for request, length in enumerate(lengths):
        pages = tuple((shift + 61 * request + 7 * page) % 251 + 1 for page in range(-(-length // PAGE)))
        token = sample_ref(request % 2) if request < 3 else 5
        rows.append(
            Chunk(
                request=request,
                start=length - 1,
                tokens=(token,),
                pages=pages,
                num_logits=1,
                sampling=sampling,
                num_prompt=1,
            )
        )
    return Batch(groups=(tuple(rows),))


def prefill(num_rows: int, start: int = 0, others: Sequence[int] = ()) -> Batch:
    """A prompt's last rows behind ``start`` of its tokens, and decode rows of contexts of so many tokens."""
    pages = tuple(range(1, 1 + -(-(start + num_rows) // PAGE)))
    prompt = Chunk(request=99, start=start, tokens=(5,) * num_rows, pages=pages, num_logits=1)
    return Batch(groups=((prompt, *(decode(others).groups[0] if others else ())),))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A rank alone of each family."""
    made: dict[str, Ranks] = {}

    def of(family: str) -> Ranks:
        if family not in made:
            made[family] = Ranks(FAMILIES[family], tmp_path_factory.mktemp("model"), None, (0,), mesh=ONE)
            made[family].run([prefill(2)], "auto")  # a first step's samples have no predecessor
        return made[family]

    return of


def calls(ranks: Ranks, batch: Batch) -> list[Called]:
    """Every op of a step."""
    ranks.guard.calls = made = []
    try:
        ranks.run([batch], "auto")
    finally:
        ranks.guard.calls = None
    return made


def trace(called: Sequence[Called]) -> list[tuple[Any, ...]]:
    """What a graph of these ops would hold of them: shapes, strides and types of tensors, and every scalar."""

    def held(value: Any) -> Any:
        if isinstance(value, Tensor):
            return tuple(value.shape), value.stride(), value.storage_offset(), value.dtype
        return value

    return [
        (one.stage, one.layer, one.func.name(), str(tree_map(held, (one.args, one.kwargs))))
        for one in called
        if one.stage
    ]


SAME_KEY = [
    decode([500, 400, 300, 200, 100, 99, 98, 1 + 2]),
    decode([491, 2, 2, 2, 2, 2, 2, 2], shift=17),
    decode([385, 512, 511, 510, 509, 508, 507, 506], shift=90),
]
"""Their longest contexts need 25 to 32 pages."""
DRAWN = SamplingParams(temperature=0.7, top_k=40, top_p=0.9, min_p=0.01, seed=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_of_one_key_give_the_device_the_same_ops(family: str, ranks: Made) -> None:
    first, *others = (trace(calls(ranks(family), batch)) for batch in SAME_KEY)
    assert len(first) > 50
    for other in others:
        assert len(other) == len(first)
        for one, same in zip(first, other, strict=True):
            assert one == same


@pytest.mark.parametrize("sampling", [None, DRAWN])
def test_a_wider_step_of_more_pages_is_another_key(ranks: Made, sampling: SamplingParams | None) -> None:
    """So the number of keys of a program is that of `padded_pages`, not that of contexts."""
    llama = ranks("llama")
    at_most = [trace(calls(llama, decode([length, 3], sampling=sampling))) for length in (1024, 769, 768)]
    assert at_most[0] == at_most[1] != at_most[2]
    assert len({paged.padded_pages(pages) for pages in range(1, 8193)}) == 26


def test_a_number_of_the_host_in_a_step_is_found(ranks: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    act_mul, numbers = mlp.act_mul, iter(range(1, 1000))
    monkeypatch.setattr(mlp, "act_mul", lambda x, act: act_mul(x, act) * next(numbers))
    first, other = (trace(calls(ranks("llama"), batch)) for batch in SAME_KEY[:2])
    (differs,) = {one[:3] for one, same in zip(first, other, strict=True) if one != same}
    assert differs == ("mlp", 0, "aten::mul.Tensor")


EVERYTHING = Batch(
    groups=(
        (
            Chunk(  # a prompt that is scored, then drawn under a mask
                request=50,
                start=16,
                tokens=(5,) * 6,
                pages=(1, 2),
                num_logits=4,
                targets=(5, 5, 5),
                skipped=(7,) * 16,
                sampling=SamplingParams(
                    temperature=0.7,
                    repetition_penalty=1.1,
                    frequency_penalty=0.5,
                    seed=1,
                    logprobs=3,
                    prompt_logprobs=2,
                    logit_bias=((3, 1.0), (9, -1.0)),
                ),
                num_prompt=22,
                allowed=b"\x5a" * 100,
                banned=(1, 4),
            ),
            *decode([40, 300], sampling=DRAWN).groups[0],
        ),
    )
)
STEPS = {
    "decode": SAME_KEY[0],
    "drawn": decode([500, 40], sampling=DRAWN),
    "prompt": prefill(90),
    "mixed": prefill(200, 100, (40, 300)),
    "everything": EVERYTHING,
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("family", ["deepseek_v3", "llama", "mistral with windows", "mistral by length", "qwen3_moe"])
def test_the_host_sends_one_pinned_block_and_waits_for_nothing(family: str, step: str, ranks: Made) -> None:
    check_one_copy(calls(ranks(family), STEPS[step]))


def memory(tensor: Tensor | None) -> int:
    """What tells the memory that a tensor lies in from others."""
    assert tensor is not None
    return tensor.untyped_storage()._cdata


def check_one_copy(made: Sequence[Called]) -> None:
    """One copy, of pinned memory, that nobody waits for, before the plan's first op; and nothing is read."""
    copies = [(at, one) for at, one in enumerate(made) if one.copies_from is not None]
    assert [one.func.name() for _, one in copies] == ["aten::_to_copy"], "one copy"
    ((at, copy),) = copies
    pinned = [memory(one.result) for one in made if one.kwargs.get("pin_memory")]
    assert memory(copy.copies_from) in pinned, "of pinned memory"
    assert copy.kwargs["non_blocking"], "nobody waits for it"
    assert not any(one.stage for one in made[:at]), "before the plan"
    assert not {one.func.overloadpacket for one in made} & set(READS)


READS = (
    torch.ops.aten._local_scalar_dense,
    torch.ops.aten.item,
    torch.ops.aten.nonzero,
    torch.ops.aten.masked_select,
    torch.ops.aten.equal,
)


def test_a_second_copy_is_found(ranks: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = Sampler.stage

    def twice(self: Sampler, batch: Batch, block: StepBlock) -> Any:
        torch.tensor([1], device=CUDA)
        return begin(self, batch, block)

    monkeypatch.setattr(Sampler, "stage", twice)
    with pytest.raises(AssertionError, match="one copy"):
        check_one_copy(calls(ranks("llama"), STEPS["decode"]))


def test_a_copy_that_the_host_waits_for_is_found(ranks: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, pin_memory=False, **options: empty(*args, **options))
    with pytest.raises(AssertionError, match="of pinned memory"):
        check_one_copy(calls(ranks("llama"), STEPS["decode"]))


def launched(made: Sequence[Called]) -> dict[str, int]:
    """Launches by stage of the last layer, and by stage outside of layers; those before the plan under ``""``."""
    last = max(one.layer for one in made if one.layer is not None)
    return dict(Counter(one.stage for one in made if one.launches and one.layer in (None, last)))


COUNTED = {
    "decode": decode([500] * 8),
    "drawn": decode([500] * 8, sampling=DRAWN),
    "prompt": prefill(512),
    "chunk": prefill(512, 500),
}
LAYERS = {"deepseek_v3": 58, "llama": 32, "qwen3_moe": 48}
"""Like the last one, in the published model."""
LAUNCHES: dict[str, dict[str, dict[str, int]]] = {
    "deepseek_v3": {
        "decode": {
            "": 12,
            "embed": 7,
            "input_norm": 3,
            "qkv_a_proj": 1,
            "latent_norm": 5,
            "attention": 28,
            "post_attn_norm": 3,
            "router": 16,
            "experts": 30,
            "final_norm": 3,
            "lm_head": 1,
            "sample": 1,
        },
        "drawn": {
            "": 12,
            "embed": 7,
            "input_norm": 3,
            "qkv_a_proj": 1,
            "latent_norm": 5,
            "attention": 28,
            "post_attn_norm": 3,
            "router": 16,
            "experts": 30,
            "final_norm": 3,
            "lm_head": 1,
            "sample": 39,
        },
        "prompt": {
            "": 4,
            "embed": 7,
            "input_norm": 3,
            "qkv_a_proj": 1,
            "latent_norm": 5,
            "attention": 25,
            "select_rows before post_attn_norm": 2,
            "post_attn_norm": 3,
            "router": 16,
            "experts": 30,
            "final_norm": 3,
            "lm_head": 1,
            "sample": 1,
        },
        "chunk": {
            "": 4,
            "embed": 7,
            "input_norm": 3,
            "qkv_a_proj": 1,
            "latent_norm": 5,
            "attention": 25,
            "select_rows before post_attn_norm": 2,
            "post_attn_norm": 3,
            "router": 16,
            "experts": 30,
            "final_norm": 3,
            "lm_head": 1,
            "sample": 1,
        },
    },
    "llama": {
        "decode": {
            "": 12,
            "embed": 7,
            "input_norm": 2,
            "attention": 14,
            "post_attn_norm": 3,
            "mlp": 4,
            "final_norm": 3,
            "lm_head": 1,
            "sample": 1,
        },
        "drawn": {
            "": 12,
            "embed": 7,
            "input_norm": 2,
            "attention": 14,
            "post_attn_norm": 3,
            "mlp": 4,
            "final_norm": 3,
            "lm_head": 1,
            "sample": 39,
        },
        "prompt": {
            "": 4,
            "embed": 7,
            "input_norm": 2,
            "attention": 14,
            "select_rows before post_attn_norm": 2,
            "post_attn_norm": 3,
            "mlp": 4,
            "final_norm": 3,
            "lm_head": 1,
            "sample": 1,
        },
        "chunk": {
            "": 4,
            "embed": 7,
            "input_norm": 2,
            "attention": 14,
            "select_rows before post_attn_norm": 2,
            "post_attn_norm": 3,
            "mlp": 4,
            "final_norm": 3,
            "lm_head": 1,
            "sample": 1,
        },
    },
    "qwen3_moe": {
        "decode": {
            "": 12,
            "embed": 7,
            "input_norm": 2,
            "attention": 20,
            "post_attn_norm": 3,
            "router": 9,
            "experts": 25,
            "final_norm": 3,
            "lm_head": 1,
            "sample": 1,
        },
        "drawn": {
            "": 12,
            "embed": 7,
            "input_norm": 2,
            "attention": 20,
            "post_attn_norm": 3,
            "router": 9,
            "experts": 25,
            "final_norm": 3,
            "lm_head": 1,
            "sample": 39,
        },
        "prompt": {
            "": 4,
            "embed": 7,
            "input_norm": 2,
            "attention": 20,
            "select_rows before post_attn_norm": 2,
            "post_attn_norm": 3,
            "router": 9,
            "experts": 25,
            "final_norm": 3,
            "lm_head": 1,
            "sample": 1,
        },
        "chunk": {
            "": 4,
            "embed": 7,
            "input_norm": 2,
            "attention": 20,
            "select_rows before post_attn_norm": 2,
            "post_attn_norm": 3,
            "router": 9,
            "experts": 25,
            "final_norm": 3,
            "lm_head": 1,
            "sample": 1,
        },
    },
}


@pytest.mark.parametrize("step", COUNTED)
@pytest.mark.parametrize("family", LAYERS)
def test_launches_of_each_stage(family: str, step: str, ranks: Made) -> None:
    """Equal, so that who saves a launch writes it down here."""
    found, held = launched(calls(ranks(family), COUNTED[step])), LAUNCHES[family][step]
    more = {stage: (num, held.get(stage, 0)) for stage, num in found.items() if num > held.get(stage, 0)}
    fewer = {stage: (found.get(stage, 0), num) for stage, num in held.items() if num > found.get(stage, 0)}
    assert not more, f"more launches than before (now, before): {more}"
    assert not fewer, f"fewer launches than before (now, before), so lower the numbers: {fewer}"
