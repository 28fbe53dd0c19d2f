"""The tasks: items made into token ids once, put to an engine batched or one at a time, and judged.

Generation is greedy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from narrows.engine.llm import LLM, Completion
from narrows.errors import ConfigError
from narrows.evaluate.answers import GSM8K_STOP, flexible_number, gsm8k_prompt, same_number, strict_number
from narrows.evaluate.batches import TEXT_TOKENS
from narrows.evaluate.compare import Outcome
from narrows.evaluate.items import read_choices, read_questions, read_text
from narrows.sched.sampling import GREEDY
from narrows.text import Tokenizer

__all__ = ["FILES", "Setting", "Task", "make_task", "spread"]

FILES = {
    "perplexity": "heldout.txt",
    "arithmetic": "arithmetic.jsonl",
    "choices": "choices.jsonl",
    "gsm8k": "gsm8k.jsonl",
}
"""The tasks by name, each with its file in the model folder's ``eval``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How tasks are made. ``limit``: items at most, spread over the file; ``window``, ``stride``: of perplexity, in
    tokens (0: half the context, at most 512; half the window); ``shots``: worked examples of gsm8k, from its file's
    first lines; ``chat``: they are earlier turns of a chat, in place of one text."""

    limit: int | None = None
    window: int = 0
    stride: int = 0
    shots: int = 5
    chat: bool = False
    arithmetic_tokens: int = 32
    gsm8k_tokens: int = 256


class Task(Protocol):
    """One task's items, ready to be run on any engine of the model whose tokenizer made them."""

    @property
    def name(self) -> str: ...

    def __len__(self) -> int: ...

    def run(self, llm: LLM, items: Sequence[int], *, alone: bool) -> list[Outcome]:
        """The outcomes of ``items``: all at once, or, ``alone``, each when the one before is done."""
        ...

    def texts(self) -> list[tuple[int, ...]]:
        """Token ids of the task for the comparison of distributions."""
        ...


def make_task(name: str, file: Path, tokenizer: Tokenizer, max_context: int, setting: Setting) -> Task:
    """The task ``name`` over ``file``.

    Raises:
        ConfigError: no such task, a file that is not there or not as it should be, an item longer than the context.
    """
    if name == "perplexity":
        return Perplexity(file, tokenizer, max_context, setting)
    if name == "choices":
        return MultipleChoice(file, tokenizer, max_context, setting)
    if name == "arithmetic":
        return _arithmetic(file, tokenizer, max_context, setting)
    if name == "gsm8k":
        return _gsm8k(file, tokenizer, max_context, setting)
    raise ConfigError(f"task {name!r} is not known; tasks: {', '.join(FILES)}")


