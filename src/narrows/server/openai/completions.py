"""``/v1/completions``: prompts as text or token ids to texts, echoed and scored on request."""

from __future__ import annotations

from array import array
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag
from starlette.requests import Request
from starlette.responses import Response

from narrows.api import Generation, Update
from narrows.sched.sampling import TokenScore
from narrows.server.generation import Job, RunningRequest, respond
from narrows.server.http.body import Body
from narrows.server.http.errors import invalid
from narrows.server.output import Count, LogprobColumns
from narrows.server.request import AnswerOptions, ParsedRequest, RequestReader, new_id, now, truncated
from narrows.server.schema.common import MAX_IDS, AtMost, GenerationFields, Text, TokenId, TopLogprobs
from narrows.server.state import ServerState
from narrows.server.structured_output.constraints import Constraint, requested_grammar
from narrows.server.structured_output.guide import GrammarGuide
from narrows.text import GeneratedText, TokenOffsets

__all__ = ["CompletionRequest", "PromptIds", "begin", "completions", "read"]

MAX_PROMPTS = 1024

PromptIds = Annotated[list[TokenId], AtMost(MAX_IDS, "token ids of a prompt", least=1)]


def _kind(prompt: Any) -> str | None:
    """The type of a prompt. A list's first item decides, so that errors name what the others should be."""
    if isinstance(prompt, str):
        return "text"
    if not isinstance(prompt, list):
        return None
    first = prompt[0] if prompt else 0
    return "texts" if isinstance(first, str) else "lists of ids" if isinstance(first, list) else "ids"


class CompletionRequest(GenerationFields):
    """A prompt to continue, or several; as text or as token ids."""

    prompt: Annotated[
        Annotated[Text, Tag("text")]
        | Annotated[PromptIds, Tag("ids")]
        | Annotated[list[Text], AtMost(MAX_PROMPTS, "prompts"), Tag("texts")]
        | Annotated[list[PromptIds], AtMost(MAX_PROMPTS, "prompts"), Tag("lists of ids")],
        Discriminator(
            _kind, custom_error_type="wrong_type", custom_error_message="must be a text, token ids, or a list of either"
        ),
    ]
    echo: bool | None = Field(default=None, description="begin the text with the prompt")
    logprobs: TopLogprobs | None = Field(default=None, description="that many of the best tokens, and the chosen one")
    add_special_tokens: bool | None = Field(
        default=None, description="whether text is encoded with bos; true if absent"
    )
    return_tokens_as_token_ids: bool | None = Field(default=None, description="write tokens as token_id:123")
    best_of: int | None = Field(default=None, ge=1, description="must equal n")

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one."""
        prompt: Any = self.prompt
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            return [prompt]
        return list(prompt)


_DEFAULT_TOKENS = 16
"""OpenAI's default of ``max_tokens`` in this API."""


async def completions(state: ServerState, body: Body[CompletionRequest], request: Request) -> Response:
    """The text that follows a prompt."""
    job = await body.begin(begin, read)
    return await respond(state, request, job, "prompt", stream=_stream, whole=_whole)


@dataclass(frozen=True, slots=True, kw_only=True)
class _ParsedCompletion(ParsedRequest):
    """A parsed request. ``texts``: prompts as written; None: sent as ids, or truncated. ``runs``: it needs the backend.

    ``adds_special``: tokens were added around a text; ``as_ids``: tokens are named by their ids.
    """

    texts: tuple[str | None, ...]
    echoes: bool
    runs: bool
    adds_special: bool
    as_ids: bool


