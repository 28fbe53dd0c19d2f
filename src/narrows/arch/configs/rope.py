"""Rotary positions in ``config.json``: a schema for each ``rope_type``, wherever its parts stand.

Transformers 5 writes ``rope_parameters`` with ``rope_theta`` in it; 4 wrote ``rope_theta`` beside ``rope_scaling``;
some files mix the two. All of them are read, and where two of them differ the file is refused: which one counts would
depend on the version that reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Annotated, Any

from narrows.arch.configs.foreign import is_foreign
from narrows.arch.configs.needs import (
    ConfigObject,
    Factor,
    Flag,
    Needs,
    NotNegative,
    Positions,
    Share,
    Theta,
    validated,
)
from narrows.arch.configs.shown import shown
from narrows.arch.rope import DynamicRope, LinearRope, Llama3Rope, LongRope, Rope, RopeScaling, YarnRope
from narrows.errors import CheckpointError, ConfigError

__all__ = ["ROPE_FIELDS", "ROPE_TYPES", "Head", "read_rope"]

ROPE_FIELDS = (
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "partial_rotary_factor",
    "original_max_position_embeddings",
)
_DICTIONARIES = ("rope_parameters", "rope_scaling")


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The rotated part of a head: ``head_dim`` columns, in a context of ``max_position_embeddings``.

    ``partial``: the part of the columns that is rotated where the file does not say, None in families that rotate all.
    ``latent``: multi-head latent attention, whose softmax is scaled by ``mscale_all_dim``.
    """

    head_dim: int
    max_position_embeddings: int
    partial: float | None = None
    interleaved: bool = False
    latent: bool = False


class _Scaling(ConfigObject):
    factor: Factor

    def scaling(self, head: Head, columns: int) -> RopeScaling:
        raise NotImplementedError


def _cut(head: Head, columns: int) -> str:
    """How the number of rotated columns comes about, where it is not that of the head."""
    if columns == head.head_dim:
        return ""
    return f", partial_rotary_factor {columns / head.head_dim:g} of a head's {head.head_dim}"


class _Linear(_Scaling):
    def scaling(self, head: Head, columns: int) -> RopeScaling:
        return LinearRope(factor=self.factor)


class _Dynamic(_Scaling):
    def scaling(self, head: Head, columns: int) -> RopeScaling:
        if columns == 2:
            raise CheckpointError(f"rope_type dynamic needs more than 2 rotated columns a head{_cut(head, columns)}")
        return DynamicRope(factor=self.factor)


class _Llama3(_Scaling):
    low_freq_factor: Factor
    high_freq_factor: Factor
    original_max_position_embeddings: Positions

    def scaling(self, head: Head, columns: int) -> RopeScaling:
        if self.high_freq_factor <= self.low_freq_factor:
            raise CheckpointError(
                f"high_freq_factor {self.high_freq_factor:g} of rope_type llama3 must be above its low_freq_factor "
                f"{self.low_freq_factor:g}"
            )
        return Llama3Rope(**dict(self))


class _Yarn(_Scaling):
    factor: Factor | None = None  # type: ignore[assignment]
    original_max_position_embeddings: Positions
    attention_factor: Factor | None = None
    beta_fast: NotNegative | None = None
    beta_slow: NotNegative | None = None
    mscale: NotNegative | None = None
    mscale_all_dim: NotNegative | None = None
    truncate: Flag = True

    def scaling(self, head: Head, columns: int) -> RopeScaling:
        given = dict(self)
        given["factor"] = self.factor or head.max_position_embeddings / self.original_max_position_embeddings
        # `or`: transformers reads 0 as "not given" too.
        return YarnRope(**given | {"beta_fast": self.beta_fast or 32.0, "beta_slow": self.beta_slow or 1.0})


_Factors = Annotated[list[Factor], Needs("a list of numbers above 0")]


class _Long(_Scaling):
    factor: Factor | None = None  # type: ignore[assignment]
    original_max_position_embeddings: Positions
    short_factor: _Factors
    long_factor: _Factors
    attention_factor: Factor | None = None

    def scaling(self, head: Head, columns: int) -> RopeScaling:
        for name in ("short_factor", "long_factor"):
            if (num := len(getattr(self, name))) != columns // 2:
                raise CheckpointError(
                    f"{name} of rope_type longrope has {num} numbers, where {columns // 2} are needed: one for each "
                    f"pair of the {columns} rotated columns{_cut(head, columns)}"
                )
        return LongRope(
            factor=self.factor or head.max_position_embeddings / self.original_max_position_embeddings,
            original_max_position_embeddings=self.original_max_position_embeddings,
            short_factor=tuple(self.short_factor),
            long_factor=tuple(self.long_factor),
            attention_factor=self.attention_factor,
        )


ROPE_TYPES: Mapping[str, type[_Scaling]] = MappingProxyType(
    {"linear": _Linear, "dynamic": _Dynamic, "yarn": _Yarn, "longrope": _Long, "llama3": _Llama3}
)
"""Beside ``default``, the rope types that are read."""


class _Latent(ConfigObject):
    mscale_all_dim: NotNegative | None = None


_NUMBERS = frozenset().union(*(kind.model_fields for kind in ROPE_TYPES.values()))


class _SharedFields(ConfigObject):
    """Fields that may be beside the dictionaries as well as in them."""

    rope_theta: Theta = 10000.0
    partial_rotary_factor: Share | None = None
    original_max_position_embeddings: Positions | None = None


