"""Grammars in GBNF (llama.cpp) and EBNF (xgrammar), ``root ::= ...``, to Lark rules.

Each character becomes its own terminal. A lexer takes the longest terminal, so ``[a-z]+ "x"`` as two terminals
could never end in an x; character by character, the rules say exactly what the grammar says.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass

from narrows.errors import ConfigError

__all__ = ["gbnf_to_lark"]

MOST_REPEATS = 100_000
MOST_NESTED = 100
_TOKEN = re.compile(
    r"""(?P<space>(?:\s|\#[^\n]*)+)
    |(?P<rule>(?<![A-Za-z0-9_.-])[A-Za-z0-9_.-]++(?=\s*::=))
    |(?P<name>[A-Za-z_][A-Za-z0-9_-]*|[0-9][A-Za-z0-9_-]*)
    |(?P<text>"(?:\\.|[^"\\\n])*")
    |(?P<characters>\[\^?(?:\\.|[^\]\\\n])*\])
    |(?P<token><\[[0-9]{1,9}\]>|<[^<>\s]{1,200}>)
    |(?P<count>\{\s*[0-9]*\s*(?:,\s*[0-9]*\s*)?\})
    |(?P<sign>::=|[|()*+?.])""",
    re.VERBOSE | re.DOTALL,
)
_ESCAPE = re.compile(r"\\(?:x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|(.))", re.DOTALL)
_NAMED = {"n": "\n", "r": "\r", "t": "\t", "b": "\b", "f": "\f", "v": "\v", "a": "\a", "e": "\x1b", "0": "\0"}
_SELF = frozenset("\"'\\/[]^-?")
_SURROGATES = range(0xD800, 0xE000)


def gbnf_to_lark(grammar: str) -> str:
    """Lark rules whose ``start`` is the ``root`` of ``grammar``.

    Raises:
        ConfigError: it is no such grammar, or uses unsupported parts; the message has the position.

    >>> print(gbnf_to_lark('root ::= "ab" digit+\\ndigit ::= [0-9]'))
    start: "a" "b" (rule1)+
    rule1: /[\\x{30}-\\x{39}]/
    """
    return _Reader(grammar).lark()


@dataclass(frozen=True, slots=True)
class _Piece:
    kind: str
    text: str
    at: int


class _Reader:
    """Reads one grammar, piece by piece."""

    def __init__(self, grammar: str) -> None:
        self._grammar = grammar
        self._pieces = self._split()
        self._position = 0
        self._depth = 0
        rules = [piece.text for piece in self._pieces if piece.kind == "rule"]
        twice = next((name for name, count in Counter(rules).items() if count > 1), None)
        if twice is not None:
            raise ConfigError(f"the rule {twice[:60]!r} is defined twice")
        if "root" not in rules:
            raise ConfigError("the grammar has no rule 'root', where it begins (root ::= ...)")
        self._names = {name: "start" if name == "root" else f"rule{index}" for index, name in enumerate(rules)}

    def lark(self) -> str:
        """All rules."""
        lines: list[str] = []
        while (piece := self._next()) is not None:
            if piece.kind != "rule":
                raise self._wrong(piece, "a rule (name ::= ...) is expected")
            self._next()  # ::=
            lines.append(f"{self._names[piece.text]}: {self._alternatives()}")
        return "\n".join(lines)

    def _split(self) -> list[_Piece]:
        pieces: list[_Piece] = []
        at = 0
        while at < len(self._grammar):
            found = _TOKEN.match(self._grammar, at)
            if found is None or found.lastgroup is None:
                raise self._wrong(_Piece("", "", at), "this is not GBNF")
            if found.lastgroup != "space":
                pieces.append(_Piece(found.lastgroup, found.group(), at))
            at = found.end()
        return pieces

    def _wrong(self, piece: _Piece | None, what: str) -> ConfigError:
        at = piece.at if piece is not None else len(self._grammar)
        line = self._grammar.count("\n", 0, at) + 1
        here = self._grammar[at : at + 30].split("\n")[0]
        return ConfigError(f"line {line} of the grammar, at {here!r}: {what}" if here else f"the grammar ends: {what}")

    def _next(self) -> _Piece | None:
        piece = self._pieces[self._position] if self._position < len(self._pieces) else None
        self._position += 1
        return piece

    def _ahead(self) -> _Piece | None:
        return self._pieces[self._position] if self._position < len(self._pieces) else None

    def _alternatives(self) -> str:
        found = [self._sequence()]
        while (piece := self._ahead()) is not None and piece.text == "|":
            self._position += 1
            found.append(self._sequence())
        return " | ".join(found)

    def _sequence(self) -> str:
        terms: list[str] = []
        while (piece := self._ahead()) is not None and piece.kind != "rule" and piece.text not in ("|", ")"):
            self._position += 1
            terms.append(self._repeated(self._term(piece)))
        return " ".join(terms) or '""'

    def _term(self, piece: _Piece) -> str:
        if piece.kind == "name":
            if piece.text not in self._names:
                raise self._wrong(piece, f"there is no rule {piece.text[:60]!r}")
            return self._names[piece.text]
        if piece.kind == "text":
            return self._text(piece)
        if piece.kind == "characters":
            return self._characters(piece)
        if piece.kind == "token":
            return piece.text
        if piece.text == ".":
            return "/(?s:.)/"
        if piece.text == "(":
            return self._group(piece)
        raise self._wrong(piece, "a text, [characters], a name or a group is expected")

    def _group(self, piece: _Piece) -> str:
        self._depth += 1
        if self._depth > MOST_NESTED:
            raise self._wrong(piece, f"more than {MOST_NESTED} nested groups")
        inner = self._alternatives()
        end = self._next()
        if end is None or end.text != ")":
            raise self._wrong(end, "a group has no end")
        self._depth -= 1
        return f"({inner})"

    def _repeated(self, term: str) -> str:
        while (piece := self._ahead()) is not None and (piece.text in ("*", "+", "?") or piece.kind == "count"):
            self._position += 1
            term = f"({term}){self._count(piece)}"
        return term

    def _count(self, piece: _Piece) -> str:
        if piece.kind != "count":
            return piece.text
        low, comma, high = piece.text[1:-1].replace(" ", "").partition(",")
        if not low and not comma:
            raise self._wrong(piece, "a count is missing")
        numbers = [int(number) for number in (low, high) if number]
        if max(numbers, default=0) > MOST_REPEATS:
            raise self._wrong(piece, f"at most {MOST_REPEATS} repeats are supported")
        if low and high and int(low) > int(high):
            raise self._wrong(piece, "the first count is the larger one")
        return f"{{{low or 0},{high}}}" if comma else f"{{{low},{low}}}"

    def _text(self, piece: _Piece) -> str:
        return " ".join(_quoted(character) for character in self._unescaped(piece, piece.text[1:-1])) or '""'

    def _characters(self, piece: _Piece) -> str:
        inner = piece.text[1:-1]
        negated = inner.startswith("^")
        found = self._class_members(piece, inner[negated:])
        if not found:
            if negated:
                return "/(?s:.)/"
            raise self._wrong(piece, "it has no character")
        return f"/[{'^' if negated else ''}{''.join(found)}]/"

    def _class_members(self, piece: _Piece, inner: str) -> list[str]:
        """Characters and ranges, as a regex spells them; only a ``-`` that is not escaped makes a range."""
        found: list[str] = []
        at = 0
        while at < len(inner):
            first, at = self._character(piece, inner, at)
            last = first
            if inner[at : at + 1] == "-" and at + 1 < len(inner):
                last, at = self._character(piece, inner, at + 1)
            if last < first:
                raise self._wrong(piece, "a range goes backwards")
            found.append(_code(first) if first == last else f"{_code(first)}-{_code(last)}")
        return found

    def _unescaped(self, piece: _Piece, inner: str) -> str:
        out: list[str] = []
        at = 0
        while at < len(inner):
            character, at = self._character(piece, inner, at)
            out.append(character)
        return "".join(out)

    def _character(self, piece: _Piece, inner: str, at: int) -> tuple[str, int]:
        """The character at ``at``, and where the next one is."""
        if inner[at] != "\\":
            character, end = inner[at], at + 1
        else:
            found = _ESCAPE.match(inner, at)
            if found is None:
                raise self._wrong(piece, "an escape has no end")
            code = found[1] or found[2] or found[3]
            if code is None and found[4] not in _NAMED and found[4] not in _SELF:
                raise self._wrong(piece, f"there is no escape \\{found[4]}")
            if code is not None and int(code, 16) > 0x10FFFF:
                raise self._wrong(piece, f"there is no character {code}")
            character = chr(int(code, 16)) if code is not None else _NAMED.get(found[4], found[4])
            end = found.end()
        if ord(character) in _SURROGATES:
            raise self._wrong(piece, "half of a surrogate pair is no character")
        return character, end


def _quoted(character: str) -> str:
    return json.dumps(character, ensure_ascii=not character.isprintable())


def _code(character: str) -> str:
    return f"\\x{{{ord(character):X}}}"