def read(reader: RequestReader, body: CompletionRequest) -> _ParsedCompletion:
    """The parsed request.

    Raises:
        ApiError: 400, naming the field; 404, another model.
    """
    name = reader.check_model(body.model)
    _check(body)
    reader.check_amount(len(body.prompts), body.num_choices)
    prompts: list[array[int]] = []
    rooms: list[int] = []
    for prompt in body.prompts:  # the first one that is too long is the last one that is read
        prompts.append(array("I", _encode(reader, body, prompt)))
        rooms.append(reader.max_tokens(body.most_tokens, body.min_tokens, _DEFAULT_TOKENS, len(prompts[-1]), "prompt"))
    max_tokens = min(rooms)
    form = requested_grammar(body)
    scored = body.logprobs if body.echo else None
    whole = body.truncate_prompt_tokens is None
    return _ParsedCompletion(
        options=AnswerOptions.of(body, logprobs=body.logprobs),
        head={"id": new_id("cmpl"), "object": "text_completion", "created": now(), "model": name},
        prompts=tuple(prompts),
        max_tokens=max_tokens,
        end_ids=reader.end_ids(body),
        sampling=reader.sampling(body, logprobs=body.logprobs, prompt_logprobs=scored),
        allowed=reader.allowed(body),
        constraint=Constraint(forms=(form[0],), param=form[1]) if form and max_tokens else None,
        texts=tuple(text if isinstance(text, str) and whole and body.echo else None for text in body.prompts),
        echoes=bool(body.echo),
        runs=bool(max_tokens) or scored is not None,
        adds_special=whole and body.add_special_tokens is not False,
        as_ids=bool(body.return_tokens_as_token_ids),
    )


def begin(reader: RequestReader, parsed: _ParsedCompletion) -> _Job:
    """Its job: choices and generations before the first token."""
    options = parsed.options
    choices: list[_Choice] = []
    generations: list[Generation] = []
    generated = GeneratedText(
        reader.model.tokenizer,
        stop=options.stops,
        keep_stop=options.keeps_stop,
        end_ids=parsed.end_ids,
        skip_special_tokens=options.skips_special,
    )
    for at, ids in enumerate(parsed.prompts):
        prompt = tuple(ids)
        for choice in range(options.num_choices):
            choices.append(_Choice(reader, parsed, len(choices), at, prompt, generated.another()))
            generations.append(parsed.generation(prompt, choice))
    total = sum(map(len, parsed.prompts))
    return Job(options, parsed.head, total, choices, generations if parsed.runs else [], parsed.constraint)


def _check(body: CompletionRequest) -> None:
    if body.best_of is not None and body.best_of != body.num_choices:
        raise invalid(f"best_of is {body.best_of}; it must equal n, which is {body.num_choices}", "best_of")
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options goes with stream: true only", "stream_options")


def _encode(reader: RequestReader, body: CompletionRequest, prompt: str | list[int]) -> tuple[int, ...]:
    if isinstance(prompt, str):
        special, cut = body.add_special_tokens is not False, body.truncate_prompt_tokens is not None
        prompt = list(reader.encode(prompt, "prompt", add_special_tokens=special, cut=cut))
    if not prompt:
        raise invalid("prompt is empty: at least one token is needed", "prompt")
    reader.check_token_ids(prompt, "prompt")
    return truncated(reader, body, tuple(prompt), "prompt")


