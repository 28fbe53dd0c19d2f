"""``generation_config.json``: the ids that end a text, and recommended sampling parameters.

A field that the checkpoint leaves out is None, and the caller decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from narrows.errors import CheckpointError
from narrows.files import file_in, read_json_object

__all__ = ["GenerationConfig", "parse_generation_config", "read_generation_config"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationConfig:
    """Field names and meanings are transformers'.

    ``eos_token_id``: any of them ends a text. ``do_sample``: False means the best token regardless of the others, and
    so does None in transformers (its default), though other engines sample where a temperature is given.
    ``temperature`` 0: the best token. ``top_k`` 0: no limit. ``repetition_penalty`` 1: none.
    """

    eos_token_id: tuple[int, ...] = ()
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def sampling(self, *, samples_by_default: bool) -> dict[str, float | int]:
        """Its settings as fields of :class:`~narrows.sched.sampling.SamplingParams`.

        ``samples_by_default``: the meaning of a missing ``do_sample``: the best token in transformers (False),
        temperature 1 in OpenAI's API (True). A ``do_sample`` in the checkpoint decides.

        >>> config = GenerationConfig(top_p=0.9, repetition_penalty=1.1)
        >>> config.sampling(samples_by_default=False)
        {'repetition_penalty': 1.1}
        >>> config.sampling(samples_by_default=True)
        {'temperature': 1.0, 'top_p': 0.9, 'repetition_penalty': 1.1}
        """
        samples = samples_by_default if self.do_sample is None else self.do_sample
        temperature = 1.0 if self.temperature is None else self.temperature
        drawn = {"temperature": temperature, "top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}
        values = (drawn if samples else {}) | {"repetition_penalty": self.repetition_penalty}
        return {name: value for name, value in values.items() if value is not None}


def read_generation_config(folder: Path) -> GenerationConfig:
    """Of a Hugging Face folder: ``generation_config.json``, and the ends of text that ``config.json`` adds.

    Raises:
        CheckpointError: one of them is not JSON, or a value is invalid; the message names it.
    """
    path = folder / "generation_config.json"
    raw, config = (read_json_object(file_in(folder, name)) for name in (path.name, "config.json"))
    if config.get("eos_token_id") is None and isinstance(config.get("text_config"), dict):
        config = config["text_config"]
    more = _ids(folder / "config.json", config.get("eos_token_id"))
    return parse_generation_config(raw, str(path), more_eos=more)


def parse_generation_config(raw: Mapping[str, Any], where: str, *, more_eos: tuple[int, ...] = ()) -> GenerationConfig:
    """Of the parsed content of ``generation_config.json``; ``where`` it is from, for errors."""
    eos = (*_ids(where, raw.get("eos_token_id")), *more_eos)
    do_sample = raw.get("do_sample")
    if not isinstance(do_sample, bool | None):
        raise CheckpointError(f"{where}: do_sample is {do_sample!r}; it must be true or false")
    top_k = raw.get("top_k")
    if top_k is not None and (type(top_k) is not int or top_k < -1):
        raise CheckpointError(f"{where}: top_k is {top_k!r}; it must be a whole number, 0 or -1 for no limit")
    return GenerationConfig(
        eos_token_id=tuple(dict.fromkeys(eos)),
        do_sample=do_sample,
        temperature=_number(where, raw, "temperature", "0 or more", lambda x: x >= 0),
        top_k=None if top_k is None else max(top_k, 0),
        top_p=_number(where, raw, "top_p", "more than 0 and at most 1", lambda x: 0 < x <= 1),
        min_p=_number(where, raw, "min_p", "between 0 and 1", lambda x: 0 <= x <= 1),
        repetition_penalty=_number(where, raw, "repetition_penalty", "more than 0", lambda x: x > 0),
    )


def _ids(where: Path | str, ids: Any) -> tuple[int, ...]:
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if any(type(i) is not int or i < 0 for i in ids):
        raise CheckpointError(f"{where}: eos_token_id is {ids}; it must be a token id or a list of them")
    return tuple(ids)


def _number(
    where: str, raw: Mapping[str, Any], field: str, allowed: str, is_allowed: Callable[[float], bool]
) -> float | None:
    value = raw.get(field)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise CheckpointError(f"{where}: {field} is {value!r}; it must be a number, {allowed}")
    if not is_allowed(value):
        raise CheckpointError(f"{where}: {field} is {value!r}; it must be {allowed}")
    return float(value)
