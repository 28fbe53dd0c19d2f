"""Fields that chat completions and completions share. Knows shapes and ranges; decides nothing.

Values are not converted: a number spelled as text is an error that names its field. Fields that no server knows are
ignored, as OpenAI-compatible servers do; those that decide the text elsewhere are refused (``schema/fields.py``).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from narrows.sched.limits import MOST_PRIORITY
from narrows.sched.sampling import MAX_BIAS, MAX_LOGPROBS
from narrows.server.schema.body import Body
from narrows.server.schema.fields import REFUSED, refusal_of
from narrows.server.schema.limits import AtMost, JsonObject, JsonSchema, OneOf

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

MAX_BIASES = 300_000
MAX_IDS = 1_000_000

StopString = Annotated[str, AtMost(1000, "characters of a stop string", least=1)]
Pattern = Annotated[str, AtMost(10_000, "characters of a regex")]
Grammar = Annotated[str, AtMost(32_768, "characters of a grammar")]
Choices = Annotated[list[Annotated[str, AtMost(10_000, "characters of a choice")]], AtMost(1000, "choices", least=1)]
Word = Annotated[str, AtMost(256, "characters of a word")]
Name = Annotated[str, AtMost(1000, "characters of a name")]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TopLogprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]


def _checked_biases(value: Any) -> Any:
    """Looks at the biases up to the first that is wrong."""
    if not isinstance(value, dict):
        return value
    for token, bias in value.items():
        number = isinstance(bias, int | float) and not isinstance(bias, bool)
        if not isinstance(token, str) or not number or not -MAX_BIAS <= bias <= MAX_BIAS:
            problem = PydanticCustomError("bias", "must be a number from -{most} to {most}", {"most": int(MAX_BIAS)})
            raise _field_error(str(token)[:40], problem)
    return value


Biases = Annotated[dict[str, float], AtMost(MAX_BIASES, "biases"), BeforeValidator(_checked_biases)]


class StreamOptions(Body):
    """What a stream carries beside text."""

    include_usage: bool | None = Field(default=None, description="a last chunk without choices says how many tokens")


class JsonSchemaFormat(Body):
    """A JSON schema that the text has to fulfil; ``strict`` closes its objects. ``name`` changes nothing here."""

    name: Name | None = None
    schema_: JsonObject = Field(alias="schema")
    strict: bool | None = Field(default=None, description="objects that do not say additionalProperties have none")


class ResponseFormat(Body):
    """What the text has to look like: any text, any JSON object, JSON by a schema, or text of a regex or a grammar."""

    type: Literal["text", "json_object", "json_schema", "regex", "grammar"]
    json_schema: JsonSchemaFormat | None = None
    schema_: JsonSchema | None = Field(default=None, alias="schema", description="as llama.cpp and others have it")
    pattern: Pattern | None = Field(default=None, description="of type regex: it matches the whole text")
    grammar: Grammar | None = Field(default=None, description="of type grammar: GBNF, EBNF or Lark")

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        """Says of types of other servers what to do instead."""
        if isinstance(value, dict) and value.get("type") == "structural_tag":
            message = REFUSED["structural_tag"].reason
            raise _field_error("type", PydanticCustomError("structural_tag", "structural_tag: {why}", {"why": message}))
        return value


class StructuredOutputs(Body):
    """The same by vLLM's field: one of a regex, a JSON schema, any JSON object, a list of texts, and a grammar."""

    regex: Pattern | None = None
    json_: JsonSchema | None = Field(default=None, alias="json")
    json_object: bool | None = None
    choice: Choices | None = None
    grammar: Grammar | None = Field(default=None, description="GBNF, EBNF or Lark")
    structural_tag: Any = Field(default=None, description="not supported")
    disable_any_whitespace: bool | None = Field(default=None, description="no white space that JSON does not need")
    disable_additional_properties: bool | None = Field(default=None, description="as strict: true")
    whitespace_pattern: Pattern | None = Field(default=None, description="a regex of what stands between JSON's parts")

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, value: Any) -> Any:
        if isinstance(value, dict) and (why := refusal_of("structural_tag", value.get("structural_tag"))):
            raise _field_error("structural_tag", PydanticCustomError("refused", "{why}", {"why": why}))
        return value


def _field_error(name: str, error: PydanticCustomError) -> ValidationError:
    """An error of one field, found when the whole object is looked at."""
    return ValidationError.from_exception_data(name, [InitErrorDetails(type=error, loc=(name,), input=None)])


class GenerationFields(Body):
    """What both APIs let a client say about one generation."""

    model: Name | None = Field(default=None, description="left out: the served model")
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
    logit_bias: Biases | None = None
    allowed_token_ids: Annotated[list[TokenId], AtMost(MAX_BIASES, "token ids", least=1)] | None = Field(
        default=None, description="no other tokens are generated; one that may end the text should be among them"
    )
    seed: int | None = Field(default=None, ge=-_INT64 - 1, le=_INT64)
    max_tokens: int | None = Field(default=None, ge=0, lt=2**31)
    n_predict: int | None = Field(default=None, ge=-1, lt=2**31, description="llama.cpp's max_tokens; -1: none is said")
    min_tokens: int | None = Field(default=None, ge=0, lt=2**31)
    stop: (
        Annotated[
            StopString | list[StopString],
            OneOf({"a text": StopString, "a list": Annotated[list[StopString], AtMost(MAX_STOPS, "stops")]}),
        ]
        | None
    ) = None
    stop_token_ids: Annotated[list[TokenId], AtMost(256, "token ids that stop")] | None = None
    include_stop_str_in_output: bool | None = Field(default=None, description="the stop string ends the text")
    no_stop_trim: bool | None = Field(default=None, description="SGLang's include_stop_str_in_output")
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = Field(
        default=None, ge=-1, lt=2**31, description="so many tokens of a longer prompt are kept; -1: as many as fit"
    )
    truncation_side: Literal["left", "right"] | None = Field(default=None, description="what is cut; left if absent")
    priority: int | None = Field(
        default=None,
        ge=-MOST_PRIORITY,
        le=MOST_PRIORITY,
        description="lower runs earlier; below 0: if the server allows it",
    )
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_regex: Pattern | None = None
    guided_json: JsonSchema | None = None
    guided_choice: Choices | None = None
    guided_grammar: Grammar | None = None
    guided_whitespace_pattern: Pattern | None = None
    regex: Pattern | None = Field(default=None, description="SGLang's guided_regex")
    json_schema: JsonSchema | None = Field(default=None, description="SGLang's and llama.cpp's guided_json")
    ebnf: Grammar | None = Field(default=None, description="SGLang's guided_grammar")
    grammar: Grammar | None = Field(default=None, description="llama.cpp's guided_grammar")

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, value: Any) -> Any:
        """Refuses fields that decide the text on other servers, and cannot be obeyed here."""
        if isinstance(value, dict):
            for name in value:
                if name in cls.model_fields or not isinstance(name, str):
                    continue
                if why := refusal_of(name, value[name]):
                    raise _field_error(name, PydanticCustomError("refused", "{why}", {"why": why}))
        return value

    @property
    def num_choices(self) -> int:
        """Texts per prompt."""
        return 1 if self.n is None else self.n

    @property
    def most_tokens(self) -> int | None:
        """``max_tokens``, by either name."""
        if self.max_tokens is not None or self.n_predict == -1:
            return self.max_tokens
        return self.n_predict

    @property
    def keeps_stop(self) -> bool:
        """Whether the stop string is part of the text."""
        return bool(self.include_stop_str_in_output or self.no_stop_trim)

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        """Whether the stream ends with the number of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)
