"""Text to token ids and back, and chats to prompts, over a folder's ``tokenizer.json``.

The ids are those of transformers' AutoTokenizer on the same folder when it loads ``tokenizer.json`` directly
(``PreTrainedTokenizerFast``). Where transformers 5 rebuilds a tokenizer from its class instead (``GPT2Tokenizer``
forgets a digit splitter), this follows the file.

A chat template is a program from the checkpoint, so it runs in jinja's immutable sandbox and sees plain JSON types.
Settings, filters and globals follow transformers 5.23 (`utils/chat_template_utils.py`), since templates rely on them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from narrows.errors import CheckpointError, ConfigError
from narrows.files import read_text
from narrows.text.folder import TextEnds, TokenizerFiles, read_tokenizer_files
from narrows.text.token_bytes import is_byte_level, most_bytes_per_token, token_bytes

__all__ = ["Message", "Tokenizer", "compile_template", "plain"]

Message = Mapping[str, Any]
"""One message of a chat: ``{"role": "user", "content": "hello"}``, and other fields that the template reads."""

_LONG = 4096
"""A decoded text of more tokens takes milliseconds."""

REASONING = ("reasoning_content", "thinking", "reasoning")  # names for one thing; templates read the first


class Tokenizer:
    """The tokenizer of one model folder. Safe to share between threads: it only remembers what it has found."""

    def __init__(self, backend: tokenizers.Tokenizer, files: TokenizerFiles) -> None:
        """Take over ``backend``, adding the tokens that only ``files`` have; use `from_folder`."""
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = files.split_special_tokens
        _add_missing_tokens(backend, files)
        self._backend = backend
        self._files = files
        self._named = {role: str(token.content) for role, token in files.named.items()}
        added = backend.get_added_tokens_decoder()
        self._added = frozenset(added)
        self._silent = frozenset(i for i, token in added.items() if token.special)
        self._special = {token.content: i for i, token in added.items() if token.special}
        eos_id = backend.token_to_id(self._named["eos_token"]) if "eos_token" in self._named else None
        self._eos_ids = files.eos_ids | (frozenset() if eos_id is None else {eos_id})
        # ByteFallback turns tokens named <0x41> into bytes, and no other decoder does.
        self._bytes_fall_back = backend.decoder is not None and backend.decoder.decode(["<0x41>"]) == "A"
        self._byte_level = is_byte_level(backend)
        self._ends = TextEnds(backend, files)
        self._bytes: dict[int, bytes] = {}  # of tokens looked up so far
        self._templates = {name: self._compile(name, source) for name, source in files.templates.items()}

    @classmethod
    def from_folder(cls, folder: Path | str) -> Tokenizer:
        """The tokenizer of a Hugging Face model folder.

        Reads ``tokenizer.json``, and where they exist ``tokenizer_config.json``, ``special_tokens_map.json``,
        ``generation_config.json``, ``config.json`` and ``chat_template.jinja``. Raises `CheckpointError` when
        ``tokenizer.json`` is missing or one of them cannot be read.
        """
        files = read_tokenizer_files(Path(folder))
        text = read_text(files.tokenizer_json)
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises plain Exception for any error of the file
            raise CheckpointError(f"{files.tokenizer_json} cannot be read ({error}); fetch it again") from error
        return cls(backend, files)

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, (self._backend, self._files)  # templates are compiled again

    @cached_property
    def vocab_size(self) -> int:
        """Ids are 0 to ``vocab_size - 1``, added tokens included. A model's logits may be wider (padded)."""
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @cached_property
    def most_bytes_per_token(self) -> int | None:
        """The most UTF-8 bytes of a text that one token covers; None if unknown."""
        return most_bytes_per_token(self._backend, byte_level=self._byte_level)

    def fewest_tokens(self, text: str) -> int:
        """Tokens that ``text`` has at least, by its length alone; costs next to nothing."""
        most = self.most_bytes_per_token
        if most is None:
            return 0
        num_bytes = len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
        return -(-num_bytes // most)

    @property
    def eos_ids(self) -> frozenset[int]:
        """Ids that end a text: those of the generation config, of the model config, and the tokenizer's eos token."""
        return self._eos_ids

    @property
    def bos_token(self) -> str | None:
        """The begin-of-text token, or None."""
        return self._named.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        """The tokenizer's own end-of-text token, or None; `eos_ids` may hold more."""
        return self._named.get("eos_token")

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` can work."""
        return "default" in self._templates

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of ``text``; with ``add_special_tokens``, those that the tokenizer adds (often bos).

        ``tokenizer.json`` defines them, except bos and eos where ``tokenizer_config.json`` does
        (:mod:`narrows.text.folder`).

        Special tokens written out in ``text`` become their ids. Other threads run meanwhile, also during a long text.
        Raises `ConfigError` for text that is not Unicode
        (half of a surrogate pair, as JSON can carry).
        """
        try:
            # `encode` keeps the interpreter's lock for all of a text; batches let it go, and cost no more.
            ids = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        except TypeError:
            half = next((i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff"), None)
            if half is None:
                raise
            raise ConfigError(
                f"the text is not valid Unicode: character {half} of {len(text)} is half of a surrogate pair "
                f"(U+{ord(text[half]):04X}); remove it or send the whole pair"
            ) from None
        return self._ends.put(ids) if add_special_tokens else ids

    @cached_property
    def added_around(self) -> tuple[int, int]:
        """How many special tokens ``encode`` adds before a text, and how many after it."""
        plain, whole = self.encode("a", add_special_tokens=False), self.encode("a")
        before = next((at for at in range(len(whole)) if whole[at : at + len(plain)] == plain), 0)
        return before, max(len(whole) - len(plain) - before, 0)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ``ids``; bytes that are not UTF-8 become U+FFFD, and ids the tokenizer lacks become nothing."""
        ids = list(ids)
        if len(ids) > _LONG:  # lets other threads run
            return self._backend.decode_batch([ids], skip_special_tokens=skip_special_tokens)[0]
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def is_silent(self, token: int, *, skip_special_tokens: bool = True) -> bool:
        """Whether `decode` leaves ``token`` out: a special token when those are skipped, or an id it lacks."""
        return (skip_special_tokens and token in self._silent) or self._backend.id_to_token(token) is None

    def is_byte(self, token: int) -> bool:
        """Whether ``token`` is one raw byte (``<0xE4>``), whose text depends on the bytes around it."""
        if not self._bytes_fall_back:
            return False
        name = self._backend.id_to_token(token) or ""
        return len(name) == 6 and name.startswith("<0x") and name.endswith(">")

    def is_special(self, token: int) -> bool:
        """Whether ``token`` is a special token, which texts leave out."""
        return token in self._silent

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Ids of all special tokens by their text."""
        return self._special

    def bytes_of(self, token: int) -> bytes:
        """The bytes of ``token`` alone; may be part of a character. Empty for an id that the tokenizer lacks."""
        known = self._bytes.get(token)
        if known is None and (name := self._backend.id_to_token(token)) is not None:
            text = self.decode([token], skip_special_tokens=False)
            byte_level = self._byte_level and token not in self._added
            known = token_bytes(name, text, byte_level=byte_level, is_byte=self.is_byte(token))
            self._bytes[token] = known
        return known or b""

    def id_of(self, token: str) -> int | None:
        """The id of a token of the vocabulary by its name, added tokens included; None if it does not exist."""
        return self._backend.token_to_id(token)

    def to_json(self) -> str:
        """The whole tokenizer as one ``tokenizer.json``, with the additions of the other files."""
        return self._backend.to_str()

    @property
    def chat_template_source(self) -> str:
        """All the checkpoint's templates as text, which reveals the formats that the model was trained on."""
        return "\n".join(self._files.templates.values())

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt that the checkpoint's template makes of ``messages``.

        ``tools`` are JSON schemas; ``variables`` are further names a template may read (``enable_thinking``).
        Raises `ConfigError` when the folder has no template or the template refuses the messages.
        """
        template = self._templates.get("tool_use") if tools is not None else None
        template = template or self._templates.get("default")
        if template is None:
            raise ConfigError(
                f"{self._files.folder} has no chat template (tokenizer_config.json, chat_template.jinja); "
                "give a prompt instead of messages, or a model tuned for chats"
            )
        if not messages:
            raise ConfigError("a chat needs at least one message; 0 were given")
        try:
            given = plain({"variables": variables or {}, "tools": tools, "messages": list(map(_prepare, messages))})
        except RecursionError:
            raise ConfigError("the messages, tools or variables of a chat nest too deeply to be read") from None
        values = {
            **self._named,
            **given["variables"],
            "messages": given["messages"],
            "tools": given["tools"],
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return template.render(values)
        except Exception as error:  # a template is a program: it may fail in any way on messages it did not expect
            one_line = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError(
                f"the chat template of {self._files.folder} refused {len(messages)} message(s): {one_line}"
            ) from error

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Ids of the rendered chat. The template writes its own bos, so none is added a second time."""
        text = self.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tools=tools, variables=variables
        )
        return self.encode(text, add_special_tokens=False)

    def _compile(self, name: str, source: str) -> jinja2.Template:
        try:
            return compile_template(source)
        except jinja2.TemplateError as error:
            raise CheckpointError(f"{self._files.folder}: chat template {name!r} is not valid: {error}") from error


def _add_missing_tokens(backend: tokenizers.Tokenizer, files: TokenizerFiles) -> None:
    """Add the tokens that only the config files have; as in transformers, the config's flags win."""
    known = backend.get_added_tokens_decoder()
    changed = [token for i, token in sorted(files.added.items()) if repr(known.get(i)) != repr(token)]
    contents = {token.content for token in known.values()} | {token.content for token in changed}
    missing = {t.content: t for t in (*files.named.values(), *files.extra) if t.content not in contents}
    backend.add_tokens([*changed, *missing.values()])


def _prepare(message: Message) -> dict[str, Any]:
    """The message as templates expect it: no absent value spelled None, the reasoning under its standard names."""
    if not isinstance(message, Mapping):
        raise ConfigError(f"a chat message must be an object with 'role' and 'content', not {message!r}")
    values: dict[str, Any] = plain({key: value for key, value in message.items() if value is not None})
    reasoning = next((values[key] for key in REASONING if key in values), None)
    if reasoning is not None:
        values = {"thinking": reasoning, **values, "reasoning_content": reasoning}
    return values


def compile_template(source: str) -> jinja2.Template:
    """The template, ready to render; raises `jinja2.TemplateError` when it is not valid jinja."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _TemplateDict(),
        "namespace": _TemplateNamespace,
    }
    return environment.from_string(source)


def plain(value: Any) -> Any:
    """``value`` rebuilt of exact JSON types, so that a template meets no object with its own methods.

    Mappings become dicts and sequences lists; anything else becomes its type's name in angle brackets.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    for kind in (str, int, float):
        if isinstance(value, kind):  # a subclass, such as an enum: keep the value, drop its methods
            return getattr(kind, "__str__" if kind is str else f"__{kind.__name__}__")(value)
    return f"<{type(value).__name__}>"


class _GenerationBlock(Extension):
    """``{% generation %}...{% endgeneration %}`` marks the assistant's text for training; here it only renders it."""

    tags = frozenset({"generation"})  # type: ignore[assignment]  # jinja says set, and only reads it

    def parse(self, parser: Parser) -> nodes.Node:
        """A scope around the block's body."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _TemplateDict:
    """``dict(...)`` and ``dict.fromkeys(...)``, without the type behind them."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """As `dict.fromkeys`."""
        return dict.fromkeys(*args)


class _TemplateNamespace(jinja2.utils.Namespace):
    """``namespace(...)`` that refuses names with a leading underscore, as they lead out of the sandbox."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # without `self`, so that namespace(self=...) works, as in jinja
        self, rest = args[0], args[1:]
        values = dict(*rest, **kwargs)
        for name in values:
            _refuse_private(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a chat template may not set {name!r} on a namespace")


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # jinja's own filter escapes HTML, which would change the prompt
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
