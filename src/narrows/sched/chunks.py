"""Cuts the next chunk of a request: how many of its rows go into a step, and what the ranks need to know about them.

The counters of the request change as its rows are scheduled.
"""

from __future__ import annotations

from narrows.sched.batch import Chunk, sample_ref
from narrows.sched.limits import Limits
from narrows.sched.pages import num_pages_for
from narrows.sched.request import Request

__all__ = ["next_chunk", "next_rows"]


def next_rows(request: Request, room: int, limits: Limits, begun: int = 0) -> int:
    """Rows of its next chunk, behind ``begun`` more rows, in a step that has room for so many; 0: none now."""
    if not limits.prefill_chunk:
        return min(request.rows_left - begun, room)
    at = request.num_cached + begun
    left = len(request.prompt) - at
    # Behind the prompt each row runs alone, as it did when it was new.
    rows = min(left, limits.prefill_chunk - at % limits.prefill_chunk) if left > 0 else 1
    return rows if rows <= room else 0


def next_chunk(request: Request, rows: int, limits: Limits) -> Chunk:
    """Its next rows, scheduled from now on. ``num_sampled`` is left to the caller, which knows the sample's slot."""
    start = request.num_cached
    stop = start + rows
    tokens = request.tokens(start, stop)
    if len(tokens) < rows:  # the newest is still on the ranks
        tokens += (sample_ref(request.last_slot),)
    is_sampled = stop == request.num_tokens
    targets: tuple[int, ...] = ()
    if request.scores_prompt:
        targets = request.prompt[max(start, request.num_scored) + 1 : stop + 1]
        request.num_scored = max(request.num_scored, min(stop, len(request.prompt) - 1))
    allowed, banned = _constraints(request) if is_sampled else (b"", ())
    penalizes = request.sampling is not None and request.sampling.penalizes
    chunk = Chunk(
        request=request.id,
        start=start,
        tokens=tokens,
        pages=tuple(request.pages[: num_pages_for(stop, limits.page_size)]),
        num_logits=len(targets) + is_sampled,
        sampling=request.sampling,
        num_prompt=len(request.prompt),
        targets=targets,
        skipped=request.tokens(request.num_fed, start) if penalizes else (),
        allowed=allowed,
        banned=banned,
    )
    request.num_cached = stop
    request.num_fed = max(request.num_fed, stop)
    return chunk


def _constraints(request: Request) -> tuple[bytes, tuple[int, ...]]:
    """The mask of allowed tokens (empty: all), and the end ids that come too early."""
    allowed = request.guide.allowed() if request.guide is not None else b""
    least = request.sampling.min_tokens if request.sampling is not None else 0
    banned = tuple(sorted(request.eos_ids)) if request.num_sampled < least else ()
    if allowed and banned and not _any_left(allowed, banned):
        banned = ()  # the constraint leaves nothing but the end
    return allowed, banned


def _any_left(allowed: bytes, banned: tuple[int, ...]) -> bool:
    mask = bytearray(allowed)
    for token in banned:
        if token // 8 < len(mask):
            mask[token // 8] &= ~(1 << token % 8) & 0xFF
    return any(mask)
