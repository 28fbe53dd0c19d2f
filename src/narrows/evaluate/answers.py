"""Prompts of the field's usual tasks, and the answer in a generated text. Text in, text out.

GSM8K (Cobbe et al., 2021) ends a solution in ``#### number``; HellaSwag (Zellers et al., 2019) marks where a how-to's
step begins in brackets.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

__all__ = [
    "GSM8K_STOP",
    "flexible_number",
    "gsm8k_prompt",
    "hellaswag_text",
    "same_number",
    "strict_number",
]

GSM8K_STOP = ("Question:",)
"""Where the answer ends if the model continues with a next question."""

_STRICT = re.compile(r"####\s*\$?\s*(-?[\d.,]+)")
_ANY_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")


def gsm8k_prompt(shots: Sequence[tuple[str, str]], question: str) -> str:
    """``Question: ...`` and ``Answer: ...`` of the worked examples, a blank line between, then the question.

    >>> gsm8k_prompt([("1 + 1?", "Two. #### 2")], "2 + 3?")
    'Question: 1 + 1?\\nAnswer: Two. #### 2\\n\\nQuestion: 2 + 3?\\nAnswer:'
    """
    worked = [f"Question: {question}\nAnswer: {answer}" for question, answer in shots]
    return "\n\n".join([*worked, f"Question: {question}\nAnswer:"])


def strict_number(text: str) -> str | None:
    """The number after the first ``####``; None if there is none.

    >>> strict_number("so 6 * 7 = 42.\\n#### $1,042."), strict_number("it is 42")
    ('1042', None)
    """
    found = _STRICT.search(text)
    return _plain(found.group(1)) if found else None


def flexible_number(text: str) -> str | None:
    """The last number of the text, whatever surrounds it; None if it has none.

    >>> flexible_number("6 apples cost $1,042.50."), flexible_number("I do not know")
    ('1042.50', None)
    """
    found = _ANY_NUMBER.findall(text)
    return _plain(found[-1]) if found else None


def _plain(number: str) -> str | None:
    """Without thousands separators, currency and the full stop of the sentence; None if no digit is left."""
    number = number.replace(",", "").replace("$", "").rstrip(".")
    return number if any(c.isdigit() for c in number) else None


def same_number(first: str | None, second: str | None) -> bool:
    """Whether both are the same number, however written.

    >>> same_number("42", "42.0"), same_number("42", "-42"), same_number(None, None)
    (True, False, False)
    """
    if first is None or second is None:
        return False
    try:
        return Decimal(first) == Decimal(second)
    except InvalidOperation:
        return first == second


def hellaswag_text(text: str) -> str:
    """A context or an ending without its bracketed marks, ``[title]`` as the end of a sentence.

    >>> hellaswag_text("[header] How to sit [title] Find a chair. [step] Look  around.")
    'How to sit. Find a chair. Look around.'
    """
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r" {2,}", " ", re.sub(r"\[.*?\]", "", text)).strip()