def read_rope(raw: Mapping[str, Any], head: Head) -> tuple[Rope, tuple[str, ...]]:
    """The rotary embedding of ``raw``, and the names of unused fields in its dictionary.

    Raises:
        CheckpointError: invalid or missing numbers, or numbers that differ between two objects.
        ConfigError: an unsupported type of scaling.
    """
    dictionaries = {name: _dictionary(name, raw[name]) for name in _DICTIONARIES if raw.get(name) not in (None, {})}
    objects = {"": raw} | dictionaries
    theta = _shared("rope_theta", objects)
    partial = _shared("partial_rotary_factor", objects)
    original = _shared("original_max_position_embeddings", objects)
    if partial is None:
        partial = 1.0 if "partial_rotary_factor" in raw else head.partial or 1.0
    columns = _rotated_columns(head, partial)
    name, kind, numbers = _one_of({name: _typed(name, each) for name, each in dictionaries.items()})
    numbers |= {"original_max_position_embeddings": original or head.max_position_embeddings}
    scaling, unused = _scaling(name, kind, numbers, head, columns)
    return (
        Rope(
            rope_theta=10000.0 if theta is None else theta,
            partial_rotary_factor=partial,
            interleaved=head.interleaved,
            scaling=scaling,
        ),
        unused,
    )


def _dictionary(name: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{name} is {shown(value)}, where an object or null is needed")
    nested = [key for key, each in value.items() if isinstance(each, Mapping)]
    if nested:
        raise ConfigError(f"{name} differs by kind of layer, {shown(nested)}, which narrows does not compute")
    return value


def _shared(field: str, objects: Mapping[str, Mapping[str, Any]]) -> Any:
    """The value of ``field`` in all objects that have it; None where none does."""
    given: dict[str, Any] = {}
    for name, fields in objects.items():
        if field in fields and (fields[field] is not None or field == "rope_theta"):
            path = f"{name}.{field}".lstrip(".")
            given[path] = getattr(validated(_SharedFields, {field: fields[field]}, name), field)
    if len(set(given.values())) > 1:
        words = " and ".join(f"{path} is {shown(value)}" for path, value in given.items())
        raise CheckpointError(f"{words}: readers disagree on which one counts; leave one of them out")
    return next(iter(given.values()), None)


def _typed(name: str, fields: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The type that a dictionary says, and its numbers."""
    given = {key: fields[key] for key in ("rope_type", "type") if key in fields}
    for key, kind in given.items():
        if not isinstance(kind, str):
            raise CheckpointError(f"{name}.{key} is {shown(kind)}, where a text is needed")
    if len(set(given.values())) > 1:
        raise CheckpointError(f"{name} has rope_type {shown(given['rope_type'])} and type {shown(given['type'])}")
    kind = next(iter(given.values()), "default")
    numbers = {key: each for key, each in fields.items() if key not in (*given, *_SharedFields.model_fields)}
    if kind == "default" and (scaled := sorted(_NUMBERS & numbers.keys())):
        stated = f"says {shown('default')}" if given else "is missing"
        raise CheckpointError(f"{name} has {', '.join(scaled)} while its rope_type {stated}")
    if kind != "default" and kind not in ROPE_TYPES:
        known = ", ".join(("default", *ROPE_TYPES))
        raise ConfigError(f"{name} has rope_type {shown(kind)}, which is not supported; supported are {known}")
    return kind, numbers


def _one_of(typed: dict[str, tuple[str, dict[str, Any]]]) -> tuple[str, str, dict[str, Any]]:
    """The content of all dictionaries: name of one of them, type, numbers."""
    if len(typed) > 1 and len({shown(sorted(each.items())) + kind for kind, each in typed.values()}) > 1:
        raise CheckpointError(f"{' and '.join(typed)} differ; readers disagree on which one counts, so leave one out")
    for name, (kind, numbers) in typed.items():
        return name, kind, dict(numbers)
    return "", "default", {}


def _rotated_columns(head: Head, partial: float) -> int:
    if partial != 1.0 and head.partial is None:
        raise ConfigError(
            f"partial_rotary_factor is {partial:g}; heads of this model_type are rotated whole, only 1 is computed"
        )
    columns = int(head.head_dim * partial)
    if columns < 2 or columns % 2:
        field = "qk_rope_head_dim" if head.latent else "head_dim"
        what = f"{columns} of a head's {head.head_dim} columns" if partial != 1.0 else f"heads of {columns} columns"
        raise CheckpointError(f"{field}: {what} cannot be rotated in pairs; an even number from 2 on is needed")
    return columns


def _scaling(
    name: str, kind: str, numbers: dict[str, Any], head: Head, columns: int
) -> tuple[RopeScaling | None, tuple[str, ...]]:
    """The scaling, and the names of the numbers that it does not use."""
    fields = ROPE_TYPES[kind].model_fields if kind in ROPE_TYPES else {}
    unused = {key: each for key, each in numbers.items() if key not in fields and key not in _SharedFields.model_fields}
    scaling = None
    if kind in ROPE_TYPES:
        read = {key: each for key, each in numbers.items() if key in fields}
        scaling = validated(ROPE_TYPES[kind], read, name).scaling(head, columns)
        if head.latent and "mscale_all_dim" in unused:
            latent = validated(_Latent, {"mscale_all_dim": unused.pop("mscale_all_dim")}, name)
            scaling = replace(scaling, mscale_all_dim=latent.mscale_all_dim)
    return scaling, tuple(f"{name}.{key}" for key in sorted(unused) if not is_foreign(key, unused[key], name))
