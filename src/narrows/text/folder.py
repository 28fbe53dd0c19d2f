"""Reads what a Hugging Face folder says about its tokenizer, as plain data. Knows file names, not how to tokenise.

The same facts may stand in several files; what wins over what is Hugging Face's order:

    special tokens   tokenizer_config.json; special_tokens_map.json over it where there is no `added_tokens_decoder`
    eos ids          all of generation_config.json, config.json and the tokenizer's eos_token: any of them ends a text
    chat templates   chat_template.jinja (and additional_chat_templates/*.jinja) before tokenizer_config.json's
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from narrows.errors import CheckpointError
from narrows.text.generation_config import read_generation_config, read_json_object

__all__ = ["TokenizerFiles", "read_tokenizer_files"]

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """What the JSON files beside ``tokenizer.json`` say.

    ``named`` maps ``bos_token`` and the like to their token; ``added`` are the tokens of ``added_tokens_decoder`` by
    id; ``extra`` are further special tokens without a role; ``templates`` maps a name (``default``, ``tool_use``) to a
    chat template; ``eos_ids`` are the end-of-text ids of the model's own configs, without the tokenizer's.
    """

    folder: Path
    named: Mapping[str, AddedToken]
    added: Mapping[int, AddedToken]
    extra: tuple[AddedToken, ...]
    templates: Mapping[str, str]
    eos_ids: frozenset[int]
    split_special_tokens: bool

    @property
    def tokenizer_json(self) -> Path:
        """Where the tokenizer itself is; it exists."""
        return self.folder / "tokenizer.json"


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """Read the JSON and jinja files of ``folder``; only ``tokenizer.json`` must exist, and is not opened here.

    Raises `CheckpointError` when it is missing, or when one of the others is not what its name says.
    """
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(_missing(folder))
    config = read_json_object(folder / "tokenizer_config.json")
    added = {int(i): _token(folder, token) for i, token in config.get("added_tokens_decoder", {}).items()}
    tokens = config if added else {**config, **read_json_object(folder / "special_tokens_map.json")}
    extra = tokens.get("extra_special_tokens") or tokens.get("additional_special_tokens") or []
    # Model-specific roles (`image_token`, and the values of a mapping) are special tokens like the named ones.
    own_roles = [v for k, v in tokens.items() if k.endswith("_token") and k not in NAMED_TOKENS and isinstance(v, str)]
    extra = [*own_roles, *(extra.values() if isinstance(extra, dict) else extra)]
    return TokenizerFiles(
        folder=folder,
        named={key: _token(folder, tokens[key]) for key in NAMED_TOKENS if tokens.get(key) is not None},
        added=added,
        extra=tuple(_token(folder, token) for token in extra),
        templates=_templates(folder, config.get("chat_template")),
        eos_ids=frozenset(read_generation_config(folder).eos_token_id),
        split_special_tokens=bool(config.get("split_special_tokens", False)),
    )


def _missing(folder: Path) -> str:
    if not folder.is_dir():
        return f"no tokenizer: {folder} is not a folder; give the folder that holds tokenizer.json"
    others = ("tokenizer.model", "tiktoken.model", "tekken.json", "vocab.json", "vocab.txt")
    found = [name for name in others if (folder / name).is_file()]
    way_out = (
        f"it has {', '.join(found)}, which narrows does not read: save the tokenizer once with transformers' "
        "AutoTokenizer.from_pretrained(...).save_pretrained(...), which writes tokenizer.json"
        if found
        else "download it with the model's other files"
    )
    return f"{folder} has no tokenizer.json; {way_out}"


def _token(folder: Path, value: Any) -> AddedToken:
    if isinstance(value, str):
        return AddedToken(value, special=True, normalized=False)
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        return AddedToken(value["content"], **{"special": True, **{k: value[k] for k in flags if k in value}})
    raise CheckpointError(f"{folder}: a special token is {value!r}, neither a text nor an object with 'content'")


def _templates(folder: Path, in_config: Any) -> dict[str, str]:
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    if files:
        return {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    if in_config is None:
        return {}
    if isinstance(in_config, str):
        return {"default": in_config}
    if isinstance(in_config, list) and all(isinstance(t, dict) and {"name", "template"} <= t.keys() for t in in_config):
        return {t["name"]: t["template"] for t in in_config}
    raise CheckpointError(f"{folder}/tokenizer_config.json: chat_template is neither a text nor a list of named ones")
