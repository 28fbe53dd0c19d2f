"""Fields of a request to prompts, limits, sampling and options of the answer."""

from __future__ import annotations

import random
import time
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from narrows.api import Generation
from narrows.errors import ConfigError
from narrows.sched.guide import Guide
from narrows.sched.sampling import SamplingParams
from narrows.server.http.errors import ApiError, backend_error, invalid
from narrows.server.options import ServedModel, ServerOptions
from narrows.server.parsers.formats import CLOSE, OPEN, REASONING_PARSERS, TOOL_PARSERS, reasoning_parser, tool_format
from narrows.server.schema.common import GenerationFields
from narrows.server.structured_output.constraints import Constraint
from narrows.text import Tokenizer

__all__ = [
    "AllowedTokens",
    "AnswerOptions",
    "ParsedRequest",
    "RequestReader",
    "new_id",
    "now",
    "sampling_of_choice",
    "truncated",
]

_NUMBERS = random.Random()
"""Seeded once by the system: asking it for each answer gives up the interpreter's lock."""
_MASK63 = 2**63 - 1


class RequestReader:
    """Reads requests: a model with its tokenizer and defaults, and the server's options.

    Raises:
        ConfigError: a parser that is not known, or one for a model without a tokenizer.
    """

    def __init__(self, model: ServedModel, options: ServerOptions) -> None:
        for flag, name, known in (
            ("--tool-call-parser", options.tool_call_parser, TOOL_PARSERS),
            ("--reasoning-parser", options.reasoning_parser, REASONING_PARSERS),
        ):
            if name not in known:
                raise ConfigError(f"{flag} {name!r} is not known; there are: {', '.join(known)}")
            if name not in ("auto", "none") and model.tokenizer is None:
                raise ConfigError(f"{flag} {name} reads text, but {model.names[0]} has no tokenizer.json")
        self.model = model
        self.options = options
        template = model.tokenizer.chat_template_source if model.tokenizer is not None else ""
        self.tools = tool_format(options.tool_call_parser, template)
        self.reasons = reasoning_parser(options.reasoning_parser, template) != "none"
        self.defaults: Mapping[str, float | int] = model.generation.sampling(samples_by_default=True)
        self.spelled_out = self._spelled_out()

    def _spelled_out(self) -> frozenset[int]:
        """Special tokens that the parsers have to see in the text."""
        tokenizer = self.model.tokenizer
        if tokenizer is None:
            return frozenset()
        names = (self.tools.markers if self.tools else ()) + ((OPEN, CLOSE) if self.reasons else ())
        ids = (tokenizer.id_of(name) for name in names)
        return frozenset(token for token in ids if token is not None and tokenizer.is_special(token))

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            ApiError: it has none.
        """
        if self.model.tokenizer is None:
            raise invalid(f"{self.model.names[0]} has no tokenizer.json: send prompts as token ids to /v1/completions")
        return self.model.tokenizer

    def encode(self, text: str, param: str, *, add_special_tokens: bool, cut: bool = False) -> tuple[int, ...]:
        """The ids of ``text``; one that no context could hold is refused by its length, before it is read.

        ``cut``: only some of the ids will be kept, so that no text is too long.

        Raises:
            ApiError: 400, too long or not Unicode; naming ``param``.
        """
        tokenizer, context = self.tokenizer, self.model.max_context
        if not cut and (fewest := tokenizer.fewest_tokens(text)) > context:
            message = (
                f"the model's context holds {context} tokens: a text of {len(text):,} characters has at least "
                f"{fewest:,}; shorten it"
            )
            raise invalid(message, param, "context_length_exceeded")
        try:
            return tuple(tokenizer.encode(text, add_special_tokens=add_special_tokens))
        except ConfigError as error:
            raise backend_error(error, param) from error

    def check_model(self, name: str | None) -> str:
        """The name under which the request is answered.

        Raises:
            ApiError: 404, another model.
        """
        if name is None:
            return self.model.names[0]
        if name not in self.model.names:
            served = ", ".join(self.model.names)
            message = f"the model {name[:200]!r} does not exist here; this server serves: {served}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return name

    def check_token_ids(self, ids: Iterable[int], param: str) -> None:
        """
        Raises:
            ApiError: 400, naming ``param``: the model does not have one of the ids.
        """
        largest = max(ids, default=0)
        if largest >= self.model.vocab_size:
            message = f"token id {largest} is outside the model's vocabulary of {self.model.vocab_size}"
            raise invalid(f"{param}: {message}", param)

    def end_ids(self, body: GenerationFields) -> frozenset[int]:
        """The tokens that end the text."""
        eos = frozenset() if body.ignore_eos else self.model.eos_ids
        return eos | frozenset(body.stop_token_ids or ())

    def max_tokens(
        self, requested: int | None, least: int | None, default: int | None, longest: int, param: str
    ) -> int:
        """How many tokens may be generated after a prompt of ``longest``; ``default`` None: as many as fit.

        Raises:
            ApiError: 400, more than the context holds, or fewer than ``least``, the body's ``min_tokens``.
        """
        context = self.model.max_context
        room = context - longest
        if longest > context or (requested is None and room < 1) or (requested is not None and requested > room):
            wanted = f"{requested} more were requested" if requested is not None else "the answer has no room"
            message = (
                f"the model's context holds {context} tokens: the prompt has {longest}, and {wanted}; "
                "shorten the prompt or request fewer"
            )
            raise invalid(message, param, "context_length_exceeded")
        most = requested if requested is not None else room if default is None else min(default, room)
        if least is not None and least > most:
            raise invalid(f"min_tokens is {least}, but max_tokens {most}", "min_tokens")
        return most

    def sampling(
        self, body: GenerationFields, *, logprobs: int | None = None, prompt_logprobs: int | None = None
    ) -> SamplingParams:
        """The sampling of the body, else of the checkpoint's generation config, else OpenAI's defaults.

        Raises:
            ApiError: 400, naming the field.
        """
        values: dict[str, Any] = dict(self.defaults)
        names = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
        values |= {name: value for name in (*names, "min_tokens") if (value := getattr(body, name)) is not None}
        if body.top_k is not None:
            values["top_k"] = max(body.top_k, 0)
        if body.seed is not None:
            values["seed"] = body.seed & _MASK63
        values["logit_bias"] = self._bias(body)
        try:
            return SamplingParams(**values, logprobs=logprobs, prompt_logprobs=prompt_logprobs)
        except ConfigError as error:
            raise backend_error(error, str(error).split(maxsplit=1)[0]) from error

    def _bias(self, body: GenerationFields) -> tuple[tuple[int, float], ...]:
        bias: dict[int, float] = {}
        for key, value in (body.logit_bias or {}).items():
            if not (key.isascii() and key.isdecimal() and len(key) < 12 and int(key) < self.model.vocab_size):
                message = f"{key[:40]!r} is not a token id of this model: ids are 0 to {self.model.vocab_size - 1}"
                raise invalid(f"logit_bias: {message}", "logit_bias")
            bias[int(key)] = value
        return tuple(sorted(bias.items()))

    def allowed(self, body: GenerationFields) -> AllowedTokens | None:
        """The guide for ``allowed_token_ids``; None if any token is allowed.

        Raises:
            ApiError: 400, an id that the model does not have.
        """
        if body.allowed_token_ids is None:
            return None
        self.check_token_ids(body.allowed_token_ids, "allowed_token_ids")
        return AllowedTokens(body.allowed_token_ids, self.model.vocab_size)

    def check_amount(self, num_prompts: int, num_choices: int) -> None:
        """Raises :class:`ApiError` if a request has more texts than allowed."""
        most = self.options.max_generations
        if num_prompts * num_choices > most:
            message = (
                f"{num_prompts} prompts with n {num_choices} are {num_prompts * num_choices} texts; at most {most}"
            )
            raise invalid(f"{message} are allowed in one request", "n")


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerOptions:
    """The options of a request that affect its answer. ``logprobs``: best tokens to list; None: no logprobs.

    ``most_tokens``: the value of ``max_tokens``, under any of its names.
    """

    stream: bool
    wants_usage: bool
    num_choices: int
    logprobs: int | None
    priority: int
    most_tokens: int | None
    stops: tuple[str, ...]
    keeps_stop: bool
    skips_special: bool

    @classmethod
    def of(cls, body: GenerationFields, *, logprobs: int | None) -> AnswerOptions:
        """Those of a body."""
        return cls(
            stream=bool(body.stream),
            wants_usage=body.wants_usage,
            num_choices=body.num_choices,
            logprobs=logprobs,
            priority=body.priority or 0,
            most_tokens=body.most_tokens,
            stops=body.stops,
            keeps_stop=body.keeps_stop,
            skips_special=body.skip_special_tokens is not False,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedRequest:
    """A parsed request. ``head``: the fields that every chunk of the answer begins with. ``prompts``: token ids."""

    options: AnswerOptions
    head: dict[str, Any]
    prompts: tuple[array[int], ...]
    max_tokens: int
    end_ids: frozenset[int]
    sampling: SamplingParams
    allowed: AllowedTokens | None
    constraint: Constraint | None

    def generation(self, prompt: tuple[int, ...], choice: int) -> Generation:
        """The ``choice``-th text of a prompt."""
        return Generation(
            prompt=prompt,
            max_tokens=self.max_tokens,
            end_ids=self.end_ids,
            sampling=sampling_of_choice(self.sampling, choice),
            priority=self.options.priority,
            guide=self.allowed,
        )


def sampling_of_choice(sampling: SamplingParams, index: int) -> SamplingParams:
    """The parameters of the ``index``-th of ``n`` texts: its own seed, so that they differ."""
    if sampling.seed is None or not index:
        return sampling
    return sampling.with_seed((sampling.seed + index) & _MASK63)


class AllowedTokens(Guide):
    """Only ``tokens`` are ever generated."""

    def __init__(self, tokens: Iterable[int], vocab_size: int) -> None:
        mask = bytearray(-(-vocab_size // 32) * 4)
        for token in tokens:
            mask[token // 8] |= 1 << token % 8
        self._mask = bytes(mask)

    def allowed(self) -> bytes:
        """The mask, one bit per token."""
        return self._mask

    def advance(self, token: int) -> None:
        """Nothing changes."""


def new_id(prefix: str) -> str:
    """A number for an answer or a call that no other has."""
    return f"{prefix}-{_NUMBERS.getrandbits(96):024x}"


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())


def truncated(reader: RequestReader, body: GenerationFields, ids: tuple[int, ...], param: str) -> tuple[int, ...]:
    """The part of a prompt that ``truncate_prompt_tokens`` keeps; -1: as many tokens as fit beside the answer.

    Raises:
        ApiError: 400, no token would be left.
    """
    keep = body.truncate_prompt_tokens
    if keep is None:
        return ids
    if keep == -1:
        keep = reader.model.max_context - max(body.most_tokens or 1, 1)
    if keep < 1:
        raise invalid(f"{param}: no token would be left of the prompt", "truncate_prompt_tokens")
    return ids[:keep] if body.truncation_side == "right" else ids[-keep:]