class _Choice:
    """One text that is being generated."""

    def __init__(
        self,
        reader: RequestReader,
        parsed: _ParsedCompletion,
        index: int,
        prompt_index: int,
        prompt: tuple[int, ...],
        generated: GeneratedText,
    ) -> None:
        self.index = index
        self.count = Count(prompt_index)
        self.finish_reason: str | None = None
        self._prompt = prompt
        self.guide: GrammarGuide | None = None
        tokenizer = reader.model.tokenizer
        skips, echoed = parsed.options.skips_special, parsed.texts[prompt_index]
        self._text = generated
        self._columns: LogprobColumns | None = None
        if parsed.options.logprobs is not None:
            self._columns = LogprobColumns(tokenizer, num_best=parsed.options.logprobs, as_ids=parsed.as_ids)
        adds = tokenizer is not None and echoed is not None and parsed.adds_special
        self._added = tokenizer.added_around if tokenizer is not None and adds else (0, 0)
        self._prompt_offsets = TokenOffsets(tokenizer, skip_special_tokens=skips, text=echoed)
        before = ""
        if parsed.echoes and echoed is not None:
            before = echoed
        elif parsed.echoes and tokenizer is not None:
            before = tokenizer.decode(prompt, skip_special_tokens=skips)
        self._pieces = [before]  # the new part of the text
        self._num_scored = 0  # of the prompt's tokens
        if parsed.echoes and self._columns is not None:
            self._add_prompt((None,))  # the first token has none before it
        self._offsets = TokenOffsets(tokenizer, start=len(before), skip_special_tokens=skips, left_out=parsed.end_ids)

    def take(self, update: Update) -> bool:
        """Take an update in; whether a stop string has completed the text."""
        if self.finish_reason is not None:
            return False  # came before the backend knew
        if update.prompt_logprobs:
            self._add_prompt(update.prompt_logprobs)
        self.count.cached = max(self.count.cached, update.num_cached_prompt)
        for index, token in enumerate(update.token_ids):
            self.count.generated += 1
            if self._columns is not None:
                logprob, best = update.logprobs[index]
                self._columns.add(token, self._offsets.push(token), logprob, best)
            self._pieces.append(self._text.push(token))
            if self._text.stopped:
                self.finish_reason = "stop"
                return not update.finish_reason
        if update.finish_reason:
            self.end(update.finish_reason)
        return False

    def end(self, reason: str) -> None:
        """No more tokens come."""
        if self.guide is not None and self.guide.problem:
            raise invalid(f"the text ended before its required format was complete: {self.guide.problem}")
        self._pieces.append(self._text.finish())
        self.finish_reason = "stop" if self._text.stopped else reason

    def _add_prompt(self, scores: Sequence[TokenScore | None]) -> None:
        """The next tokens of the prompt, which have these scores."""
        columns = self._columns
        assert columns is not None, "scores are requested with logprobs"
        for score in scores:
            index, self._num_scored = self._num_scored, self._num_scored + 1
            token = self._prompt[index]
            added = index < self._added[0] or index >= len(self._prompt) - self._added[1]
            offset = self._prompt_offsets.here if added else self._prompt_offsets.push(token)
            columns.add(token, offset, score and score.logprob, score.best if score else ())

    def entry(self) -> dict[str, Any]:
        """The new part as an entry of ``choices``."""
        text, self._pieces = "".join(self._pieces), []
        logprobs = self._columns.take() if self._columns is not None else None
        return {"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": self.finish_reason}


_Job = Job[_Choice]


async def _updates(job: _Job, running: RunningRequest) -> AsyncGenerator[list[_Choice], None]:
    """The choices that have something new; all of them at once, if prompts are echoed and nothing runs."""
    async with aclosing(job.updates(running)) as updates:
        async for choices in updates:
            yield choices
    if not job.generations:
        for choice in job.choices:
            choice.end("length")
        yield job.choices


async def _stream(job: _Job, running: RunningRequest) -> AsyncGenerator[dict[str, Any], None]:
    no_usage = {"usage": None} if job.options.wants_usage else {}
    async with aclosing(_updates(job, running)) as updates:
        async for choices in updates:
            for choice in choices:
                entry = choice.entry()
                if entry["text"] or entry["logprobs"] or entry["finish_reason"]:
                    yield {**job.head, "choices": [entry], **no_usage}
    if job.options.wants_usage:
        yield {**job.head, "choices": [], "usage": job.usage}


async def _whole(job: _Job, running: RunningRequest) -> dict[str, Any]:
    async with aclosing(_updates(job, running)) as updates:
        async for _ in updates:
            pass
    entries = [choice.entry() for choice in job.choices]
    return {**job.head, "choices": entries, "usage": job.usage}
