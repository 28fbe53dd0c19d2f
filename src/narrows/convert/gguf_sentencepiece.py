"""The tokenizer of sentencepiece BPE (``tokenizer.ggml.model`` ``llama``: Llama 1 and 2, Mistral) from its vocabulary.

Sentencepiece merges the two neighbours whose union has the best score. A list of merges says the same: for every token,
each way to cut it into two tokens, in the order of the token's score. What the vocabulary lacks becomes its bytes.

A space goes before every stretch of text that begins a text or follows a special token (``add_space_prefix``), one more
if there is one already: as llama.cpp, sentencepiece, and the ``tokenizer.json`` that Llama 2 and Mistral publish.
"""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers

from narrows.convert.gguf_header import GgufHeader
from narrows.errors import CheckpointError, ConfigError

__all__ = ["sentencepiece_tokenizer"]

SPACE = "\u2581"
MERGED = (1, 4)  # values of tokenizer.ggml.token_type that merging may make: normal and user-defined


def sentencepiece_tokenizer(source: GgufHeader, tokens: list[str], types: list[int], unknown: str) -> Tokenizer:
    """The tokenizer without its special tokens; ``unknown`` is the token of what no token stands for.

    Raises:
        CheckpointError: scores are missing or no numbers.
        ConfigError: all scores are one, so nothing says what is merged first.
    """
    scores: list[float] = source.need("tokenizer.ggml.scores", list[float])
    if len(scores) != len(tokens):
        raise CheckpointError(f"{source.path}: {len(tokens)} tokens but {len(scores)} in tokenizer.ggml.scores")
    parts = {token: score for token, score, kind in zip(tokens, scores, types, strict=True) if kind in MERGED}
    merges = _merges(parts)
    made = {score for token, score in parts.items() if len(token) > 1}
    if len(merges) > 1 and len(made) == 1:
        raise ConfigError(
            f"{source.path}: all {len(parts)} tokens have the score {made.pop():g}, so nothing says which are merged "
            "first; convert the model again from its tokenizer.model"
        )
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = source.get("tokenizer.ggml.add_space_prefix", bool, True)
    spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", SPACE)]
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), *spaces] if prefix else spaces)
    steps: list[decoders.Decoder] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every way to cut a token into two, by the token's score, best first."""
    found = [
        (-score, at, token)
        for token, score in scores.items()
        for at in range(1, len(token))
        if token[:at] in scores and token[at:] in scores
    ]
    found.sort(key=lambda merge: merge[0])
    return [(token[:at], token[at:]) for _, at, token in found]
