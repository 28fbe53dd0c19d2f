"""Fields that all generation routes share, and the limits on what a body may hold.

Values are not converted: a number written as text is an error that names its field. Unknown fields are ignored, as
OpenAI-compatible servers do; fields that decide the text elsewhere are refused (``schema/fields.py``).

Pydantic checks every item of a list or mapping and keeps an error for each wrong one, which is gigabytes for a body of
some megabytes. So lists stop at their first wrong item here, and mappings are checked member by member, after their
length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, PydanticKnownError, core_schema

from narrows.sched.limits import MOST_PRIORITY
from narrows.sched.sampling import MAX_BIAS, MAX_LOGPROBS
from narrows.server.http.errors import ApiError
from narrows.server.http.json_io import JsonLimits, read_json
from narrows.server.schema.fields import REFUSED, refusal_of

__all__ = [
    "MAX_ENTRIES",
    "MAX_STOPS",
    "MAX_TEXT",
    "AtMost",
    "GenerationFields",
    "JsonObject",
    "JsonSchema",
    "JsonSchemaFormat",
    "OneOf",
    "ResponseFormat",
    "StreamOptions",
    "StrictModel",
    "StructuredOutputs",
    "Text",
    "TopLogprobs",
    "kind_of",
]

_MARK = "narrows_member_by_member"


def _stopping(node: Any) -> Any:
    """A part of a schema, and all parts within it, rewritten to stop at the first error."""
    if isinstance(node, list):
        return [_stopping(each) for each in node]
    if isinstance(node, tuple):
        return tuple(_stopping(each) for each in node)
    if not isinstance(node, dict) or _MARK in node.get("metadata", {}):
        return node
    new = {key: value if key == "metadata" else _stopping(value) for key, value in node.items()}
    if node.get("type") == "list":
        new["fail_fast"] = True
    if node.get("type") == "dict" and new.get("values_schema", {}).get("type", "any") != "any":
        check = partial(_member_by_member, most=node.get("max_length"))
        return core_schema.no_info_wrap_validator_function(check, new, metadata={_MARK: True})
    return new


def _member_by_member(value: Any, check: Callable[[Any], Any], *, most: int | None) -> Any:
    if not isinstance(value, dict) or not value:
        return check(value)
    if most is not None and len(value) > most:
        values = {"field_type": "Dictionary", "max_length": most, "actual_length": len(value)}
        raise PydanticKnownError("too_long", values)
    out: dict[Any, Any] = {}
    for key, item in value.items():
        out |= check({key: item})
    return out


class StrictModel(BaseModel):
    """A body, or part of one."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, protected_namespaces=())

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """The model's own schema, in which everything stops at the first error."""
        return _stopping(handler(source))  # type: ignore[no-any-return]


MAX_TEXT = 16 * 1024 * 1024
"""Characters of one text; a body is bounded by --max-body-mb, a prompt by the context."""
MAX_ENTRIES = 10_000


@dataclass(frozen=True, slots=True)
class AtMost:
    """A list, mapping or text of at most ``count`` items, which ``noun`` names; ``least`` 1: it must not be empty.

    The count is checked before any item; a list's items are checked up to the first wrong one.
    """

    count: int
    noun: str
    least: int = 0

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """The type's own validation, after the count."""
        inner: Any = dict(handler(source))
        if inner["type"] in ("list", "dict"):  # of a text, the length is not known to pydantic if it is not Unicode
            inner["max_length"] = self.count
            if self.least:
                inner["min_length"] = self.least
        if inner["type"] == "list":
            inner["fail_fast"] = True
        return core_schema.no_info_before_validator_function(self._checked, inner)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The type's own schema; a text's says its length too."""
        found = handler(schema)
        if found.get("type") == "string":
            found |= {"maxLength": self.count} | ({"minLength": self.least} if self.least else {})
        return found

    def _checked(self, value: Any) -> Any:
        if not isinstance(value, str | list | dict):
            return value
        assert isinstance(value, Sized), "all of them are"
        values = {"most": self.count, "noun": self.noun, "given": len(value)}
        if len(value) > self.count:
            raise PydanticCustomError("too_many", "at most {most} {noun}, but there are {given}", values)
        if len(value) < self.least:
            raise PydanticCustomError("too_few", "must not be empty", values)
        return value


def kind_of(value: Any) -> str:
    """The JSON type of a value that was read from JSON, or of a model in an object's place.

    >>> kind_of("a"), kind_of([]), kind_of(True), kind_of(None)
    ('a text', 'a list', 'a boolean', 'null')
    """
    if value is None:
        return "null"
    kinds: tuple[tuple[type, str], ...] = (
        (str, "a text"),
        (bool, "a boolean"),
        (int, "a number"),
        (float, "a number"),
        (list, "a list"),
    )
    return next((name for kind, name in kinds if isinstance(value, kind)), "an object")


class OneOf:
    """Metadata for a field that is of one of several JSON types: the error of a wrong item is that type's own.

    ``kinds`` maps the result of :func:`kind_of` to the intended type.
    """

    def __init__(self, kinds: Mapping[str, Any]) -> None:
        self._kinds = dict(kinds)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """A union that the value's own JSON type decides."""
        choices = {name: handler.generate_schema(kind) for name, kind in self._kinds.items()}
        return core_schema.tagged_union_schema(
            choices,
            discriminator=kind_of,
            custom_error_type="wrong_type",
            custom_error_message=f"must be {' or '.join(self._kinds)}",
        )


