"""The Python front door: ``LLM(model, tp=2).generate(["..."])``. Text in, text out, over planned ranks.

Knows tokenizers and the engine; not batches, plans or ranks beyond their numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from narrows.engine.config import EngineConfig, Resolved, resolve
from narrows.engine.core import Engine
from narrows.engine.program import Wrap
from narrows.engine.worker import Worker
from narrows.errors import ConfigError
from narrows.text import TextStream, Tokenizer

__all__ = ["LLM", "Completion", "Piece", "Prompt"]

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""Text as it is, token ids, or chat messages (``{"role": ..., "content": ...}``) for the model's chat template."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What a prompt got. ``finish_reason``: ``stop`` at an end-of-sequence token, ``length`` at the token limit."""

    text: str
    token_ids: tuple[int, ...]
    prompt_token_ids: tuple[int, ...]
    finish_reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Newly generated text of prompt ``index``; ``done`` carries the completion with the last piece."""

    index: int
    text: str
    done: Completion | None = None


class LLM:
    """A model loaded on ``dp x tp`` ranks of this process.

    Args:
        model: a checkpoint folder.
        options: the other fields of :class:`EngineConfig` (``dp``, ``tp``, ``layout``, ``dtype``, ...).
        wrap: put around every bound step of every rank (profiling).

    Raises:
        ConfigError: anything that cannot be; the message says why and what would work.
    """

    def __init__(self, model: str | Path, *, wrap: Callable[[Worker], Wrap] | None = None, **options: Any) -> None:
        unknown = sorted(set(options) - set(EngineConfig.__dataclass_fields__))
        if unknown:
            known = ", ".join(sorted(set(EngineConfig.__dataclass_fields__) - {"model"}))
            raise ConfigError(f"LLM does not know the option {unknown[0]!r}; options: {known}")
        self.resolved: Resolved = resolve(EngineConfig(model=str(model), **options))
        folder = Path(model)
        has_text = folder.is_dir() and (folder / "tokenizer.json").is_file()
        self.tokenizer: Tokenizer | None = Tokenizer.from_folder(folder) if has_text else None
        self.engine = Engine(self.resolved, wrap=wrap)

    def generate(
        self, prompts: Sequence[Prompt], *, max_tokens: int = 128, ignore_eos: bool = False
    ) -> list[Completion]:
        """Greedy completions of all prompts, in their order."""
        done: dict[int, Completion] = {}
        for piece in self.stream(prompts, max_tokens=max_tokens, ignore_eos=ignore_eos):
            if piece.done is not None:
                done[piece.index] = piece.done
        return [done[index] for index in range(len(prompts))]

    def stream(self, prompts: Sequence[Prompt], *, max_tokens: int = 128, ignore_eos: bool = False) -> Iterator[Piece]:
        """The same, piece by piece as text comes; pieces of different prompts are mixed."""
        tokenizer = self.tokenizer
        eos_ids = frozenset(self.resolved.config.eos_token_id) | (tokenizer.eos_ids if tokenizer else frozenset())
        encoded = [self.encode(prompt) for prompt in prompts]
        requests = [self.engine.add(ids, max_tokens, frozenset() if ignore_eos else eos_ids) for ids in encoded]
        index_of = {request.id: index for index, request in enumerate(requests)}
        streams = [TextStream(tokenizer) if tokenizer else None for _ in requests]
        try:
            for request in self.engine.run():
                index = index_of[request.id]
                stream, last = streams[index], request.output[-1]
                text = stream.push(last) if stream and last not in request.eos_ids else ""
                if not request.finish_reason:
                    yield Piece(index=index, text=text)
                    continue
                text += stream.finish() if stream else ""
                token_ids = tuple(request.output)
                shown = [token for token in token_ids if token not in request.eos_ids]
                completion = Completion(
                    text=tokenizer.decode(shown) if tokenizer else "",
                    token_ids=token_ids,
                    prompt_token_ids=request.prompt,
                    finish_reason=request.finish_reason,
                )
                yield Piece(index=index, text=text, done=completion)
        finally:
            for request in requests:
                if not request.finish_reason:
                    self.engine.scheduler.abort(request)

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """The token ids of a prompt.

        Raises:
            ConfigError: text or messages for a model without a tokenizer or without a chat template.
        """
        if not isinstance(prompt, str) and all(isinstance(token, int) for token in prompt):
            return tuple(prompt)  # type: ignore[arg-type]
        if self.tokenizer is None:
            raise ConfigError(f"{self.resolved.config.name} has no tokenizer.json; give prompts as token ids")
        if isinstance(prompt, str):
            return tuple(self.tokenizer.encode(prompt))
        return tuple(self.tokenizer.encode_chat(prompt))  # type: ignore[arg-type]

    def close(self) -> None:
        """End the ranks."""
        self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
