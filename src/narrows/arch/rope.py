"""Rotary positions of a checkpoint: typed values, checked when the config is read (``configs/rope.py``).

Field names are those of ``rope_parameters`` in ``config.json``. ``original_max_position_embeddings`` and ``factor`` are
filled in where the file omits them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

__all__ = ["DynamicRope", "LinearRope", "Llama3Rope", "LongRope", "Rope", "RopeScaling", "YarnRope"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """``factor``: how many times longer the context is made.

    ``mscale_all_dim`` also scales the softmax of multi-head latent attention, whatever the type (transformers'
    ``yarn_apply_mscale``); None elsewhere.
    """

    rope_type: ClassVar[str]
    factor: float
    mscale_all_dim: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearRope(RopeScaling):
    """Every frequency divided by ``factor``."""

    rope_type: ClassVar[str] = "linear"


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicRope(RopeScaling):
    """The base grows with the length of the sequence beyond ``max_position_embeddings`` (NTK by length)."""

    rope_type: ClassVar[str] = "dynamic"


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnRope(RopeScaling):
    """YaRN (Peng et al., 2023). ``attention_factor`` None: derived from ``factor`` and the two ``mscale``."""

    rope_type: ClassVar[str] = "yarn"
    original_max_position_embeddings: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    truncate: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class LongRope(RopeScaling):
    """LongRoPE: every frequency divided by its own factor, of ``long_factor`` for sequences longer than
    ``original_max_position_embeddings``, else of ``short_factor``."""

    rope_type: ClassVar[str] = "longrope"
    original_max_position_embeddings: int
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    attention_factor: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Rope(RopeScaling):
    """Llama 3.1: low frequencies divided by ``factor``, high ones kept, between them blended."""

    rope_type: ClassVar[str] = "llama3"
    original_max_position_embeddings: int
    low_freq_factor: float
    high_freq_factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """The rotary embedding of a model.

    ``partial_rotary_factor``: which part of a head's columns is rotated, from the first on. ``interleaved``: pairs are
    neighbours (0, 1), (2, 3), ... as the projections leave them, not (i, i + half). ``scaling`` None: plain positions.
    """

    rope_theta: float = 10000.0
    partial_rotary_factor: float = 1.0
    interleaved: bool = False
    scaling: RopeScaling | None = None

    def as_mapping(self) -> Mapping[str, Any] | None:
        """``scaling`` as the dictionary of ``config.json``."""
        return None if self.scaling is None else {"rope_type": self.scaling.rope_type} | asdict(self.scaling)
