"""Reads the tokenizer settings of a Hugging Face folder.

Several files may state the same fact; precedence is Hugging Face's:

    special tokens   tokenizer_config.json; special_tokens_map.json over it where there is no `added_tokens_decoder`
    eos ids          all of generation_config.json, config.json and the tokenizer's eos_token: any of them ends a text
    chat templates   chat_template.jinja (and additional_chat_templates/*.jinja) before tokenizer_config.json's
    bos and eos      ``add_bos_token`` and ``add_eos_token`` of tokenizer_config.json, else what tokenizer.json adds.
                     transformers 4 obeys them for Llama's tokenizers, and DeepSeek's (of that class, whose
                     tokenizer.json adds nothing) were evaluated so; transformers 5 reads tokenizer.json alone
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from narrows.errors import CheckpointError
from narrows.files import file_in, read_json_object, read_text
from narrows.text.generation_config import read_generation_config

__all__ = ["TextEnds", "TokenizerFiles", "missing_tokenizer", "read_tokenizer_files"]

_TEMPLATE, _MORE_TEMPLATES = "chat_template.jinja", "additional_chat_templates"

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """The settings of the JSON files beside ``tokenizer.json``.

    ``named`` maps ``bos_token`` and the like to their token; ``added`` are the tokens of ``added_tokens_decoder`` by
    id; ``extra`` are further special tokens without a role; ``templates`` maps a name (``default``, ``tool_use``) to a
    chat template; ``eos_ids`` are the end-of-text ids of the model's own configs, without the tokenizer's.
    ``adds_bos`` and ``adds_eos`` say whether a text begins and ends with these; None: as ``tokenizer.json`` has it.
    """

    folder: Path
    named: Mapping[str, AddedToken]
    added: Mapping[int, AddedToken]
    extra: tuple[AddedToken, ...]
    templates: Mapping[str, str]
    eos_ids: frozenset[int]
    split_special_tokens: bool
    adds_bos: bool | None = None
    adds_eos: bool | None = None

    @property
    def tokenizer_json(self) -> Path:
        """Where the tokenizer itself is; it exists."""
        return self.folder / "tokenizer.json"


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """Read the JSON and jinja files of ``folder``; only ``tokenizer.json`` must exist, and is not opened here.

    Raises `CheckpointError` when it is missing, or when one of the others is invalid.
    """
    if file_in(folder, "tokenizer.json") is None:
        raise CheckpointError(missing_tokenizer(folder))
    config_file = folder / "tokenizer_config.json"
    config = read_json_object(file_in(folder, config_file.name))
    added = _added(config_file, config.get("added_tokens_decoder") or {})
    tokens = config if added else {**config, **read_json_object(file_in(folder, "special_tokens_map.json"))}
    named = {key: _token(folder, tokens[key]) for key in NAMED_TOKENS if tokens.get(key) is not None}
    return TokenizerFiles(
        folder=folder,
        named=named,
        added=added,
        extra=_extra(folder, tokens),
        templates=_templates(folder, config.get("chat_template")),
        eos_ids=frozenset(read_generation_config(folder).eos_token_id),
        split_special_tokens=_flag(config_file, config, "split_special_tokens") or False,
        adds_bos=_adds(config_file, config, "bos_token", named),
        adds_eos=_adds(config_file, config, "eos_token", named),
    )


def _added(file: Path, raw: Any) -> dict[int, AddedToken]:
    """``added_tokens_decoder``: tokens by their ids, which JSON writes as texts."""
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file}: added_tokens_decoder is {raw!r}; it must be an object from ids to tokens")
    wrong = next((key for key in raw if not (key.isascii() and key.isdigit())), None)
    if wrong is not None:
        raise CheckpointError(f"{file}: added_tokens_decoder has the key {wrong!r}; it must be a token id")
    return {int(key): _token(file.parent, token) for key, token in raw.items()}


def _extra(folder: Path, tokens: Mapping[str, Any]) -> tuple[AddedToken, ...]:
    """Special tokens without a role, and those of a model's own roles (``image_token``, the values of a mapping)."""
    extra = tokens.get("extra_special_tokens") or tokens.get("additional_special_tokens") or []
    if not isinstance(extra, dict | list):
        raise CheckpointError(f"{folder}: the further special tokens are {extra!r}; they must be a list or an object")
    own_roles = [v for k, v in tokens.items() if k.endswith("_token") and k not in NAMED_TOKENS and isinstance(v, str)]
    values = extra.values() if isinstance(extra, dict) else extra
    return tuple(_token(folder, token) for token in (*own_roles, *values))


