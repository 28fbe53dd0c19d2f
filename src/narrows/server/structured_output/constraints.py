"""What a request demands of its text (JSON schema, regex, choice, grammar), as a grammar and its guides."""

from __future__ import annotations

import json
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import llguidance

from narrows.errors import ConfigError
from narrows.server.http.errors import invalid
from narrows.server.parsers.formats import CLOSE, OPEN
from narrows.server.schema.common import GenerationFields, ResponseFormat, StructuredOutputs
from narrows.server.structured_output.cache import Grammars
from narrows.server.structured_output.gbnf import gbnf_to_lark
from narrows.server.structured_output.guide import GrammarGuide, MaskThreads
from narrows.server.structured_output.json_schema import COMPACT, WHITE_SPACE, close_objects, json_rule
from narrows.server.structured_output.trial import GrammarLimits, TrialProcess, startup_message
from narrows.text import Tokenizer

__all__ = [
    "Constraint",
    "Form",
    "GrammarGuide",
    "GuideMaker",
    "choice_form",
    "closed",
    "json_form",
    "literal",
    "regex_form",
    "requested_grammar",
]


@dataclass(frozen=True, slots=True)
class Form:
    """Lark rules that define ``name``: the grammar of a text or of a part of it."""

    name: str
    rules: str


def json_form(schema: dict[str, Any]) -> Form:
    """JSON text that fulfils the schema."""
    return Form("json_text", f"json_text: {json_rule(schema)}")


def regex_form(pattern: str) -> Form:
    """Text that the regex matches as a whole; ``\\d`` and ``\\w`` are ASCII's, as in JSON schemas."""
    inner = llguidance.regex_to_lark(pattern, "dw").replace("\n", "\\n")
    return Form("pattern", f"pattern: /{inner}/")


def choice_form(texts: Sequence[str]) -> Form:
    """One of the texts."""
    return Form("choice", f"choice: {' | '.join(json.dumps(text) for text in texts)}")


def literal(tokenizer: Tokenizer, text: str) -> str:
    """``text`` in a Lark rule. Special tokens of the tokenizer stay special tokens."""
    parts: list[str] = []
    plain = text
    while plain:
        found = [(at, token, name) for name, token in tokenizer.special_tokens.items() if (at := plain.find(name)) >= 0]
        if not found:
            break
        at, token, name = min(found)
        parts += [json.dumps(plain[:at])] * bool(at) + [f"<[{token}]>"]
        plain = plain[at + len(name) :]
    return " ".join([*parts, *([json.dumps(plain)] if plain or not parts else [])])


