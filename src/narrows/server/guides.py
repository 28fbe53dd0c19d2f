"""What a text may look like, as a grammar, and the guides that hold generations to it token by token.

Knows forms, grammars and a model's tokens; not requests over HTTP, nor how tokens are chosen. How grammars are compiled
and followed is said in :mod:`narrows.server.grammar`.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import llguidance

from narrows.server.grammar.cache import Grammars
from narrows.server.grammar.compiled import GrammarGuide
from narrows.server.grammar.limits import GrammarLimits
from narrows.server.grammar.masks import MaskThreads
from narrows.server.grammar.process import TrialProcess
from narrows.server.grammar.trial import told_to
from narrows.server.json_rule import json_rule
from narrows.server.reasoning import CLOSE, OPEN
from narrows.text import Tokenizer

__all__ = ["Form", "GrammarGuide", "GuideMaker", "choice_form", "json_form", "literal", "regex_form"]


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


def literal(tokenizer: Tokenizer, text: str) -> str:
    """``text`` in a Lark rule. What the tokenizer holds as special tokens stands there as such."""
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
        self.trials = [TrialProcess(self._tell, self.limits) for _ in range(num_trials)]
        self.grammars = Grammars(lambda: self.tokens, self.trials, self.limits)
        self._masks = MaskThreads()

    def prepare(self) -> None:
        """Make the table of the model's tokens that constraints need: half a second for 100,000 tokens, once."""
        _ = self.tokens

    async def guides(
        self, forms: Sequence[Form], count: int, *, reasoning: bool = False, inside: bool = False
    ) -> list[GrammarGuide]:
        """A guide for each of ``count`` texts, which are one of ``forms``.

        ``reasoning``: a thought may come first; ``inside``: it has begun already. Whoever is cancelled meanwhile leaves
        no work behind.

        Raises:
            ConfigError: a form that is not valid, or passes a limit; the message says what.
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
        """The model's tokens; made once, in some tenths of a second for a large vocabulary, without letting go."""
        with self._lock:
            return self._tokens

    @cached_property
    def _tokens(self) -> llguidance.LLTokenizer:
        return llguidance.LLTokenizer(
            self._tokenizer.to_json(), n_vocab=self._vocab_size, eos_token=self._end_ids or None
        )

    def _tell(self) -> bytes:
        """What trial processes are told: made once, as it may be tens of megabytes, and processes end often."""
        with self._lock:
            return self._told

    @cached_property
    def _told(self) -> bytes:
        return told_to(self._tokenizer.to_json(), self._vocab_size, self._end_ids, self.limits)
