"""Formats in which checkpoints store weights in blocks of 4 to 8 bits, and what of a model is stored in them.

A block is so many neighbouring inputs of one output: their codes, and scales that only they have. GGUF's are known here
(ggml's ``block_q4_K`` and so on); how their bytes make numbers is `ops/blocks.py`'s and the kernels' affair.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import lcm
from types import MappingProxyType

__all__ = ["BLOCK_FORMATS", "NO_BLOCKS", "BlockFormat", "StoredBlocks", "block_format"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockFormat:
    """One way to store a block.

    ``encoding``: ggml's number of it. ``columns``: inputs of a block. ``nbytes``: of a block. ``parts``: (first byte,
    bytes, bytes that stay together) of what a block is made of, in the order in which panels hold them; they are all of
    the block.
    """

    name: str
    encoding: int
    columns: int
    nbytes: int
    parts: tuple[tuple[int, int, int], ...]

    def __str__(self) -> str:
        return self.name

    def row_bytes(self, columns: int) -> int:
        """Of one output with so many inputs, which are whole blocks.

        >>> block_format(12).row_bytes(2048)
        1152
        """
        assert columns % self.columns == 0, f"{columns} columns in {self.name} blocks of {self.columns}"
        return columns // self.columns * self.nbytes


BLOCK_FORMATS = (
    BlockFormat(name="Q4_0", encoding=2, columns=32, nbytes=18, parts=((0, 2, 2), (2, 16, 4))),
    BlockFormat(name="Q8_0", encoding=8, columns=32, nbytes=34, parts=((0, 2, 2), (2, 32, 4))),
    BlockFormat(
        name="Q4_K", encoding=12, columns=256, nbytes=144, parts=((0, 2, 2), (2, 2, 2), (4, 12, 4), (16, 128, 4))
    ),
    BlockFormat(
        name="Q5_K",
        encoding=13,
        columns=256,
        nbytes=176,
        parts=((0, 2, 2), (2, 2, 2), (4, 12, 4), (16, 32, 4), (48, 128, 4)),
    ),
    BlockFormat(
        name="Q6_K",
        encoding=14,
        columns=256,
        nbytes=210,
        parts=((208, 2, 2), (192, 16, 4), (0, 128, 4), (128, 64, 4)),
    ),
)
"""Those that kernels multiply, in the order of ``Kind`` of csrc/kernels.h."""

_BY_ENCODING = MappingProxyType({known.encoding: known for known in BLOCK_FORMATS})


def block_format(encoding: int) -> BlockFormat | None:
    """The format with ggml's number ``encoding``; None: kernels do not multiply it."""
    return _BY_ENCODING.get(encoding)


@dataclass(frozen=True, slots=True)
class StoredBlocks:
    """The format of each of a checkpoint's weights that is in blocks, by the name that models use (`Weight.name`)."""

    formats: tuple[tuple[str, BlockFormat], ...] = ()
    _by_name: Mapping[str, BlockFormat] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_name", dict(self.formats))

    @classmethod
    def of(cls, formats: Iterable[tuple[str, BlockFormat]]) -> StoredBlocks:
        return cls(tuple(sorted(formats, key=lambda each: each[0])))

    def __bool__(self) -> bool:
        return bool(self.formats)

    def of_name(self, name: str) -> BlockFormat | None:
        """How the weight is stored; None: not in blocks."""
        return self._by_name.get(name)

    def columns_together(self, ending: str) -> int:
        """Inputs that no split may part, of all weights whose names end so; 1 where none is in blocks."""
        return lcm(*(known.columns for name, known in self.formats if name.endswith(ending)))


NO_BLOCKS = StoredBlocks()
"""Of a checkpoint with plain weights, or one whose weights are not held as they are stored."""
