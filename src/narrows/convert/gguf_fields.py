"""Reads the metadata of one architecture, ``<architecture>.<field>``, with bounds: every error names the key."""

from __future__ import annotations

import struct

from narrows.convert.gguf_header import GgufHeader
from narrows.errors import CheckpointError, ConfigError

__all__ = ["Fields", "shortest"]

MAX_COUNT = 1 << 31
"""More rows, columns, heads or positions than any model has."""


class Fields:
    """The fields of ``file`` under its architecture's name, ``arch``."""

    def __init__(self, file: GgufHeader) -> None:
        self.file = file
        self.arch: str = file.need("general.architecture", str)

    def key(self, field: str) -> str:
        """The field's whole key."""
        return f"{self.arch}.{field}"

    def has(self, field: str) -> bool:
        """Whether the file gives the field."""
        return self.key(field) in self.file.metadata

    def integer(self, field: str, default: int | None = None, *, least: int = 0) -> int:
        """A whole number of at least ``least``. Some fields may differ by layer (a list); here all are to be equal."""
        key = self.key(field)
        value = self.file.get(key, object, default)
        if isinstance(value, list) and value and all(type(v) is int for v in value):
            if len(set(value)) > 1:
                raise ConfigError(
                    f"{self.file.path}: {key} differs by layer ({str(value)[:60]}); supported: one number for all"
                )
            value = value[0]
        elif value is None:
            value = self.file.need(key, int)
        elif value is not default:
            value = self.file.get(key, int)
        if not least <= value < MAX_COUNT:
            raise CheckpointError(f"{self.file.path}: {key} is {value}; it must be at least {least} and below 2^31")
        return int(value)

    def count(self, field: str, default: int | None = None) -> int:
        """A whole number of at least 1."""
        return self.integer(field, default, least=1)

    def number(self, field: str, default: float | None = None) -> float:
        """A finite number, in the shortest decimal that is its float32."""
        key = self.key(field)
        value: float = self.file.need(key, float) if default is None else self.file.get(key, float, default)
        return shortest(value)

    def positive(self, field: str, default: float | None = None) -> float:
        """A number above 0."""
        value = self.number(field, default)
        if value <= 0:
            raise CheckpointError(f"{self.file.path}: {self.key(field)} is {value:g}; it must be above 0")
        return value

    def flag(self, field: str) -> bool:
        """True or false; false if absent."""
        return bool(self.file.get(self.key(field), bool, False))

    def refuse(self, field: str, why: str) -> ConfigError:
        """The error of a field whose value narrows cannot obey."""
        value = self.file.get(self.key(field), object)
        return ConfigError(f"{self.file.path}: {self.key(field)} is {value!r:.60}; {why}")


def shortest(value: float) -> float:
    """The shortest decimal that is this float32: 1e-05, not 9.999999747378752e-06."""
    try:
        single = struct.pack("<f", value)
    except OverflowError:  # a float64 beyond float32
        return float(value)
    found = (float(f"{value:.{digits}g}") for digits in range(1, 18))
    return next(short for short in found if abs(short) < 3.4e38 and struct.pack("<f", short) == single)
