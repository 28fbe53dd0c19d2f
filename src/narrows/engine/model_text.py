"""The text part of a model's path: its tokenizer and its generation config, in either format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken

from narrows.convert.gguf_config import gguf_generation_config, special_token_ids
from narrows.convert.gguf_header import GgufHeader, find_gguf
from narrows.convert.gguf_tokenizer import chat_templates, tokenizer_backend
from narrows.files import file_in
from narrows.text import GenerationConfig, Tokenizer
from narrows.text.folder import TokenizerFiles, missing_tokenizer
from narrows.text.generation_config import parse_generation_config, read_generation_config

__all__ = ["ModelText", "load_model_text"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelText:
    """``tokenizer`` is None where the model has none (a preset, a folder without ``tokenizer.json``); then ``lack`` is
    why."""

    tokenizer: Tokenizer | None
    generation: GenerationConfig
    lack: str = ""


def load_model_text(model: str | Path) -> ModelText:
    """The tokenizer and the generation config of a model's path.

    Raises:
        CheckpointError: a file is broken, or a GGUF file is not there.
        ConfigError: a GGUF file with a kind of tokenizer that is not supported.
    """
    path = Path(model)
    if (file := find_gguf(path)) is not None:
        return _of_gguf(GgufHeader(file))
    if not path.is_dir():
        return ModelText(tokenizer=None, generation=GenerationConfig(), lack=f"{model} has no tokenizer.json")
    generation = read_generation_config(path)
    if file_in(path, "tokenizer.json") is None:
        return ModelText(tokenizer=None, generation=generation, lack=missing_tokenizer(path))
    return ModelText(tokenizer=Tokenizer.from_folder(path), generation=generation)


def _of_gguf(header: GgufHeader) -> ModelText:
    """As of the folder that the file would be converted to."""
    generation = parse_generation_config(gguf_generation_config(header), str(header.path))
    tokens = header.need("tokenizer.ggml.tokens", list[str])
    files = TokenizerFiles(
        folder=header.path,
        named={
            f"{role}_token": AddedToken(tokens[token], special=True, normalized=False)
            for role, token in special_token_ids(header).items()
        },
        added={},
        extra=(),
        templates=chat_templates(header),
        eos_ids=frozenset(generation.eos_token_id),
        split_special_tokens=False,
    )
    return ModelText(tokenizer=Tokenizer(tokenizer_backend(header), files), generation=generation)
