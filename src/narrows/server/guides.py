"""What a text may look like, as a grammar, and the guide that holds a generation to it token by token.

Knows llguidance, grammars and token ids; not requests over HTTP, nor how tokens are chosen.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any

import llguidance

from narrows.errors import ConfigError
from narrows.server.json_rule import json_rule
from narrows.server.reasoning import CLOSE, OPEN
from narrows.text import Tokenizer

__all__ = ["Form", "GrammarGuide", "GuideMaker", "choice_form", "json_form", "regex_form"]


@dataclass(frozen=True, slots=True)
class Form:
    """Lark rules that define ``name``, which the text, or a part of it, has to be."""

    name: str
    rules: str


def json_form(schema: dict[str, Any]) -> Form:
    """Text that is JSON and fulfils the schema."""
    return Form("json_text", f"json_text: {json_rule(schema)}")


def regex_form(pattern: str) -> Form:
    """Text that the regex matches as a whole; ``\\d`` and ``\\w`` are ASCII's, as in JSON schemas."""
    inner = llguidance.regex_to_lark(pattern, "dw").replace("\n", "\\n")
    return Form("pattern", f"pattern: /{inner}/")


def choice_form(texts: Sequence[str]) -> Form:
    """One of the texts."""
    return Form("choice", f"choice: {' | '.join(json.dumps(text) for text in texts)}")


class GrammarGuide:
    """One generation's constraint: a :class:`~narrows.sched.guide.Guide`.

    When nothing may follow, or the grammar became too large to go on (``problem``), no token is allowed any more.
    """

    def __init__(self, matcher: llguidance.LLMatcher, num_bytes: int) -> None:
        self._matcher = matcher
        self._nothing = bytes(num_bytes)
        self._mask: bytes | None = None

    @property
    def problem(self) -> str:
        """Why the text had to end before its form was fulfilled; empty if it did not."""
        return " ".join(self._matcher.get_error().split()) if self._matcher.is_error() else ""

    def allowed(self) -> bytes:
        """The tokens that may come next, one bit each; those that end the text are among them where it may end."""
        if self._mask is None:
            mask = self._nothing if self._matcher.is_stopped() else self._matcher.compute_bitmask()
            self._mask = self._nothing if self._matcher.is_error() else mask
        return self._mask

    def advance(self, token: int) -> None:
        """Take in the token that was chosen."""
        self._mask = None
        self._matcher.consume_token(token)


class GuideMaker:
    """Makes guides for one model's tokens. Safe to share between threads."""

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int, end_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = max(vocab_size, tokenizer.vocab_size)
        self._end_ids = sorted(end_ids)
        self._lock = Lock()

    def literal(self, text: str) -> str:
        """``text`` in a Lark rule. What the tokenizer holds as special tokens stands there as such."""
        parts: list[str] = []
        plain = text
        while plain:
            found = [(at, token, name) for name, token in self._special.items() if (at := plain.find(name)) >= 0]
            if not found:
                break
            at, token, name = min(found)
            parts += [json.dumps(plain[:at])] * bool(at) + [f"<[{token}]>"]
            plain = plain[at + len(name) :]
        return " ".join([*parts, *([json.dumps(plain)] if plain or not parts else [])])

    def guide(self, forms: Sequence[Form], *, reasoning: bool = False, inside: bool = False) -> GrammarGuide:
        """The text is one of ``forms``. ``reasoning``: a thought may come first; ``inside``: it has begun already.

        Raises:
            ConfigError: a form that is not valid, or asks for more than can be done; the message says what.
        """
        grammar = self._grammar(forms, reasoning=reasoning, inside=inside)
        with self._lock:  # the tokenizer's table is made once
            tokens = self._tokens
        problem = llguidance.LLMatcher.validate_grammar(grammar, tokens)
        if problem and not problem.startswith("WARNING"):
            raise ConfigError(_first_line(problem))
        matcher = llguidance.LLMatcher(tokens, grammar, log_level=0)
        if matcher.is_error():
            raise ConfigError(_first_line(matcher.get_error()))
        return GrammarGuide(matcher, -(-self._vocab_size // 32) * 4)

    def _grammar(self, forms: Sequence[Form], *, reasoning: bool, inside: bool) -> str:
        rules = [f"body: {' | '.join(form.name for form in forms)}", *(form.rules for form in forms)]
        if not reasoning:
            return "\n".join(["start: body", *rules])
        if CLOSE in self._special:
            thought = f"thought: /(?s:.*)/ {self.literal(CLOSE)}"
        else:
            thought = f"thought[suffix={json.dumps(CLOSE)}]: /(?s:.*)/"
        start = "start: thought gap body" if inside else f"start: ({self.literal(OPEN)} thought gap)? body"
        return "\n".join([start, thought, r"gap: /\n{0,2}/", *rules])

    @cached_property
    def _special(self) -> dict[str, int]:
        """Special tokens by name."""
        tokenizer = self._tokenizer
        ids = filter(tokenizer.is_special, range(tokenizer.vocab_size))
        return {tokenizer.decode([token], skip_special_tokens=False): token for token in ids}

    @cached_property
    def _tokens(self) -> llguidance.LLTokenizer:
        return llguidance.LLTokenizer(
            self._tokenizer.to_json(), n_vocab=self._vocab_size, eos_token=self._end_ids or None
        )


def _first_line(problem: str) -> str:
    """llguidance says more below, about its own state."""
    return next((line.strip() for line in problem.splitlines() if line.strip()), "not valid")[:500]