def _flag(file: Path, config: Mapping[str, Any], field: str) -> bool | None:
    value = config.get(field)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"{file}: {field} is {value!r}; it must be true or false")
    return value


def _adds(file: Path, config: Mapping[str, Any], role: str, named: Mapping[str, AddedToken]) -> bool | None:
    """The value of ``add_bos_token`` or ``add_eos_token``."""
    flag = _flag(file, config, f"add_{role}")
    if flag and role not in named:
        raise CheckpointError(f"{file}: add_{role} is true, but no {role} is named; name it there, or set it to false")
    return flag


def missing_tokenizer(folder: Path) -> str:
    """The error of a folder without ``tokenizer.json``, by its files."""
    if not folder.is_dir():
        return f"no tokenizer: {folder} is not a folder; give the folder that holds tokenizer.json"
    others = ("tokenizer.model", "tiktoken.model", "tekken.json", "vocab.json", "vocab.txt")
    found = [name for name in others if (folder / name).is_file()]
    way_out = "download it with the model's other files"
    if found:
        way_out = (
            f"it has {', '.join(found)}, which narrows does not read: write one with transformers: AutoTokenizer"
            f".from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
        )
    return f"{folder} has no tokenizer.json; {way_out}"


def _token(folder: Path, value: Any) -> AddedToken:
    if isinstance(value, str):
        return AddedToken(value, special=True, normalized=False)
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        flags = {
            key: value[key] for key in ("single_word", "lstrip", "rstrip", "normalized", "special") if key in value
        }
        if all(isinstance(flag, bool) for flag in flags.values()):
            return AddedToken(value["content"], **{"special": True, **flags})
    raise CheckpointError(
        f"{folder}: a special token is {value!r}; it must be a text, or an object with 'content' and flags"
    )


def _templates(folder: Path, in_config: Any) -> dict[str, str]:
    more = sorted(f"{_MORE_TEMPLATES}/{path.name}" for path in (folder / _MORE_TEMPLATES).glob("*.jinja"))
    files = {Path(name).stem: file_in(folder, name) for name in more}
    files["default"] = file_in(folder, _TEMPLATE) or files.get("default")
    found = {name: read_text(path) for name, path in files.items() if path is not None}
    if found:
        return found
    if in_config is None:
        return {}
    if isinstance(in_config, str):
        return {"default": in_config}
    if isinstance(in_config, dict) and all(isinstance(template, str) for template in in_config.values()):
        return in_config
    if isinstance(in_config, list) and all(map(_is_named_template, in_config)):
        return {template["name"]: template["template"] for template in in_config}
    raise CheckpointError(f"{folder}/tokenizer_config.json: chat_template is neither a text nor a list of named ones")


def _is_named_template(raw: Any) -> bool:
    return isinstance(raw, dict) and all(isinstance(raw.get(key), str) for key in ("name", "template"))


class TextEnds:
    """Corrects the ids of a text that ``backend`` encoded with special tokens."""

    def __init__(self, backend: tokenizers.Tokenizer, files: TokenizerFiles) -> None:
        plain, whole = (backend.encode("a", add_special_tokens=special).ids for special in (False, True))
        before = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
        first, last = whole[:before], whole[before + len(plain) :]
        self._bos = self._id(backend, files, "bos_token", files.adds_bos)
        self._eos = self._id(backend, files, "eos_token", files.adds_eos)
        self._add_bos = bool(files.adds_bos) and self._bos not in first
        self._add_eos = bool(files.adds_eos) and self._eos not in last
        self._drop_bos = files.adds_bos is False and first[:1] == [self._bos]
        self._drop_eos = files.adds_eos is False and last[-1:] == [self._eos]

    @staticmethod
    def _id(backend: tokenizers.Tokenizer, files: TokenizerFiles, role: str, wanted: bool | None) -> int | None:
        return None if wanted is None or role not in files.named else backend.token_to_id(files.named[role].content)

    def put(self, ids: list[int]) -> list[int]:
        """The ids with the bos and eos of the config. A text that begins with bos itself gets no second one."""
        if self._drop_bos:
            ids = ids[1:]
        if self._drop_eos:
            ids = ids[:-1]
        if self._add_bos and self._bos is not None and ids[:1] != [self._bos]:
            ids = [self._bos, *ids]
        if self._add_eos and self._eos is not None and ids[-1:] != [self._eos]:
            ids = [*ids, self._eos]
        return ids
