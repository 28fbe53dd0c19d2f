"""The document that a profile is: which fields there are, and what may stand in them (docs/profiles.md).

Knows the format alone; what the fields mean for prices is `profile.py`'s. An unknown field is an error, since a
misspelt one would leave a price to the roofline without a word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)

from narrows.arch.stages import AttentionCore, Gemm, GroupedGemm, Norm, PriceClass, Stream, Work
from narrows.cost.collectives import COLLECTIVES
from narrows.cost.devices import DEVICES, DTYPES
from narrows.cost.here import Setting
from narrows.cost.measured import AXES, REDUCE_NORM
from narrows.errors import ConfigError

__all__ = ["MEASURED_OPS", "VERSION", "WORKS", "DeviceFigures", "ProfileDocument", "StageTable", "parse"]

VERSION = 1
MEASURED_OPS = (*COLLECTIVES, "column_gather", REDUCE_NORM)
WORKS: Mapping[str, type[Work]] = {
    "gemm": Gemm,
    "grouped_gemm": GroupedGemm,
    "norm": Norm,
    "stream": Stream,
    "attention": AttentionCore,
}

_Rate = Annotated[float, Field(gt=0)]
_Share = Annotated[float, Field(gt=0, le=1)]
_Seconds = Annotated[float, Field(ge=0)]
_Phase = Literal["decode", "prefill"]
_StageRow = Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=2, max_length=4)]
"""[rows, us, spread, attended tokens]; the last two may be left out."""
_SizeRow = Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=2, max_length=3)]
"""[size, us, spread]; the last may be left out."""
_SizeRows = Annotated[list[_SizeRow], Field(min_length=2)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)

    @field_validator("points", "copies", check_fields=False)
    @classmethod
    def _real_points(cls, rows: list[list[float]]) -> list[list[float]]:
        seen: set[tuple[float, ...]] = set()
        for row in rows:
            if not (row[0] and row[1]):
                raise ValueError(f"the point {row} has a size or a time of 0")
            at = (row[0], *row[3:])
            if at in seen:
                raise ValueError(f"there are two points at {' and '.join(f'{x:g}' for x in at)}")
            seen.add(at)
        return rows


_UNSAID: Any = None


class DeviceFigures(_Part):
    """Figures of a :class:`~narrows.cost.devices.Device`; what is left out is that of ``like``."""

    like: Literal[tuple(DEVICES)] = "cpu-core"  # type: ignore[valid-type]
    tflops_bf16: _Rate = _UNSAID
    tflops_fp8: _Rate | None = _UNSAID
    tflops_int8: _Rate | None = _UNSAID
    tflops_fp32: _Rate = _UNSAID
    hbm_bytes_per_s: _Rate = _UNSAID
    memory_bytes: _Rate = _UNSAID
    link_bytes_per_s: _Rate = _UNSAID
    num_links: Annotated[int, Field(ge=1)] = _UNSAID
    is_cpu: bool = _UNSAID
    shared_memory: bool = _UNSAID
    fused_norm_bytes: Annotated[int, Field(ge=0)] = _UNSAID
    link_latency_s: _Seconds = _UNSAID
    gemm_efficiency: _Share = _UNSAID
    gemm_memory_efficiency: _Share = _UNSAID
    norm_plain_efficiency: _Share = _UNSAID
    norm_fused_efficiency: _Share = _UNSAID
    stream_efficiency: _Share = _UNSAID
    attention_efficiency: _Share = _UNSAID
    launch_s: _Seconds = _UNSAID
    gemm_launch_s: _Seconds = _UNSAID

    def given(self) -> dict[str, Any]:
        """The figures that are said. Of fp8 and int8 it may be said that the device has no such rate."""
        return {
            name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set - {"like"}
        }


def _item(name: str, kind: type[Work]) -> Any:
    """The document of one item of work: the fields of its class, and ``kind``."""
    hints = get_type_hints(kind)
    given: dict[str, Any] = {"kind": (Literal[name], ...)}
    for each in fields(kind):
        is_size = hints[each.name] in (int, float)
        hint = Annotated[hints[each.name], Field(ge=0)] if is_size else hints[each.name]
        given[each.name] = (hint, ... if each.default is MISSING else each.default)
    return create_model(name, __base__=_Part, **given)


_Work: Any = Annotated[
    _item("gemm", Gemm)
    | _item("grouped_gemm", GroupedGemm)
    | _item("norm", Norm)
    | _item("stream", Stream)
    | _item("attention", AttentionCore),
    Field(discriminator="kind"),
]


class StageTable(_Part):
    """Microseconds of one stage over rows."""

    stage: PriceClass
    dtype: Literal[DTYPES]  # type: ignore[valid-type]
    phase: _Phase | None = None
    work: Annotated[list[_Work], Field(min_length=1)]
    points: Annotated[list[_StageRow], Field(min_length=1)]

    def works(self) -> tuple[Work, ...]:
        """The work as the chain of a model states it."""
        return tuple(WORKS[item.kind](**item.model_dump(exclude={"kind"})) for item in self.work)


class CollectiveTable(_Part):
    """Microseconds of one collective over bytes."""

    op: Literal[MEASURED_OPS]  # type: ignore[valid-type]
    ranks: Annotated[int, Field(ge=2)]
    axis: Literal[AXES] = AXES[0]  # type: ignore[valid-type]
    phase: _Phase | None = None
    points: _SizeRows


class StepTable(_Part):
    """Microseconds of a step beside its walk, over rows."""

    phase: _Phase
    points: _SizeRows


class ProfileDocument(_Part):
    """All of a profile."""

    narrows_profile: Literal[1]
    name: str | None = None
    title: str | None = None
    fits: Setting = Setting()
    made: dict[str, JsonValue] = {}
    device: DeviceFigures = DeviceFigures()
    stages: list[StageTable] = []
    collectives: list[CollectiveTable] = []
    copies: list[_SizeRow] = []
    steps: list[StepTable] = []

    @model_validator(mode="after")
    def _each_once(self) -> ProfileDocument:
        if len(self.copies) == 1:
            raise ValueError("copies: two points or more are needed")
        keys: list[tuple[str, object]] = [(f"the stage {s.stage}", (s.dtype, s.phase, s.works())) for s in self.stages]
        keys += [(f"the collective {c.op}", (c.ranks, c.axis, c.phase)) for c in self.collectives]
        keys += [("steps", s.phase) for s in self.steps]
        seen: set[tuple[str, object]] = set()
        for key in keys:
            if key in seen:
                raise ValueError(f"{key[0]} has two tables of the same")
            seen.add(key)
        return self


def parse(text: str) -> ProfileDocument:
    """The document in ``text``, which is JSON.

    Raises:
        ConfigError: there is something else in it than the format allows; the first such thing, where it stands.
    """
    try:
        return ProfileDocument.model_validate_json(text)
    except ValidationError as error:
        raise ConfigError(_first(error.errors())) from None


def _first(errors: Sequence[Any]) -> str:
    error = errors[0]
    where = ".".join(str(part) for part in error["loc"] if part not in WORKS)
    what = {
        "extra_forbidden": "there is no such field",
        "unexpected_keyword_argument": "there is no such field",
        "missing": "it is missing",
    }.get(error["type"])
    if what is None:
        what = error["msg"].removeprefix("Value error, ")
        if not isinstance(error["input"], dict | list | BaseModel):
            what += f", not {error['input']!r}"
    return f"{where}: {what[0].lower()}{what[1:]}" if where else what
