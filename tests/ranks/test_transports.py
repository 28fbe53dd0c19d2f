"""All transports give the same bits for the same calls, and name the same differences between ranks.

The ranks are threads of this process, joined by each transport that runs on one host: references between threads,
shared memory, and gloo.
"""

from __future__ import annotations

import pytest
import ranks_lab as lab
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transports_lab import TRANSPORTS, run_over

from narrows.comm import Communicator
from narrows.layout import Mesh

COUNTS = st.lists(st.sampled_from([0, 0, 1, 2, 3, 17, 130, 400]), min_size=4, max_size=4)
MESHES = [Mesh.of(dp=dp, tp=tp) for dp, tp in [(1, 1), (1, 2), (2, 1), (1, 3), (2, 2), (1, 4)]]


def assert_same(got: list[dict[str, Tensor]], want: list[dict[str, Tensor]]) -> None:
    for mine, theirs in zip(got, want, strict=True):
        assert list(mine) == list(theirs)
        for name, value in theirs.items():
            assert (mine[name].dtype, mine[name].shape) == (value.dtype, value.shape), name
            assert mine[name].is_contiguous() or not value.is_contiguous(), name
            assert torch.equal(*(x.contiguous().view(-1).view(torch.uint8) for x in (mine[name], value))), name


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(MESHES),
    COUNTS,
    st.sampled_from([0, 1, 33, 64, 511]),
    st.sampled_from([torch.bfloat16, torch.float32, torch.float16]),
    st.booleans(),
)
def test_every_collective_has_the_same_bits_over_each_transport(
    mesh: Mesh, counts: list[int], width: int, dtype: torch.dtype, checked: bool
) -> None:
    """Uneven rows, empty shares and one rank; sizes on both sides of every limit of the transports."""

    def rank(comm: Communicator) -> dict[str, Tensor]:
        return lab.collectives(comm, counts, width, dtype)

    want = run_over("threads", mesh, rank)
    for transport in TRANSPORTS:
        assert_same(run_over(transport, mesh, rank, checked=checked), want)


def test_the_comparison_sees_one_wrong_count() -> None:
    """Guards the test above: one row more on one rank and one less on the next changes the results."""
    mesh = Mesh.of(dp=1, tp=2)
    for transport in TRANSPORTS:
        got, want = (
            run_over(transport, mesh, lambda comm, counts=counts: lab.collectives(comm, counts, 3, torch.float32))
            for counts in ((2, 3), (3, 2))
        )
        with pytest.raises(AssertionError):
            assert_same([{"x": x} for rank in got for x in rank.values()], [{"x": x} for r in want for x in r.values()])


FAULTS = ["label", "operation", "width", "dtype", "counts", "fields", "addends", "root", "number"]


@pytest.mark.parametrize("how", FAULTS)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_checked_mode_names_the_rank_with_a_different_call(transport: str, how: str) -> None:
    """Every rank gets the same text, and the ranks can continue if their numbers of collectives agree."""

    def rank(comm: Communicator) -> tuple[str, float]:
        return lab.differing(comm, how), 3.0 if how == "number" else lab.sum_of(comm, 0.0)

    (text, total), *others = run_over(transport, Mesh.of(dp=1, tp=3), rank, checked=True)
    assert others == [(text, total)] * 2 and total == 3.0
    assert text.startswith(f"ranks met in different collectives: rank 1 came to #{1 if how == 'number' else 0} ")
    assert ", ranks 0, 2 to #0 " in text


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("checked", [False, True])
def test_one_rank_exchanges_nothing(transport: str, checked: bool) -> None:
    def rank(comm: Communicator) -> int:
        lab.groups_of_one(comm)
        return comm.num_collectives

    assert run_over(transport, Mesh.of(dp=1, tp=1), rank, checked=checked) == [0]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_results_and_inputs_belong_to_the_caller(transport: str) -> None:
    mesh = Mesh.of(dp=1, tp=3)
    run_over(transport, mesh, lab.results_are_nobody_elses)
    run_over(transport, mesh, lambda comm: lab.inputs_may_be_written_again(comm, 10, 200))
    run_over(transport, mesh, lab.send_buffers)
