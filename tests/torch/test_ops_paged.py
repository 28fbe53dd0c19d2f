"""paged: the host's arithmetic of pages, slots and decode groups."""

import pytest
import torch

from narrows.ops.paged import (
    DecodeGroup,
    DecodeRows,
    build_paged_rows,
    padded_pages,
    stage_paged_rows,
    windowed_rows,
    write_cache,
)
from narrows.ops.step_block import StepBlock


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_a_mixed_step():
    rows = build_paged_rows([(5, 1, (4, 2)), (2, 3, (3, 1)), (0, 1, (5,)), (0, 0, ()), (0, 2, (6,))], page_size=4)
    assert rows.positions_T.tolist() == [5, 2, 3, 4, 0, 0, 1]
    assert rows.slots_T.tolist() == [9, 14, 15, 4, 20, 24, 25]
    assert rows.positions_T.dtype == rows.slots_T.dtype == rows.decode_slots_BL.dtype == torch.int64
    first, second = rows.prefills
    assert (first.row_start, first.row_stop, first.context_len) == (1, 4, 5)
    assert first.slots_L.tolist() == [12, 13, 14, 15, 4]
    assert (second.row_start, second.row_stop, second.context_len) == (5, 7, 2)
    assert second.slots_L.tolist() == [24, 25]
    assert rows.decode_rows_B.tolist() == [0, 4]
    assert rows.decode_lens_B.tolist() == [6, 1]
    assert rows.decode_slots_BL.tolist() == [[16, 17, 18, 19, 8, 9], [20, 0, 0, 0, 0, 0]]
    assert rows.decode_groups == (DecodeGroup(start=0, stop=2, max_len=6),)


def test_no_rows():
    for spans in ([], [(3, 0, (1,))]):
        rows = build_paged_rows(spans, page_size=16)
        assert rows.positions_T.shape == rows.slots_T.shape == rows.decode_rows_B.shape == (0,)
        assert rows.decode_slots_BL.shape == (0, 0) and rows.prefills == rows.decode_groups == ()


def test_pages_that_are_not_yet_full_or_not_yet_used():
    rows = build_paged_rows([(3, 1, (7, 9, 8)), (0, 1, (5, 6))], page_size=4)
    assert rows.decode_slots_BL.tolist() == [[28, 29, 30, 31], [20, 0, 0, 0]]
    with pytest.raises(AssertionError, match="5 tokens do not fit in 1 pages"):
        build_paged_rows([(3, 2, (7,))], page_size=4)