class GuideMaker:
    """Makes guides for one model's tokens. Safe to share between threads."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        vocab_size: int,
        end_ids: Collection[int],
        limits: GrammarLimits | None = None,
        num_trials: int = 2,
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = max(vocab_size, tokenizer.vocab_size)
        self._end_ids = sorted(end_ids)
        self._lock = threading.Lock()
        self.limits = limits or GrammarLimits()
        self.trials = [TrialProcess(self._startup_message, self.limits) for _ in range(num_trials)]
        self.grammars = Grammars(lambda: self.tokens, self.trials, self.limits)
        self._masks = MaskThreads()

    def prepare(self) -> None:
        """Make the token table that constraints need, once: half a second for 100,000 tokens."""
        _ = self.tokens

    async def guides(
        self, forms: Sequence[Form], count: int, *, reasoning: bool = False, inside: bool = False
    ) -> list[GrammarGuide]:
        """A guide for each of ``count`` texts, which are one of ``forms``.

        ``reasoning``: reasoning may come first; ``inside``: it has begun already. Cancelling
        the call leaves no work behind.

        Raises:
            ConfigError: an invalid form, or one that passes a limit; the message names it.
            QueueFull: too many other grammars wait, or take too much memory.
        """
        grammar = await self.grammars.get(self._grammar(forms, reasoning=reasoning, inside=inside))
        return [GrammarGuide(grammar, self._masks) for _ in range(count)]

    def close(self) -> None:
        """End the threads and processes that compile grammars and make masks."""
        self.grammars.close()
        self._masks.close()

    def _grammar(self, forms: Sequence[Form], *, reasoning: bool, inside: bool) -> str:
        rules = [f"body: {' | '.join(form.name for form in forms)}", *(form.rules for form in forms)]
        if not reasoning:
            return "\n".join(["start: body", *rules])
        if CLOSE in self._tokenizer.special_tokens:
            thought = f"thought: /(?s:.*)/ {literal(self._tokenizer, CLOSE)}"
        else:
            thought = f"thought[suffix={json.dumps(CLOSE)}]: /(?s:.*)/"
        start = "start: thought gap body" if inside else f"start: ({literal(self._tokenizer, OPEN)} thought gap)? body"
        return "\n".join([start, thought, r"gap: /\n{0,2}/", *rules])

    @property
    def tokens(self) -> llguidance.LLTokenizer:
        """The model's token table; made once, holding the interpreter's lock."""
        with self._lock:
            return self._tokens

    @cached_property
    def _tokens(self) -> llguidance.LLTokenizer:
        return llguidance.LLTokenizer(
            self._tokenizer.to_json(), n_vocab=self._vocab_size, eos_token=self._end_ids or None
        )

    def _startup_message(self) -> bytes:
        """The first message to trial processes; made once, as it may be tens of megabytes and they end often."""
        with self._lock:
            return self._message

    @cached_property
    def _message(self) -> bytes:
        return startup_message(self._tokenizer.to_json(), self._vocab_size, self._end_ids, self.limits)


Requested = tuple[Form, str]
"""A form, and the field that demands it."""


def requested_grammar(body: GenerationFields) -> Requested | None:
    """The required form of the text and the field that demands it; None: any text.

    Raises:
        ApiError: 400, two fields ask for a form, or one is incomplete.
    """
    found = [*_of_response_format(body), *_of_others(body)]
    if len(found) > 1:
        names = " and ".join(param for _, param in found)
        raise invalid(f"{names} both set the format of the text; send only one", found[1][1])
    if found and body.min_tokens:
        raise invalid(f"min_tokens does not go with {found[0][1]}: the form decides where the text ends", "min_tokens")
    if found and body.allowed_token_ids is not None:
        message = f"allowed_token_ids and {found[0][1]} both restrict the tokens; send only one"
        raise invalid(message, "allowed_token_ids")
    return found[0] if found else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraint:
    """The required format of a request's texts: one of ``forms``, as the field ``param`` demands.

    ``reasoning``: a thought may come first; ``inside``: it has begun already.
    """

    forms: tuple[Form, ...]
    param: str
    reasoning: bool = False
    inside: bool = False


def closed(schema: Mapping[str, Any], param: str) -> dict[str, Any]:
    """The schema as ``strict`` requires it.

    Raises:
        ApiError: 400, naming ``param``: it is nested too deep.
    """
    try:
        return close_objects(schema)
    except ConfigError as error:
        raise invalid(f"{param}: {error}", param) from error


def _grammar(text: str, param: str) -> Form:
    """A grammar of the client: GBNF or EBNF by its ``::=``, else Lark."""
    try:
        rules = gbnf_to_lark(text) if "::=" in text else text
    except ConfigError as error:
        raise invalid(f"{param}: {error}", param) from error
    return Form("grammar", f"grammar: %lark {{\n{rules}\n}}")


def _json(schema: Mapping[str, Any], white_space: str = WHITE_SPACE) -> Form:
    return Form("json_text", f"json_text: {json_rule(schema, white_space=white_space)}")


_USED = {
    "text": (),
    "json_object": ("schema",),
    "json_schema": ("json_schema", "schema"),
    "regex": ("pattern",),
    "grammar": ("grammar",),
}
"""By type of ``response_format``, the fields that constrain the text: one of them, if any."""


def _of_response_format(body: GenerationFields) -> list[Requested]:
    response_format = body.response_format
    if response_format is None:
        return []
    given = [
        name
        for name in ("json_schema", "schema", "pattern", "grammar")
        if _of_format(response_format, name) is not None
    ]
    used = _USED[response_format.type]
    if stray := next((name for name in given if name not in used or name != given[0]), None):
        where = f"response_format.{stray}"
        raise invalid(f"{where} does not go with type {response_format.type!r} or a second field; leave it out", where)
    if not given and response_format.type not in ("text", "json_object"):
        where = f"response_format.{used[0]}"
        raise invalid(f"{where} is missing", where)
    if response_format.pattern is not None:
        return [(regex_form(response_format.pattern), "response_format.pattern")]
    if response_format.grammar is not None:
        return [(_grammar(response_format.grammar, "response_format.grammar"), "response_format.grammar")]
    if response_format.json_schema is not None:
        where = "response_format.json_schema.schema"
        schema = response_format.json_schema.schema_
        return [(_json(closed(schema, where) if response_format.json_schema.strict else schema), where)]
    if response_format.schema_ is not None:
        return [(_json(response_format.schema_), "response_format.schema")]
    return [(_json({"type": "object"}), "response_format")] if response_format.type == "json_object" else []


def _of_format(response_format: ResponseFormat, name: str) -> Any:
    return getattr(response_format, "schema_" if name == "schema" else name)


def _of_others(body: GenerationFields) -> list[Requested]:
    found: list[Requested] = []
    for name in ("guided_regex", "regex"):
        if (pattern := getattr(body, name)) is not None:
            found.append((regex_form(pattern), name))
    white_space = body.guided_whitespace_pattern
    for name in ("guided_json", "json_schema"):
        if (schema := getattr(body, name)) is not None:
            found.append((_json(schema, WHITE_SPACE if white_space is None else white_space), name))
    if body.guided_choice is not None:
        found.append((choice_form(body.guided_choice), "guided_choice"))
    for name in ("guided_grammar", "grammar", "ebnf"):
        if text := getattr(body, name):  # an empty one is no grammar, as in llama.cpp
            found.append((_grammar(text, name), name))
    return [*found, *(_of_structured_outputs(body.structured_outputs) if body.structured_outputs is not None else ())]


def _of_structured_outputs(out: StructuredOutputs) -> list[Requested]:
    found: list[Requested] = []
    if out.regex is not None:
        found.append((regex_form(out.regex), "structured_outputs.regex"))
    if out.json_ is not None or out.json_object:
        where = "structured_outputs.json" if out.json_ is not None else "structured_outputs.json_object"
        schema: dict[str, Any] = {"type": "object"} if out.json_ is None else out.json_
        if out.json_ is not None and out.disable_additional_properties:
            schema = closed(schema, where)
        white_space = COMPACT if out.disable_any_whitespace else WHITE_SPACE
        found.append((_json(schema, white_space if out.whitespace_pattern is None else out.whitespace_pattern), where))
    if out.json_ is not None and out.json_object:
        raise invalid("structured_outputs: json and json_object both set the format of the text", "structured_outputs")
    if out.choice is not None:
        found.append((choice_form(out.choice), "structured_outputs.choice"))
    if out.grammar:
        found.append((_grammar(out.grammar, "structured_outputs.grammar"), "structured_outputs.grammar"))
    return found
