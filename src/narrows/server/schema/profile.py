"""The body of ``/start_profile`` and the answers of both routes. Knows shapes only."""

from __future__ import annotations

from pydantic import BaseModel, Field

from narrows.server.schema.common import Body

__all__ = ["StartProfileRequest", "TraceStarted", "TraceWritten"]


class StartProfileRequest(Body):
    """How many steps the trace may hold; ``num_steps`` is SGLang's name. Absent: what ``--trace-steps`` says."""

    steps: int | None = Field(default=None, ge=1, le=100_000)
    num_steps: int | None = Field(default=None, ge=1, le=100_000)


class TraceStarted(BaseModel):
    """Where the trace will be, and how many steps it may hold."""

    file: str
    steps: int


class TraceWritten(BaseModel):
    """What was written."""

    file: str
    steps: int
    events: int