def test_decode_groups_bound_slots_and_cover_all_rows_in_order():
    lens = [3, 900, 5, 6, 7, 2000, 500, 500, 40, 1]
    spans = [(length - 1, 1, tuple(range(1, 1 + -(-length // 16)))) for length in lens]
    groups = build_paged_rows(spans, page_size=16).decode_groups
    assert [(g.start, g.stop) for g in groups] == [(0, 1), (1, 2), (2, 5), (5, 6), (6, 8), (8, 10)]
    for group in groups:
        assert group.max_len == max(lens[group.start : group.stop])
        assert group.stop - group.start == 1 or group.max_len * (group.stop - group.start) <= 1024


def test_a_dead_row_meets_the_null_slot():
    rows = build_paged_rows([(0, 1, (0,)), (0, 1, (1,))], page_size=4)
    assert rows.slots_T.tolist() == [0, 4] and rows.decode_slots_BL.tolist() == [[0], [4]]


@pytest.mark.parametrize("width", [(5,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_write_cache(width, dtype):
    cache = torch.zeros((12, *width), dtype=dtype)
    new = torch.randn((3, *width)).to(dtype)
    write_cache(cache, new, torch.tensor([4, 11, 7]))
    assert torch.equal(cache[[4, 11, 7]], new) and cache.count_nonzero() == new.count_nonzero()
    write_cache(cache, new[:0], torch.empty(0, dtype=torch.int64))
    write_cache(cache, new[:2], torch.tensor([0, 0]))  # two dead rows
    assert torch.equal(cache[[4, 11, 7]], new)


def test_persistent_decode_inputs_equal_rebuilt_ones():
    """Rows that grow by one or by several tokens, get pages, change places, shrink, leave, come back, and become other
    requests'."""
    steps = [
        [(5, 1, (4, 2)), (0, 1, (5,)), (7, 1, (9, 8))],
        [(6, 1, (4, 2)), (1, 1, (5,)), (8, 1, (9, 8, 3))],
        [(7, 1, (4, 2)), (2, 1, (5,)), (9, 1, (9, 8, 3))],
        [(9, 1, (4, 2, 6)), (7, 1, (9, 8)), (3, 1, (5,))],
        [(10, 1, (4, 7, 6)), (3, 1, (8,)), (11, 1, (5, 1, 2))],
        [(2, 1, (4,)), (4, 1, (8, 10)), (0, 1, (0,))],
        [(5, 1, (8, 10)), (1, 1, (0,))],
        [(6, 1, (8, 10))],
        [(7, 1, (8, 10)), (3, 1, (4,)), (2, 1, (0,))],
    ]
    held = DecodeRows(3, 12, page_size=4)
    addresses = None
    for spans in steps:
        found, wanted = held.set(spans), build_paged_rows(spans, page_size=4)
        for name in ("positions_T", "slots_T", "decode_rows_B", "decode_lens_B"):
            assert getattr(found, name).tolist() == getattr(wanted, name).tolist(), name
        for row, length in enumerate(wanted.decode_lens_B.tolist()):
            assert found.decode_slots_BL[row, :length].tolist() == wanted.decode_slots_BL[row, :length].tolist()
        assert found.decode_groups == wanted.decode_groups and found.prefills == ()
        now = [x.data_ptr() for x in (found.positions_T, found.slots_T, found.decode_lens_B, found.decode_slots_BL)]
        assert addresses in (None, now)
        addresses = now


def staged(spans, **options):
    block = StepBlock(torch.device("cpu"))
    rows = stage_paged_rows(spans, 4, block, torch.float32, **options)
    block.send()
    return rows()


MIXED = [(5, 1, (4, 2)), (2, 3, (3, 1)), (0, 1, (5,)), (0, 0, ()), (0, 2, (6,)), (18, 1, (7, 9, 8, 10, 11, 12))]


@pytest.mark.parametrize("window", [None, 3, 7])
@pytest.mark.parametrize("spans", [MIXED, [], [(0, 5, (1, 2))], [(0, 1, (0,))]])
def test_rows_for_a_device_are_those_of_the_host_in_padded_pages(spans, window):
    host, device = build_paged_rows(spans, page_size=4), staged(spans)
    if window is not None:
        host, device = windowed_rows(host, window), windowed_rows(device, window)
    assert torch.equal(device.positions_T, host.positions_T) and torch.equal(device.slots_T, host.slots_T)
    assert device.slots_T.dtype == device.positions_T.dtype == device.decode_slots_BL.dtype == torch.int64
    assert torch.equal(device.decode_rows_B, host.decode_rows_B)
    assert torch.equal(device.decode_lens_B, host.decode_lens_B)
    for one, other in zip(device.prefills, host.prefills, strict=True):
        assert torch.equal(one.slots_L, other.slots_L) and one.window == other.window
        assert (one.row_start, one.row_stop, one.context_len) == (other.row_start, other.row_stop, other.context_len)
    for b, length in enumerate(host.decode_lens_B.tolist()):
        assert torch.equal(device.decode_slots_BL[b, :length], host.decode_slots_BL[b, :length])
        assert not device.decode_bias_BL[b, :length].any()
        assert (device.decode_bias_BL[b, length:] == float("-inf")).all()
    most = 4 * max((padded_pages(-(-(start + 1) // 4)) for start, rows, _ in spans if rows == 1), default=0)
    most = most if window is None else min(most, window)
    assert device.decode_slots_BL.shape == device.decode_bias_BL.shape == (host.decode_lens_B.shape[0], most)
    assert [group.max_len for group in device.decode_groups] == [most] * len(device.decode_groups)


def test_padding_of_a_device_is_in_the_null_page():
    slots_BL = staged([(17, 1, (7, 9, 8, 10, 11)), (0, 1, (5,))]).decode_slots_BL
    assert slots_BL.shape == (2, 6 * 4)
    assert slots_BL[0, 20:].tolist() == [0, 1, 2, 3] and slots_BL[1, 4:].max() == 3


def test_groups_of_a_device_depend_on_no_length_or_on_each_rows_own():
    spans = [(length - 1, 1, tuple(range(1, 6))) for length in (20, 1, 5, 9, 17)]
    groups = [(group.start, group.stop, group.max_len) for group in staged(spans, decode_group_slots=48).decode_groups]
    assert groups == [(0, 2, 24), (2, 4, 24), (4, 5, 24)]
    alone = [(group.start, group.stop, group.max_len) for group in staged(spans, decode_group_slots=1).decode_groups]
    assert alone == [(0, 1, 24), (1, 2, 4), (2, 3, 8), (3, 4, 12), (4, 5, 24)]
    with pytest.raises(AssertionError, match="5 tokens do not fit in 1 pages"):
        staged([(3, 2, (7,))])
