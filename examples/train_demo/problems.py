"""Generated arithmetic as questions and answers, with number pairs that training never sees.

Knows numbers and phrases. Knows nothing of tokens or models. Everything comes from the ``random.Random`` given.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

HELD_OUT_ONE_IN = 10
NAMES = ("Tom", "Anna", "Ben", "Mary", "Sam", "Lucy", "Max", "Ruth")
THINGS = ("apples", "books", "coins", "pens", "cards", "shells", "stamps", "eggs")


@dataclass(frozen=True)
class Problem:
    """``kind`` names the row of the table that it is counted in; ``numbers`` decide whether it is held out."""

    kind: str
    question: str
    answer: str
    numbers: tuple[int, ...]

    @property
    def held_out(self) -> bool:
        """One in ten of all number tuples of a kind, fixed for good."""
        key = f"{self.kind} {self.numbers}".encode()
        return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") % HELD_OUT_ONE_IN == 0


def _addition(random: Random, low: int, high: int, kind: str) -> Problem:
    a, b = random.randint(low, high), random.randint(low, high)
    phrase = random.choice(("What is {} + {}?", "What is {} plus {}?", "{} + {} ="))
    return Problem(kind, phrase.format(a, b), str(a + b), (a, b))


def _subtraction(random: Random, low: int, high: int, kind: str) -> Problem:
    a, b = random.randint(low, high), random.randint(low, high)
    phrase = random.choice(("What is {} - {}?", "What is {} minus {}?", "{} - {} ="))
    return Problem(kind, phrase.format(a, b), str(a - b), (a, b))


def _comparison(random: Random) -> Problem:
    high = random.choice((99, 999))
    a, b = random.sample(range(high + 1), 2)
    larger = random.random() < 0.5
    question = f"Which is {'larger' if larger else 'smaller'}, {a} or {b}?"
    return Problem("comparison", question, str(max(a, b) if larger else min(a, b)), (a, b))


def word_problem(random: Random) -> Problem:
    """Two steps, with the working shown and the result after ``####``, as in GSM8K."""
    name, other = random.sample(NAMES, 2)
    thing = random.choice(THINGS)
    a, b = random.randint(10, 60), random.randint(2, 30)
    c = random.randint(2, a + b - 1)
    verb = random.choice(("buys", "finds", "gets"))
    question = f"{name} has {a} {thing}. {name} {verb} {b} more and gives {c} to {other}. How many {thing} are left?"
    return Problem(
        "word problem", question, f"{a} + {b} = {a + b}\n{a + b} - {c} = {a + b - c}\n#### {a + b - c}", (a, b, c)
    )


KINDS: tuple[tuple[float, Callable[[Random], Problem]], ...] = (
    (5, lambda random: _addition(random, 0, 99, "two-digit addition")),
    (2, lambda random: _addition(random, 100, 999, "three-digit addition")),
    (3, lambda random: _subtraction(random, 0, 99, "two-digit subtraction")),
    (1, lambda random: _subtraction(random, 100, 999, "three-digit subtraction")),
    (1, _comparison),
    (1, word_problem),
)


def draw(random: Random, held_out: bool = False, kind: Callable[[Random], Problem] | None = None) -> Problem:
    """A problem of a random kind (or of ``kind``), from the held-out number pairs or from all others."""
    while True:
        make = kind or random.choices([make for _, make in KINDS], [weight for weight, _ in KINDS])[0]
        problem = make(random)
        if problem.held_out == held_out:
            return problem