def spread(count: int, limit: int | None) -> list[int]:
    """At most ``limit`` of ``count`` items, evenly spread, so that a sorted file still gives some of each.

    >>> spread(10, 4), spread(3, 5)
    ([0, 2, 5, 7], [0, 1, 2])
    """
    taken = count if limit is None else min(count, limit)
    return [i * count // taken for i in range(taken)]


def _each(
    call: Callable[[Sequence[tuple[int, ...]]], list[Completion]], prompts: Sequence[tuple[int, ...]], alone: bool
) -> list[Completion]:
    return [call([prompt])[0] for prompt in prompts] if alone else call(prompts)


def _check_length(what: str, tokens: int, more: int, max_context: int, way_out: str) -> None:
    if tokens + more > max_context:
        raise ConfigError(
            f"{what} has {tokens} tokens, with {more} for the answer that is more than the context of {max_context}; "
            f"raise --max-context{way_out}"
        )


class Perplexity:
    """Held-out text in overlapping windows: every token but the first is scored once, by the tokens of its window."""

    name = "perplexity"

    def __init__(self, file: Path, tokenizer: Tokenizer, max_context: int, setting: Setting) -> None:
        self.window = setting.window or min(max_context, max(2, max_context // 2), 512)
        self.stride = setting.stride or max(1, self.window // 2)
        if not 2 <= self.window <= max_context:
            raise ConfigError(
                f"--window is {self.window}; it must be between 2 and the context of {max_context} tokens"
            )
        if not 1 <= self.stride < self.window:
            raise ConfigError(
                f"--stride is {self.stride}; it must be between 1 and {self.window - 1}, inside the window"
            )
        ids = tuple(tokenizer.encode(read_text(file)))
        if len(ids) < 2:
            raise ConfigError(f"{file} has {len(ids)} token(s); perplexity needs at least 2")
        self._windows: list[tuple[tuple[int, ...], int]] = []  # its tokens, and how many of the last are scored
        scored = 1
        while scored < len(ids):
            stop = min(self.window if not self._windows else scored + self.stride, len(ids))
            self._windows.append((ids[max(0, stop - self.window) : stop], stop - scored))
            scored = stop
        self._windows = [self._windows[i] for i in spread(len(self._windows), setting.limit)]
        texts = [tokenizer.decode(w[-count:], skip_special_tokens=False) for w, count in self._windows]
        self._sizes = [(len(text.encode()), len(text.split())) for text in texts]

    def __len__(self) -> int:
        return len(self._windows)

    def run(self, llm: LLM, items: Sequence[int], *, alone: bool) -> list[Outcome]:
        """Log-probabilities of the tokens that each window scores."""
        done = _each(llm.score, [self._windows[i][0] for i in items], alone)
        outcomes = []
        for i, completion in zip(items, done, strict=True):
            num_bytes, num_words = self._sizes[i]
            logprobs = tuple(score.logprob for score in completion.prompt_logprobs[-self._windows[i][1] :])
            outcomes.append(Outcome(logprobs=logprobs, num_bytes=num_bytes, num_words=num_words))
        return outcomes

    def texts(self) -> list[tuple[int, ...]]:
        """The first piece of every window, then the second of each, and so on."""
        starts = range(0, self.window, TEXT_TOKENS)
        return [ids[at : at + TEXT_TOKENS] for at in starts for ids, _ in self._windows if at < len(ids)]


class MultipleChoice:
    """Which ending does the model find most likely: by log-probability (``acc``), or per character (``acc_norm``)."""

    name = "choices"

    def __init__(self, file: Path, tokenizer: Tokenizer, max_context: int, setting: Setting) -> None:
        items = read_choices(file)
        self._items = [items[i] for i in spread(len(items), setting.limit)]
        self._prompts: list[list[tuple[tuple[int, ...], int]]] = []  # per ending: all its tokens, how many are its own
        for item in self._items:
            context = len(tokenizer.encode(item.ctx))
            endings = []
            for ending in item.endings:
                ids = tuple(tokenizer.encode(f"{item.ctx} {ending}"))
                _check_length(f"{file}, line {item.line}", len(ids), 0, max_context, "")
                # Where the tokenizer joins both across the space, the ending has its last token at least.
                endings.append((ids, max(len(ids) - max(context, 1), 1)))
            self._prompts.append(endings)

    def __len__(self) -> int:
        return len(self._items)

    def run(self, llm: LLM, items: Sequence[int], *, alone: bool) -> list[Outcome]:
        """The sum of log-probabilities of every ending's tokens, and the choice by it."""
        done = iter(_each(llm.score, [ids for i in items for ids, _ in self._prompts[i]], alone))
        outcomes = []
        for i in items:
            item = self._items[i]
            sums = tuple(
                math.fsum(score.logprob for score in next(done).prompt_logprobs[-count:])
                for _, count in self._prompts[i]
            )
            per_character = [total / len(ending) for total, ending in zip(sums, item.endings, strict=True)]
            chosen = sums.index(max(sums)), per_character.index(max(per_character))
            right = {"acc": chosen[0] == item.label, "acc_norm": chosen[1] == item.label}
            outcomes.append(Outcome(right=right, answer=chosen))
        return outcomes

    def texts(self) -> list[tuple[int, ...]]:
        """Every context with its right ending."""
        return [endings[item.label][0] for item, endings in zip(self._items, self._prompts, strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """Questions that are answered in text, greedily."""

    name: str
    prompts: tuple[tuple[int, ...], ...]
    kinds: tuple[str, ...]
    judges: tuple[Callable[[str], dict[str, bool]], ...]
    max_tokens: int
    stop: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.prompts)

    def run(self, llm: LLM, items: Sequence[int], *, alone: bool) -> list[Outcome]:
        """The tokens of each answer, and whether it is right."""

        def generate(prompts: Sequence[tuple[int, ...]]) -> list[Completion]:
            return llm.generate(prompts, max_tokens=self.max_tokens, sampling=GREEDY, stop=self.stop)

        done = _each(generate, [self.prompts[i] for i in items], alone)
        return [
            Outcome(kind=self.kinds[i], right=self.judges[i](completion.text), answer=completion.token_ids)
            for i, completion in zip(items, done, strict=True)
        ]

    def texts(self) -> list[tuple[int, ...]]:
        """The prompts."""
        return list(self.prompts)


def _arithmetic(file: Path, tokenizer: Tokenizer, max_context: int, setting: Setting) -> Generation:
    """Each question through the chat template; right if the text is the answer, blanks at its ends aside."""
    questions = read_questions(file)
    questions = [questions[i] for i in spread(len(questions), setting.limit)]

    def judge(answer: str) -> Callable[[str], dict[str, bool]]:
        return lambda text: {"exact": text.strip() == answer.strip()}

    prompts = [tokenizer.encode_chat([{"role": "user", "content": q.question}]) for q in questions]
    for question, prompt in zip(questions, prompts, strict=True):
        _check_length(f"{file}, line {question.line}", len(prompt), setting.arithmetic_tokens, max_context, "")
    return Generation(
        name="arithmetic",
        prompts=_tuples(prompts),
        kinds=tuple(q.kind for q in questions),
        judges=tuple(judge(q.answer) for q in questions),
        max_tokens=setting.arithmetic_tokens,
    )


def _gsm8k(file: Path, tokenizer: Tokenizer, max_context: int, setting: Setting) -> Generation:
    """The file's first lines as worked examples, then each other question; ``strict`` wants ``####``."""
    questions = read_questions(file)
    shots = [(q.question, q.answer) for q in questions[: setting.shots]]
    if len(questions) <= setting.shots:
        raise ConfigError(
            f"{file} has {len(questions)} lines, of which --shots {setting.shots} are worked examples: none is left "
            "to ask; lower --shots"
        )
    scored = questions[setting.shots :]
    scored = [scored[i] for i in spread(len(scored), setting.limit)]
    for question in scored:
        if strict_number(question.answer) is None:
            raise ConfigError(f"{file}, line {question.line}: the answer does not end in '#### number'")

    def judge(answer: str) -> Callable[[str], dict[str, bool]]:
        wanted = strict_number(answer)
        return lambda text: {
            "strict": same_number(strict_number(text), wanted),
            "flexible": same_number(flexible_number(text), wanted),
        }

    turns = [
        {"role": role, "content": text}
        for shot in shots
        for role, text in zip(("user", "assistant"), shot, strict=True)
    ]
    prompts = [
        tokenizer.encode_chat([*turns, {"role": "user", "content": q.question}])
        if setting.chat
        else tokenizer.encode(gsm8k_prompt(shots, q.question))
        for q in scored
    ]
    for question, prompt in zip(scored, prompts, strict=True):
        what = f"{file}, line {question.line}, after {setting.shots} worked examples"
        _check_length(what, len(prompt), setting.gsm8k_tokens, max_context, " or lower --shots")
    return Generation(
        name="gsm8k",
        prompts=_tuples(prompts),
        kinds=tuple(q.kind for q in scored),
        judges=tuple(judge(q.answer) for q in scored),
        max_tokens=setting.gsm8k_tokens,
        stop=GSM8K_STOP,
    )


def _tuples(prompts: Iterable[Iterable[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(prompt) for prompt in prompts)
