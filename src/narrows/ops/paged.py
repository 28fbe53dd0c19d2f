"""How the rows of one step meet a paged cache: where each row is written, and what each row reads.

A cache is a tensor [S, ...] of slots, one token each; page p is the slots p * page_size .. (p + 1) * page_size - 1.
Page 0 is the null page: never a request's, written by dead rows and read by padding, so it must hold finite numbers
(zeros at first).

Letters: T rows of the step, B decode rows, L tokens in a context, S slots.
"""

import mmap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from narrows.errors import ConfigError
from narrows.ops.step_block import StepBlock

__all__ = [
    "DecodeGroup",
    "DecodeRows",
    "PagedRows",
    "PrefillSpan",
    "build_paged_rows",
    "empty_cache",
    "padded_pages",
    "row_contexts",
    "stage_paged_rows",
    "windowed_rows",
    "write_cache",
]

CPU_GROUP_SLOTS = 1024
"""Slots of the decode rows that are read together on CPU: see `build_paged_rows`."""

GPU_GROUP_SLOTS = 1 << 18
"""The same elsewhere, where a group is a dozen launches."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillSpan:
    """Rows [row_start, row_stop) of the step: the last tokens of a context of ``context_len`` tokens, in order.

    ``slots_L`` [context_len] int64: the slot of each token of the context, these rows' own included. ``window``: a row
    sees only so many of them, its own the last; None: all up to its own.
    """

    row_start: int
    row_stop: int
    context_len: int
    slots_L: Tensor
    window: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeGroup:
    """Decode rows [start, stop), counted among decode rows, that are read together: ``max_len`` slots each.

    Groups keep the padding of ragged contexts, and the memory of one read, small. They are host numbers: an op may use
    them or take all decode rows at once.
    """

    start: int
    stop: int
    max_len: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PagedRows:
    """One step's rows against the cache. Every row is in exactly one prefill span or a decode row.

    ``positions_T`` int64: each row's position in its context. ``slots_T`` int64: where the row's KV is written.
    ``decode_rows_B`` int64: the rows that stand alone; row ``decode_rows_B[b]`` reads the first ``decode_lens_B[b]``
    (>= 1, itself included) of ``decode_slots_BL[b]``, which is padded with slots of the null page.

    ``decode_bias_BL``: to be added to scores, 0 where a row sees the token and -inf behind its context. It is there
    where no length may be a number of the host (`stage_paged_rows`); then ``max_len`` is a bound for any such lengths.
    """

    positions_T: Tensor
    slots_T: Tensor
    prefills: tuple[PrefillSpan, ...]
    decode_rows_B: Tensor
    decode_slots_BL: Tensor
    decode_lens_B: Tensor
    decode_groups: tuple[DecodeGroup, ...]
    decode_bias_BL: Tensor | None = None


def empty_cache(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A cache of zeros. On CPU a page of it takes memory when it is first written, not before."""
    nbytes = prod(shape) * dtype.itemsize
    if device.type != "cpu" or nbytes == 0:
        return torch.zeros(tuple(shape), dtype=dtype, device=device)
    try:
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise ConfigError(
            f"a KV cache of {nbytes / 1e9:.1f} GB per layer: {error.strerror}; lower --kv-tokens"
        ) from None
    return torch.frombuffer(memory, dtype=dtype).view(tuple(shape))


