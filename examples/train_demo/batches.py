"""Batches of tokens: pages of text, and conversations of arithmetic in which only the answers are learned.

Knows the tokenizer and the sources. Knows nothing of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import numpy as np
import torch
from problems import draw
from tokenizers import Tokenizer
from torch import Tensor
from vocabulary import ASSISTANT, BOS, EOS, USER

TOKENS = 4096
"""Tokens of one step, in sequences of the given length."""

IGNORED = -100


class Batches:
    """Draws batches of [TOKENS / length, length] ids and labels; the same ones for the same step number."""

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._bos, self._eos, self._user, self._assistant = map(tokenizer.token_to_id, (BOS, EOS, USER, ASSISTANT))
        encoded = tokenizer.encode_batch(list(texts))
        self._text = np.concatenate([np.array([*piece.ids, self._eos], dtype=np.uint16) for piece in encoded])

    @property
    def text_tokens(self) -> int:
        """Tokens of training text."""
        return len(self._text)

    def draw(self, step: int, length: int, arithmetic: float) -> tuple[Tensor, Tensor]:
        """The batch of one step; each sequence is arithmetic with the given probability."""
        random = Random(f"batch {step}")
        pairs = [
            self._problems(random, length) if random.random() < arithmetic else self._page(random, length)
            for _ in range(TOKENS // length)
        ]
        ids, labels = zip(*pairs, strict=True)
        return torch.tensor(ids), torch.tensor(labels)

    def _page(self, random: Random, length: int) -> tuple[list[int], list[int]]:
        start = random.randrange(len(self._text) - length)
        ids = self._text[start : start + length].tolist()
        return ids, ids

    def _problems(self, random: Random, length: int) -> tuple[list[int], list[int]]:
        """Conversations one after the other; a few in the plain form that few-shot prompts have."""
        ids: list[int] = []
        labels: list[int] = []
        plain = random.random() < 0.15
        while len(ids) < length:
            problem = draw(random)
            first = not ids or random.random() < 0.8
            if plain:
                question, answer = self._plain_turn(problem.question, problem.answer, first=not ids)
            else:
                question = [self._bos] * first + [self._user, *self._encode(problem.question), self._assistant]
                answer = [*self._encode(problem.answer), self._eos]
            ids += question + answer
            labels += [IGNORED] * len(question) + answer
        return ids[:length], labels[:length]

    def _plain_turn(self, question: str, answer: str, *, first: bool) -> tuple[list[int], list[int]]:
        return [self._bos] * first + self._encode(f"Question: {question}\nAnswer:"), self._encode(f" {answer}\n\n")

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids
