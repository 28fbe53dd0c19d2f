"""Row encodings: how the rows of a field travel through a gather.

An encoded row is its values as one byte each and one float32 scale: int8 with scale = largest magnitude / 127, or fp8
(e4m3) with scale = largest magnitude / 448. `ops/encode_rows.py` makes and reads them.

>>> Encoding.INT8.row_bytes(7168, 2), Encoding.PLAIN.row_bytes(7168, 2)
(7172, 14336)
"""

from __future__ import annotations

from enum import StrEnum

__all__ = ["Encoding"]

_SCALE_BYTES = 4


class Encoding(StrEnum):
    """What a row is while it travels."""

    PLAIN = "plain"
    INT8 = "int8"
    FP8 = "fp8"

    def row_bytes(self, width: int, itemsize: int) -> int:
        """Bytes of a row of ``width`` values that are ``itemsize`` bytes each where they are not encoded."""
        return width * itemsize if self is Encoding.PLAIN else width + _SCALE_BYTES