def build_paged_rows(
    spans: Sequence[tuple[int, int, Sequence[int]]], page_size: int, *, decode_group_slots: int = CPU_GROUP_SLOTS
) -> PagedRows:
    """The `PagedRows` on CPU of a step whose rows are these spans, one after the other.

    A span is ``(start, num_rows, pages)``: ``num_rows`` tokens at positions start, start + 1, ... of a context that
    lives in ``pages``, in order. One row makes a decode row, more a prefill span, none nothing. A dead row is ``(0,
    1, (0,))``. ``decode_group_slots``: decode rows are grouped up to this many slots, padding counted (1024: best or
    near it from 1 to 64 rows of 64 to 1024 tokens on one thread; a longer context is its own group).
    """
    positions: list[Tensor] = []
    slots: list[Tensor] = []
    prefills: list[PrefillSpan] = []
    decode_rows: list[int] = []
    decode_lens: list[int] = []
    decode_pages: list[Sequence[int]] = []
    offsets = torch.arange(page_size)
    row = 0
    for start, num_rows, pages in spans:
        context_len = start + num_rows
        assert start >= 0 and num_rows >= 0
        assert context_len <= len(pages) * page_size, f"{context_len} tokens do not fit in {len(pages)} pages"
        if num_rows == 1:
            decode_rows.append(row)
            decode_lens.append(context_len)
            decode_pages.append(pages)
            positions.append(torch.tensor([start]))
            slots.append(torch.tensor([pages[start // page_size] * page_size + start % page_size]))
        elif num_rows > 1:
            slots_L = (torch.tensor(pages)[:, None] * page_size + offsets).flatten()[:context_len]
            prefills.append(
                PrefillSpan(row_start=row, row_stop=row + num_rows, context_len=context_len, slots_L=slots_L)
            )
            positions.append(torch.arange(start, context_len))
            slots.append(slots_L[start:])
        row += num_rows
    no_rows = torch.empty(0, dtype=torch.int64)
    return PagedRows(
        positions_T=torch.cat([no_rows, *positions]),
        slots_T=torch.cat([no_rows, *slots]),
        prefills=tuple(prefills),
        decode_rows_B=torch.tensor(decode_rows, dtype=torch.int64),
        decode_slots_BL=_decode_slots(decode_pages, decode_lens, page_size),
        decode_lens_B=torch.tensor(decode_lens, dtype=torch.int64),
        decode_groups=_decode_groups(decode_lens, decode_group_slots),
    )


def stage_paged_rows(
    spans: Sequence[tuple[int, int, Sequence[int]]],
    page_size: int,
    block: StepBlock,
    dtype: torch.dtype,
    *,
    decode_group_slots: int = GPU_GROUP_SLOTS,
) -> Callable[[], PagedRows]:
    """As `build_paged_rows`, for a device: the numbers go into ``block``; what is returned makes the rows of them once
    the block is sent.

    No shape and no number that an op of decode rows gets depends on a length or a page, but for the pages of the
    longest context, rounded up (`padded_pages`). So steps of as many rows and padded pages are the same to the device,
    as a graph of them wants. Lengths take effect through ``decode_bias_BL``, of ``dtype``. Only where
    ``decode_group_slots`` is 1 is each row read by itself, in its own padded pages, so that no other's length pads it.
    """
    decodes = [(start + 1, pages) for start, num_rows, pages in spans if num_rows == 1]
    row_starts = np.cumsum([0, *(num_rows for _, num_rows, _ in spans)]).tolist()
    prefills: list[tuple[int, int, int]] = []
    positions, slots, contexts = [], [], []
    for (start, num_rows, pages), row in zip(spans, row_starts, strict=False):
        assert start >= 0 and num_rows >= 0
        stop = start + num_rows
        assert stop <= len(pages) * page_size, f"{stop} tokens do not fit in {len(pages)} pages"
        if num_rows > 1:
            prefills.append((row, row + num_rows, stop))
            contexts.append(block.put(_slots(pages, 0, stop, page_size)))
        positions.append(np.arange(start, stop))
        slots.append(_slots(pages, start, stop, page_size))
    lens = [length for length, _ in decodes]
    num_padded = [padded_pages(-(-length // page_size)) for length in lens]
    most_pages = max(num_padded, default=0)
    table = np.zeros((len(decodes), most_pages), dtype=np.int64)
    for row, (length, pages) in enumerate(decodes):
        held = -(-length // page_size)
        table[row, :held] = pages[:held]
    sent_positions, sent_slots = (block.put(np.concatenate([np.zeros(0), *each])) for each in (positions, slots))
    sent_rows = block.put([row for (_, num_rows, _), row in zip(spans, row_starts, strict=False) if num_rows == 1])
    sent_lens, sent_table = block.put(lens), block.put(table)

    def rows() -> PagedRows:
        offsets_L = torch.arange(page_size, device=block.device)
        slots_BL = (sent_table.tensor.unsqueeze(-1) * page_size + offsets_L).flatten(1)
        return PagedRows(
            positions_T=sent_positions.tensor,
            slots_T=sent_slots.tensor,
            prefills=tuple(
                PrefillSpan(row_start=first, row_stop=stop, context_len=length, slots_L=part.tensor)
                for (first, stop, length), part in zip(prefills, contexts, strict=True)
            ),
            decode_rows_B=sent_rows.tensor,
            decode_slots_BL=slots_BL,
            decode_lens_B=sent_lens.tensor,
            decode_groups=_padded_groups([pages * page_size for pages in num_padded], decode_group_slots),
            decode_bias_BL=_bias(sent_lens.tensor, slots_BL.shape[1], dtype),
        )

    return rows


def padded_pages(num_pages: int) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16 ... that is at least ``num_pages``: at most a third is padding.

    >>> [padded_pages(n) for n in (1, 5, 6, 25, 563)]
    [1, 6, 6, 32, 768]
    """
    whole = 1 << (num_pages - 1).bit_length()
    return whole // 4 * 3 if whole >= 4 and num_pages <= whole // 4 * 3 else whole


class DecodeRows:
    """The `PagedRows` of up to so many decode rows, in its own memory, which a step writes again where it has changed:
    the tensors of fewer rows are the first rows of the same memory.

    ``most_tokens``: the longest context that a row may have. Of the slots of a row only those of its context are
    written; behind them is what was there before. ``group_slots``: as in `build_paged_rows`.
    """

    def __init__(self, num_rows: int, most_tokens: int, page_size: int, *, group_slots: int = CPU_GROUP_SLOTS) -> None:
        self.num_rows, self.page_size, self._group_slots = num_rows, page_size, group_slots
        self._positions_T = torch.zeros(num_rows, dtype=torch.int64)
        self._slots_T = torch.zeros(num_rows, dtype=torch.int64)
        self._lens_B = torch.zeros(num_rows, dtype=torch.int64)
        self._slots_BL = empty_cache((num_rows, most_tokens), torch.int64, torch.device("cpu"))  # mostly never touched
        self._rows_B = torch.arange(num_rows)
        # A number is written to a numpy view in a twentieth of the time that it takes through torch.
        self._views = tuple(x.numpy() for x in (self._positions_T, self._slots_T, self._lens_B, self._slots_BL))
        self._offsets = np.arange(page_size)
        self._held: list[tuple[int, Sequence[int]]] = [(0, ())] * num_rows  # tokens and pages that a row's slots are of
        self._first: dict[int, tuple[Tensor, ...]] = {}  # the tensors of so many rows

    def set(self, spans: Sequence[tuple[int, int, Sequence[int]]]) -> PagedRows:
        """As `build_paged_rows` of these spans, of one row each; valid until the next call."""
        tensors = self._first.get(len(spans))
        if tensors is None:
            whole = self._positions_T, self._slots_T, self._rows_B, self._slots_BL, self._lens_B
            tensors = self._first[len(spans)] = tuple(x[: len(spans)] for x in whole)
        positions, slots, lens, slots_of = self._views
        size = self.page_size
        for row, (start, num_rows, pages) in enumerate(spans):
            assert num_rows == 1 and start < len(pages) * size, f"{start + 1} tokens do not fit in {len(pages)} pages"
            slot = pages[start // size] * size + start % size
            positions[row], slots[row], lens[row] = start, slot, start + 1
            tokens, held = self._held[row]
            num_held = -(-tokens // size)
            same = tokens <= start and pages[:num_held] == held[:num_held]  # the same request, some tokens later
            known = tokens if same else 0
            if known == start:
                slots_of[row, start] = slot
            else:
                new = np.asarray(pages[known // size : start // size + 1])
                first = known // size * size
                slots_of[row, first : start + 1] = (new[:, None] * size + self._offsets).ravel()[: start + 1 - first]
            self._held[row] = start + 1, pages
        positions_T, slots_T, rows_B, slots_BL, lens_B = tensors
        return PagedRows(
            positions_T=positions_T,
            slots_T=slots_T,
            prefills=(),
            decode_rows_B=rows_B,
            decode_slots_BL=slots_BL,
            decode_lens_B=lens_B,
            decode_groups=_decode_groups([start + 1 for start, _, _ in spans], self._group_slots),
        )


def windowed_rows(rows: PagedRows, window: int, into: PagedRows | None = None) -> PagedRows:
    """``rows`` where each sees only the last ``window`` tokens of its context, itself included. Nothing is written
    elsewhere than before.

    ``into``: an earlier result of as many decode rows, in whose memory theirs are put.
    """
    lens_B, slots_BL = rows.decode_lens_B, rows.decode_slots_BL
    most = min(window, slots_BL.shape[1])
    lens, slots = (None, None) if into is None else (into.decode_lens_B, into.decode_slots_BL)
    at_L = torch.arange(most, device=lens_B.device)
    first_B1 = (lens_B - window).clamp_(min=0).unsqueeze(-1)
    decode_lens_B = torch.clamp(lens_B, max=window, out=lens)
    decode_slots_BL = torch.gather(slots_BL, 1, first_B1 + at_L, out=slots)
    decode_slots_BL.masked_fill_(at_L >= decode_lens_B.unsqueeze(-1), 0)
    bias_BL = rows.decode_bias_BL
    return replace(
        rows,
        decode_bias_BL=None if bias_BL is None else _bias(decode_lens_B, most, bias_BL.dtype),
        prefills=tuple(_windowed_span(span, window) for span in rows.prefills),
        decode_slots_BL=decode_slots_BL,
        decode_lens_B=decode_lens_B,
        decode_groups=tuple(replace(each, max_len=min(each.max_len, window)) for each in rows.decode_groups),
    )


def _windowed_span(span: PrefillSpan, window: int) -> PrefillSpan:
    num_rows = span.row_stop - span.row_start
    unseen = max(0, span.context_len - num_rows + 1 - window)
    context_len = span.context_len - unseen
    return replace(
        span,
        context_len=context_len,
        slots_L=span.slots_L[unseen:],
        window=window if context_len > window else None,
    )


def write_cache(cache_SW: Tensor, rows_TW: Tensor, slots_T: Tensor) -> None:
    """``cache[slots[t]] = rows[t]``, in place.

    Shapes: cache [S, ...], rows [T, ...] of the same trailing dims and dtype, slots [T] int64. Dead rows share slot
    0; which of them stays there is not defined and not read.
    """
    cache_SW.index_copy_(0, slots_T, rows_TW)


def row_contexts(rows: PagedRows) -> Iterator[tuple[int, Tensor]]:
    """Each row with the slots that it sees, its own the last: prefill rows, then decode rows. For twins: it syncs."""
    for span in rows.prefills:
        for row in range(span.row_start, span.row_stop):
            stop = span.context_len - span.row_stop + row + 1
            yield row, span.slots_L[0 if span.window is None else max(0, stop - span.window) : stop]
    lens = zip(rows.decode_rows_B.tolist(), rows.decode_lens_B.tolist(), strict=True)
    for b, (row, length) in enumerate(lens):
        yield row, rows.decode_slots_BL[b, :length]


def _slots(pages: Sequence[int], start: int, stop: int, page_size: int) -> np.ndarray[Any, Any]:
    """The slots of tokens ``start`` .. ``stop`` - 1 of a context in ``pages``."""
    first = start // page_size
    held = np.asarray(pages[first : -(-stop // page_size)], dtype=np.int64)
    return (held[:, None] * page_size + np.arange(page_size)).ravel()[start - first * page_size :][: stop - start]


def _bias(lens_B: Tensor, most: int, dtype: torch.dtype) -> Tensor:
    """[B, most]: 0 for the first ``lens_B[b]`` tokens, -inf behind."""
    behind_BL = torch.arange(most, device=lens_B.device) >= lens_B.unsqueeze(-1)
    return torch.zeros(behind_BL.shape, dtype=dtype, device=lens_B.device).masked_fill_(behind_BL, float("-inf"))


def _padded_groups(padded_B: Sequence[int], group_slots: int) -> tuple[DecodeGroup, ...]:
    """Decode rows in groups of as many as have ``group_slots`` slots when each is as long as the longest."""
    if group_slots == 1:
        return tuple(DecodeGroup(start=row, stop=row + 1, max_len=most) for row, most in enumerate(padded_B))
    num_rows, most = len(padded_B), max(padded_B, default=1)
    size = max(1, group_slots // most)
    return tuple(
        DecodeGroup(start=start, stop=min(start + size, num_rows), max_len=most) for start in range(0, num_rows, size)
    )


def _decode_slots(pages_B: list[Sequence[int]], lens_B: list[int], page_size: int) -> Tensor:
    max_len = max(lens_B, default=0)
    num_pages = -(-max_len // page_size)
    padded_BP = [[*pages[:num_pages], *[0] * (num_pages - len(pages))] for pages in pages_B]
    pages_BP = torch.tensor(padded_BP, dtype=torch.int64).view(len(pages_B), num_pages)
    slots_BL = (pages_BP[:, :, None] * page_size + torch.arange(page_size)).flatten(1)[:, :max_len]
    past_end_BL = torch.arange(max_len) >= torch.tensor(lens_B, dtype=torch.int64)[:, None]
    return slots_BL.masked_fill(past_end_BL, 0)


def _decode_groups(lens_B: list[int], group_slots: int) -> tuple[DecodeGroup, ...]:
    groups: list[DecodeGroup] = []
    start, max_len = 0, 0
    for row, length in enumerate(lens_B):
        if row > start and max(max_len, length) * (row + 1 - start) > group_slots:
            groups.append(DecodeGroup(start=start, stop=row, max_len=max_len))
            start, max_len = row, 0
        max_len = max(max_len, length)
    if lens_B:
        groups.append(DecodeGroup(start=start, stop=len(lens_B), max_len=max_len))
    return tuple(groups)
