"""The Python front door: ``LLM(model, tp=2).generate(["..."])``. Text in, text out, over planned ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from narrows.engine.config import EngineConfig, Resolved, resolve
from narrows.engine.core import Engine
from narrows.engine.model_text import load_model_text
from narrows.engine.program import Wrap
from narrows.engine.worker import Worker
from narrows.errors import ConfigError
from narrows.ranks.start_clock import StartClock
from narrows.sched.sampling import GREEDY, Logprobs, SamplingParams, TokenScore
from narrows.sched.scheduler import Request
from narrows.text import GeneratedText, GenerationConfig, Tokenizer

__all__ = ["LLM", "Completion", "Piece", "Prompt"]

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""Text, token ids, or chat messages (``{"role": ..., "content": ...}``) for the model's chat template."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """The result of a prompt.

    ``finish_reason``: ``stop`` at an end-of-sequence token or stop string, also at the last token allowed, else
    ``length``. ``token_ids`` are all that were generated, those of a stop string or end included. ``logprobs`` has one
    entry per token if sampling requests them: the token's log-probability, and the best (id, log-probability).
    ``prompt_logprobs`` has one per token of the prompt from the second on, if sampling requests them.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_token_ids: tuple[int, ...]
    finish_reason: str
    logprobs: tuple[Logprobs, ...] = ()
    prompt_logprobs: tuple[TokenScore, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Newly generated text of prompt ``index``; ``done`` carries the completion with the last piece."""

    index: int
    text: str
    done: Completion | None = None


class LLM:
    """A model loaded on ``dp x tp`` ranks of this process.

    Args:
        model: a checkpoint folder, a built-in one's name, or a ``.gguf`` file.
        options: the other fields of :class:`EngineConfig` (``dp``, ``tp``, ``layout``, ``dtype``, ...).
        wrap: put around every bound op of every rank (profiling).
        clock: gets the phases of the start.

    Raises:
        ConfigError: an impossible option; the message has the reason and the alternative.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        wrap: Callable[[Worker], Wrap] | None = None,
        clock: StartClock | None = None,
        **options: Any,
    ) -> None:
        unknown = sorted(set(options) - set(EngineConfig.__dataclass_fields__))
        if unknown:
            known = ", ".join(sorted(set(EngineConfig.__dataclass_fields__) - {"model"}))
            raise ConfigError(f"LLM does not know the option {unknown[0]!r}; options: {known}")
        self.resolved: Resolved = resolve(EngineConfig(model=str(model), **options))
        if clock is not None:
            clock.end("config, memory and plan")
        text = load_model_text(self.resolved.engine_config.model)
        if clock is not None:
            clock.end("tokenizer")
        self.tokenizer: Tokenizer | None = text.tokenizer
        self.generation: GenerationConfig = text.generation
        self._lack = text.lack
        self.engine = Engine(self.resolved, wrap=wrap, clock=clock)
        self._streaming = False

    def generate(self, prompts: Sequence[Prompt], **options: Any) -> list[Completion]:
        """Completions of all prompts, in their order; ``options`` as in :meth:`stream`."""
        done: dict[int, Completion] = {}
        for piece in self.stream(prompts, **options):
            if piece.done is not None:
                done[piece.index] = piece.done
        return [done[index] for index in range(len(prompts))]

    def score(self, prompts: Sequence[Prompt], *, num_best: int = 0) -> list[Completion]:
        """Log-probabilities of the prompts' own tokens; nothing is generated.

        Returns, per prompt, a completion without text whose ``prompt_logprobs`` hold a :class:`TokenScore` for every
        token from the second on, each with the ``num_best`` most likely tokens at its position.
        Memory: the logits of a step's rows are never more than 64 MB per copy, however long the prompts.

        Raises:
            ConfigError: a prompt that cannot run (it may fill the whole context), ``num_best`` out of range.
        """
        return self.generate(prompts, max_tokens=0, sampling=replace(GREEDY, prompt_logprobs=num_best))

    def stream(
        self,
        prompts: Sequence[Prompt],
        *,
        max_tokens: int = 128,
        sampling: SamplingParams | None = None,
        stop: Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        ignore_eos: bool = False,
    ) -> Iterator[Piece]:
        """Text piece by piece as it comes; pieces of different prompts are mixed.

        Args:
            max_tokens: most tokens per prompt; 0, with ``sampling.prompt_logprobs``, scores prompts and ends.
            sampling: how tokens are chosen; None: :attr:`default_sampling`.
            stop: strings that end a text and are not part of it.
            stop_token_ids: ids that end a text as the end-of-sequence token does.
            ignore_eos: go on past the end-of-sequence token.

        Raises:
            ConfigError: a prompt that cannot run, stop strings without a tokenizer, a stream that is not over yet.
        """
        if isinstance(prompts, str):
            raise ConfigError(f"prompts is one text of {len(prompts)} characters; give a list of prompts: [text]")
        if self._streaming:
            raise ConfigError("another stream of this LLM is still open: read it to its end, or close() it, first")
        if stop and self.tokenizer is None:
            raise ConfigError(f"{self.resolved.config.name} has no tokenizer.json, so stop strings cannot be found")
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        sampling = self.default_sampling if sampling is None else sampling
        end_ids = frozenset(stop_token_ids) | (frozenset() if ignore_eos else self.eos_ids)
        text = GeneratedText(self.tokenizer, stop=stop, end_ids=end_ids)
        texts = [text.another() for _ in prompts]
        encoded = [self.encode(prompt) for prompt in prompts]
        requests: list[Request] = []
        self._streaming = True
        try:
            for ids in encoded:
                requests.append(self.engine.add(ids, max_tokens, end_ids, sampling))
            index_of = {request.id: index for index, request in enumerate(requests)}
            for request in self.engine.run():
                index = index_of[request.id]
                new = texts[index].push(request.output[-1]) if request.output else ""
                if texts[index].stopped and not request.finish_reason:
                    self.engine.scheduler.abort(request, "stop")
                if not request.finish_reason:
                    yield Piece(index=index, text=new)
                    continue
                new += texts[index].finish()
                yield Piece(index=index, text=new, done=_completion(request, texts[index]))
        finally:
            self._streaming = False
            for request in requests:
                if not request.finish_reason:
                    self.engine.scheduler.abort(request)

    @property
    def default_sampling(self) -> SamplingParams:
        """The sampling of the checkpoint's generation config, by transformers' rule: greedy unless ``do_sample``."""
        return SamplingParams(**self.generation.sampling(samples_by_default=False))  # type: ignore[arg-type]

    @property
    def eos_ids(self) -> frozenset[int]:
        """The tokens that end a text, as the checkpoint says."""
        more = self.tokenizer.eos_ids if self.tokenizer else frozenset()
        return more | {*self.resolved.config.eos_token_id, *self.generation.eos_token_id}

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """The token ids of a prompt.

        Raises:
            ConfigError: text or messages for a model without a tokenizer or without a chat template.
        """
        if not isinstance(prompt, str) and all(isinstance(token, int) for token in prompt):
            return tuple(prompt)  # type: ignore[arg-type]
        if self.tokenizer is None:
            raise ConfigError(f"{self._lack}; or give prompts as token ids")
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
        self.engine.__exit__(kind, error, trace)


def _completion(request: Request, text: GeneratedText) -> Completion:
    return Completion(
        text=text.text,
        token_ids=tuple(request.output),
        prompt_token_ids=request.prompt,
        finish_reason="stop" if text.stopped else request.finish_reason,
        logprobs=tuple(request.logprobs),
        prompt_logprobs=tuple(request.prompt_logprobs),
    )
