"""What a grammar may cost: time, memory and size, and what is said when it costs more. Knows numbers; no requests."""

from __future__ import annotations

import re
from dataclasses import dataclass

import llguidance

__all__ = ["GrammarLimits", "in_words"]

_MB = 1 << 20
_SIZES = (
    "too many expressions",
    "too many states",
    "too many items",
    "too big",
    "current row has",
    "lexer precomputation failed",
)
"""How llguidance begins to say that one of its limits was met."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GrammarLimits:
    """Limits of one grammar, and of all.

    ``cpu_s`` and ``memory_bytes``: processor time and memory that compiling it and making its first mask may take.
    ``wall_s``: after how many seconds that is given up in any case. ``chars``: of its text. ``lexer_fuel``: steps of
    building its automaton; ``step_fuel`` and ``step_items``: steps of lexer and parser in one mask; ``lexer_states``:
    states that the automaton may grow to. ``mask_s``: processor time of one mask.

    ``num_kept``: compiled grammars that are kept for those who ask again. ``total_bytes``: memory of all grammars that
    are kept or in use. ``num_waiting``: distinct grammars that may wait to be compiled. ``failed_s``: for how long it
    is remembered that a grammar failed; ``num_failed``: of how many.
    """

    cpu_s: float = 1.0
    wall_s: float = 30.0
    memory_bytes: int = 128 * _MB
    chars: int = 1_000_000
    lexer_fuel: int = 400_000
    step_fuel: int = 200_000
    step_items: int = 50_000
    lexer_states: int = 20_000
    mask_s: float = 0.25
    num_kept: int = 64
    total_bytes: int = 512 * _MB
    num_waiting: int = 64
    failed_s: float = 60.0
    num_failed: int = 256

    def of_parser(self) -> llguidance.LLParserLimits:
        """The part of them that llguidance keeps."""
        return llguidance.LLParserLimits(
            initial_lexer_fuel=self.lexer_fuel,
            step_lexer_fuel=self.step_fuel,
            step_max_items=self.step_items,
            max_lexer_states=self.lexer_states,
            verbose_errors=False,
        )

    @property
    def too_slow(self) -> str:
        """Said of a grammar that takes more time."""
        return (
            f"the constraint takes more than {self.cpu_s:g} s of processor time to compile, the limit; make it "
            "simpler: large multipleOf, many patternProperties and nested repetitions cost most"
        )

    @property
    def too_much_memory(self) -> str:
        """Said of a grammar that takes more memory."""
        return (
            f"the constraint takes more than {self.memory_bytes // _MB} MB of memory to compile, the limit; make it "
            "smaller: large enums, choices and repetitions cost most"
        )

    def slow_mask(self, seconds: float) -> str:
        """Said of a grammar that takes so long for one mask."""
        return f"one token's mask took {seconds:.2g} s of processor time; the limit is {self.mask_s:g} s"


def in_words(problem: str, limits: GrammarLimits) -> str:
    """What llguidance says, in one line: the reason too, which it gives some lines below; and the limit that was met.

    It quotes the grammar in between, which is not the text that the client sent.
    """
    lines = [line.strip() for line in problem.replace("<non-verbose/>", "").splitlines() if line.strip()]
    if not lines:
        return "not valid"
    reasons = [line.removeprefix("error:").strip() for line in lines[1:] if line.startswith("error:")]
    if lines[0].startswith("NoExtension"):
        return "the constraint allows no first token, so no text fulfils it; change it"
    first = re.sub(r"^at \d+\(\d+\): ", "", lines[0])
    said = " ".join([first[:500].rstrip(), *(reason[:500] for reason in reasons[:1])])
    if any(size in said.lower() for size in _SIZES):
        said += (
            f"; the limits are {limits.lexer_fuel} steps to build the automaton, {limits.lexer_states} states, and "
            f"{limits.step_fuel} steps and {limits.step_items} items for one token's mask: make the constraint simpler"
        )
    return said
