"""Fields that chat completions and completions share. Knows shapes and ranges; decides nothing.

Values are not converted: a number spelled as text is an error that names its field. Fields nobody knows are ignored, as
OpenAI-compatible servers do.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from narrows.sched.limits import MOST_PRIORITY
from narrows.sched.sampling import MAX_LOGPROBS
from narrows.server.schema.body import Body

__all__ = [
    "MAX_STOPS",
    "Body",
    "GenerationFields",
    "JsonSchemaFormat",
    "ResponseFormat",
    "StreamOptions",
    "StructuredOutputs",
    "TopLogprobs",
]

MAX_STOPS = 32
MAX_CHOICES = 128
_INT64 = 2**63 - 1

StopString = Annotated[str, Field(min_length=1, max_length=1000)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TopLogprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]


class StreamOptions(Body):
    """What a stream carries beside text."""

    include_usage: bool | None = Field(default=None, description="a last chunk without choices says how many tokens")


class JsonSchemaFormat(Body):
    """A JSON schema that the text has to fulfil. ``name``, ``description`` and ``strict`` change nothing here."""

    name: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(Body):
    """What the text has to look like: any text, any JSON object, JSON by a schema, or text that a regex matches."""

    type: Literal["text", "json_object", "json_schema", "regex"]
    json_schema: JsonSchemaFormat | None = None
    pattern: str | None = Field(default=None, max_length=10_000, description="of type regex: it matches the whole text")


class StructuredOutputs(Body):
    """The same by other servers' field: one of a regex, a JSON schema, and a list of texts."""

    regex: str | None = Field(default=None, max_length=10_000)
    json_: dict[str, Any] | None = Field(default=None, alias="json")
    choice: list[str] | None = Field(default=None, min_length=1, max_length=1000)


class GenerationFields(Body):
    """What both APIs let a client say about one generation."""

    model: str | None = Field(default=None, description="left out: the served model")
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=1e-9, le=1)
    top_k: int | None = Field(default=None, ge=-1, lt=2**31, description="0 or -1: all tokens")
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, ge=1e-3, le=1e3)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: int | None = Field(default=None, ge=-_INT64 - 1, le=_INT64)
    max_tokens: int | None = Field(default=None, ge=0, lt=2**31)
    min_tokens: int | None = Field(default=None, ge=0, lt=2**31)
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: list[TokenId] | None = Field(default=None, max_length=256)
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    priority: int | None = Field(
        default=None,
        ge=-MOST_PRIORITY,
        le=MOST_PRIORITY,
        description="lower runs earlier; below 0: if the server allows it",
    )
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_regex: str | None = Field(default=None, max_length=10_000)
    guided_json: dict[str, Any] | None = None
    guided_choice: list[str] | None = Field(default=None, min_length=1, max_length=1000)

    @property
    def num_choices(self) -> int:
        """Texts per prompt."""
        return 1 if self.n is None else self.n

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        """Whether the stream ends with the number of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)
