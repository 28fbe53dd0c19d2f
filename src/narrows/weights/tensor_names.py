"""Under which name, and in which part of it, a checkpoint stores a tensor of the model.

Models use the names of a causal language model (``model.layers.0...``, ``lm_head.weight``), an expert at a time.
Checkpoints also come

    without model.      saved from transformers' AutoModel; or with another prefix, if one alone can be meant
    with one of a tied  either lm_head.weight or the embedding
      pair
    with experts        as transformers 5 holds them: experts.gate_up_proj [E, 2F, H], a gate's rows before its up's,
      stacked           and experts.down_proj [E, H, F]
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from narrows.arch.weights import Weight
from narrows.errors import CheckpointError

__all__ = ["Stored", "TensorNames", "is_vocabulary"]

_BODY, _HEAD = "model.", "lm_head.weight"
_ANCHOR = re.compile(r"(?P<prefix>|.*\.)layers\.0\.input_layernorm\.weight")
_EXPERT = re.compile(r"(?P<experts>.*\.experts)\.\{expert\}\.(?P<part>gate|up|down)_proj\.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A matrix or vector within a stored tensor.

    ``shape``: that of the whole tensor ``name``. ``expert``: its index in the first dimension of a stack.
    ``first_row``: where its rows begin there.
    """

    name: str
    shape: tuple[int, ...]
    expert: int | None = None
    first_row: int = 0


def is_vocabulary(weight: Weight) -> bool:
    """Whether it has a row per token, and checkpoints may hold more rows (padding) than there are tokens."""
    return weight.name in (f"{_BODY}embed_tokens.weight", _HEAD)


class TensorNames:
    """The names of the tensors that a checkpoint holds.

    Raises:
        CheckpointError: two models are in it, and neither has the usual names.
    """

    def __init__(self, names: Collection[str], where: str) -> None:
        self._names, self._where = names, where
        bodies = sorted({found["prefix"] for found in map(_ANCHOR.fullmatch, names) if found})
        if len(bodies) > 1 and _BODY not in bodies:
            found = " and ".join(f"{body}layers.0" for body in bodies)
            raise CheckpointError(f"{where}: holds the layers of {len(bodies)} models, {found}; keep one")
        self.body = _BODY if _BODY in bodies or not bodies else bodies[0]
        """The prefix of the layers, ``model.`` as a rule."""

    def find(self, weight: Weight, expert: int | None) -> Stored | None:
        """Where the weight is; None if it is missing.

        Raises:
            CheckpointError: experts are stored both one by one and stacked.
        """
        for pattern in weight.stored_as or (weight.name,):
            name = pattern if expert is None else pattern.replace("{expert}", str(expert))
            one = self._here(name)
            stack = self._stack(pattern, weight, expert) if expert is not None else None
            if one is not None and stack is not None:
                raise CheckpointError(
                    f"{self._where}: holds {one} and the stack {stack.name}: which of the two counts is not known; "
                    "take one of them out"
                )
            if one is not None:
                return Stored(name=one, shape=weight.shape)
            if stack is not None:
                return stack
        return None

    def local(self, full_name: str) -> str:
        """The name that a tensor would have here, going by its neighbours."""
        return self.body + full_name.removeprefix(_BODY) if full_name.startswith(_BODY) else full_name

    def _here(self, full_name: str) -> str | None:
        name = self.local(full_name)
        if full_name == _HEAD:
            outer = self.body.removesuffix(_BODY) + _HEAD
            others = [each for each in self._names if each.endswith("." + _HEAD)]
            name = next((each for each in (outer, _HEAD) if each in self._names), others[0] if len(others) == 1 else "")
        return name if name in self._names else None

    def _stack(self, full_name: str, weight: Weight, expert: int) -> Stored | None:
        found = _EXPERT.fullmatch(full_name)
        if found is None:
            return None
        fused = "down_proj" if found["part"] == "down" else "gate_up_proj"
        name = self._here(f"{found['experts']}.{fused}")
        if name is None:
            return None
        num_experts, (rows, columns) = max(stop for _, stop in weight.experts), weight.shape
        whole = rows if fused == "down_proj" else 2 * rows
        first = rows if found["part"] == "up" else 0
        return Stored(name=name, shape=(num_experts, whole, columns), expert=expert, first_row=first)
