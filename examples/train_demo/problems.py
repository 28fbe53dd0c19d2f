"""Generated arithmetic as questions and answers, with sums, differences and comparisons that training never sees.

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

Fact = tuple[str, int, int]
"""What an answer rests on: the operation and its two numbers, the smaller first, so that b + a is a + b."""


def fact(operation: str, a: int, b: int) -> Fact:
    """The fact of an operation on two numbers in either order."""
    return operation, min(a, b), max(a, b)


def is_held_out(known: Fact) -> bool:
    """One in ten facts, fixed for good."""
    digest = hashlib.blake2b(repr(known).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0


@dataclass(frozen=True)
class Problem:
    """``kind`` names the row of the table that it is counted in; ``facts`` is all that its answer states."""

    kind: str
    question: str
    answer: str
    facts: tuple[Fact, ...]

    @property
    def held_out(self) -> bool:
        """Whether any of its facts is: training sees no problem that states one."""
        return any(is_held_out(known) for known in self.facts)


def _addition(random: Random, low: int, high: int, kind: str) -> Problem:
    a, b = random.randint(low, high), random.randint(low, high)
    phrase = random.choice(("What is {} + {}?", "What is {} plus {}?", "{} + {} ="))
    return Problem(kind, phrase.format(a, b), str(a + b), (fact("+", a, b),))


def _subtraction(random: Random, low: int, high: int, kind: str) -> Problem:
    a, b = random.randint(low, high), random.randint(low, high)
    phrase = random.choice(("What is {} - {}?", "What is {} minus {}?", "{} - {} ="))
    return Problem(kind, phrase.format(a, b), str(a - b), (fact("-", a, b),))


def _comparison(random: Random) -> Problem:
    high = random.choice((99, 999))
    a, b = random.sample(range(high + 1), 2)
    larger = random.random() < 0.5
    question = f"Which is {'larger' if larger else 'smaller'}, {a} or {b}?"
    return Problem("comparison", question, str(max(a, b) if larger else min(a, b)), (fact("<", a, b),))


def word_problem(random: Random) -> Problem:
    """Two steps, with the working shown and the result after ``####``, as in GSM8K."""
    name, other = random.sample(NAMES, 2)
    thing = random.choice(THINGS)
    a, b = random.randint(10, 60), random.randint(2, 30)
    c = random.randint(2, a + b - 1)
    verb = random.choice(("buys", "finds", "gets"))
    question = f"{name} has {a} {thing}. {name} {verb} {b} more and gives {c} to {other}. How many {thing} are left?"
    answer = f"{a} + {b} = {a + b}\n{a + b} - {c} = {a + b - c}\n#### {a + b - c}"
    return Problem("word problem", question, answer, (fact("+", a, b), fact("-", a + b, c)))


KINDS: tuple[tuple[float, Callable[[Random], Problem]], ...] = (
    (5, lambda random: _addition(random, 0, 99, "two-digit addition")),
    (2, lambda random: _addition(random, 100, 999, "three-digit addition")),
    (3, lambda random: _subtraction(random, 0, 99, "two-digit subtraction")),
    (1, lambda random: _subtraction(random, 100, 999, "three-digit subtraction")),
    (1, _comparison),
    (1, word_problem),
)


def draw(random: Random, held_out: bool = False, kind: Callable[[Random], Problem] | None = None) -> Problem:
    """A problem of a random kind (or of ``kind``), with a held-out fact or with none."""
    while True:
        make = kind or random.choices([make for _, make in KINDS], [weight for weight, _ in KINDS])[0]
        problem = make(random)
        if problem.held_out == held_out:
            return problem
