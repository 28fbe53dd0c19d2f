"""Types of config fields with their bounds, and the words for a value outside them.

Bounds are far above any published model (126 layers, 128 heads, 384 experts, 262144 tokens). The planner walks layers
and experts, so ten million of them, a slip or an attack, would take minutes without a message.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from narrows.arch.configs.shown import shown
from narrows.errors import CheckpointError

__all__ = [
    "ConfigObject",
    "Epsilon",
    "ExpertCount",
    "Experts",
    "Factor",
    "Flag",
    "Heads",
    "Layer",
    "LayerCount",
    "Layers",
    "NotNegative",
    "Positions",
    "Share",
    "Text",
    "Theta",
    "TokenId",
    "Vocabulary",
    "Width",
    "validated",
]


@dataclass(frozen=True, slots=True)
class Needs:
    """The valid values of a field, in words that continue "where ... is needed"."""

    words: str


Width = Annotated[int, Field(ge=1, le=1 << 20), Needs("a whole number from 1 to 1048576")]
Layers = Annotated[int, Field(ge=1, le=1024), Needs("a whole number from 1 to 1024")]
LayerCount = Annotated[int, Field(ge=0, le=1024), Needs("a whole number from 0 to 1024")]
Layer = Annotated[int, Field(ge=0, le=1023), Needs("a layer's index, from 0")]
Heads = Annotated[int, Field(ge=1, le=8192), Needs("a whole number from 1 to 8192")]
Experts = Annotated[int, Field(ge=1, le=8192), Needs("a whole number from 1 to 8192")]
ExpertCount = Annotated[int, Field(ge=0, le=8192), Needs("a whole number from 0 to 8192")]
Vocabulary = Annotated[int, Field(ge=1, le=1 << 24), Needs("a whole number from 1 to 16777216")]
Positions = Annotated[int, Field(ge=1, le=(1 << 31) - 1), Needs("a whole number from 1 to 2147483647")]
TokenId = Annotated[int, Field(ge=0, le=(1 << 31) - 1), Needs("a token id, a whole number from 0")]
Epsilon = Annotated[float, Field(ge=0, le=1e6), Needs("a number from 0")]
Theta = Annotated[float, Field(gt=1, le=1e30), Needs("a number above 1")]
Factor = Annotated[float, Field(gt=0, le=1e6), Needs("a number above 0, at most 1000000")]
NotNegative = Annotated[float, Field(ge=0, le=1e6), Needs("a number from 0 to 1000000")]
Share = Annotated[float, Field(gt=0, le=1), Needs("a number above 0, at most 1")]
Flag = Annotated[bool, Needs("true or false")]
Text = Annotated[str, Needs("a text")]


class ConfigObject(BaseModel):
    """A JSON object of a config: no value is turned into another type, and no number is NaN or infinite."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True, defer_build=True)


def needed(field: FieldInfo) -> str:
    """The valid values of ``field``, in words."""
    words = [each.words for each in field.metadata if isinstance(each, Needs)]
    for option in get_args(field.annotation):
        words += ["null"] if option is type(None) else [n.words for n in get_args(option) if isinstance(n, Needs)]
    return ", or ".join(words)


P = TypeVar("P", bound=ConfigObject)


def validated(kind: type[P], raw: dict[str, Any], within: str = "") -> P:
    """``raw`` as a ``kind``; ``within``: the field whose value ``raw`` is.

    Raises:
        CheckpointError: a field is missing or has an invalid value; the first such field.
    """
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        name = str(first["loc"][0])
        where = f"{within}.{name}" if within else name
        if first["type"] == "missing":
            raise CheckpointError(f"the field {where!r} is missing") from None
        field = kind.model_fields[name]
        raise CheckpointError(f"{where} is {shown(raw[name])}, where {needed(field)} is needed") from None