Text = Annotated[str, AtMost(MAX_TEXT, "characters")]
JsonObject = Annotated[dict[str, Any], AtMost(MAX_ENTRIES, "entries")]


def _schema_of(value: Any) -> Any:
    """The schema, read if it comes as JSON text, which may hold no more than a body."""
    if not isinstance(value, str):
        return value
    try:
        found = read_json(value, JsonLimits(), "a JSON schema as text")
    except ApiError as error:
        raise PydanticCustomError("json_schema", "{problem}", {"problem": error.message}) from None
    except ValueError:
        raise PydanticCustomError("json_schema", "a JSON schema as text must be JSON, and this is not") from None
    if not isinstance(found, dict):
        raise PydanticCustomError("json_schema", "a JSON schema must be an object")
    return found


JsonSchema = Annotated[
    JsonObject,
    BeforeValidator(_schema_of),
    WithJsonSchema({"anyOf": [{"type": "object"}, {"type": "string", "maxLength": MAX_TEXT}]}),
]
"""A JSON schema, as an object or as JSON text."""


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
    """Checks the biases up to the first wrong one."""
    if not isinstance(value, dict):
        return value
    for token, bias in value.items():
        number = isinstance(bias, int | float) and not isinstance(bias, bool)
        if not isinstance(token, str) or not number or not -MAX_BIAS <= bias <= MAX_BIAS:
            problem = PydanticCustomError("bias", "must be a number from -{most} to {most}", {"most": int(MAX_BIAS)})
            raise _field_error(str(token)[:40], problem)
    return value


Biases = Annotated[dict[str, float], AtMost(MAX_BIASES, "biases"), BeforeValidator(_checked_biases)]


class StreamOptions(StrictModel):
    """Options of a stream."""

    include_usage: bool | None = Field(default=None, description="a last chunk without choices says how many tokens")


class JsonSchemaFormat(StrictModel):
    """A JSON schema that the text has to fulfil; ``strict`` closes its objects. ``name`` changes nothing here."""

    name: Name | None = None
    schema_: JsonObject = Field(alias="schema")
    strict: bool | None = Field(default=None, description="objects that do not say additionalProperties have none")


class ResponseFormat(StrictModel):
    """The required format of the text: any text, any JSON object, JSON by a schema, or text of a regex or a grammar."""

    type: Literal["text", "json_object", "json_schema", "regex", "grammar"]
    json_schema: JsonSchemaFormat | None = None
    schema_: JsonSchema | None = Field(default=None, alias="schema", description="as llama.cpp and others have it")
    pattern: Pattern | None = Field(default=None, description="of type regex: it matches the whole text")
    grammar: Grammar | None = Field(default=None, description="of type grammar: GBNF, EBNF or Lark")

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        """Refuses types of other servers and names the alternative."""
        if isinstance(value, dict) and value.get("type") == "structural_tag":
            message = REFUSED["structural_tag"].reason
            raise _field_error("type", PydanticCustomError("structural_tag", "structural_tag: {why}", {"why": message}))
        return value


class StructuredOutputs(StrictModel):
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
    """An error of one field, found while the whole object is checked."""
    return ValidationError.from_exception_data(name, [InitErrorDetails(type=error, loc=(name,), input=None)])


class GenerationFields(StrictModel):
    """The fields that all generation routes have."""

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
    n_predict: int | None = Field(default=None, ge=-1, lt=2**31, description="llama.cpp's max_tokens; -1: no limit")
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
        """Refuses fields that decide the text on other servers and are not supported here."""
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
