"""Tokenizers from GGUF: sentencepiece against its own rule and transformers, byte-level BPE against regexes."""

from __future__ import annotations

import itertools
import random
import re
from pathlib import Path
from typing import Any

import gguf_lab as lab
import numpy as np
import pytest
import regex
import tokenizers
from gguf import GGMLQuantizationType as Kind
from tokenizers import models
from transformers import LlamaTokenizer
from transformers.tokenization_utils_base import generate_merges

from narrows.convert.gguf_header import GgufHeader
from narrows.convert.gguf_pre_tokenizers import PRE_TOKENIZERS
from narrows.convert.gguf_to_hf import convert_gguf
from narrows.convert.gguf_tokenizer import chat_templates
from narrows.engine.model_text import load_model_text
from narrows.errors import CheckpointError, ConfigError
from narrows.text import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)
SPACE = "\u2581"


def write(path: Path, fields: dict[str, Any]) -> Path:
    """A file of a tokenizer alone, but for an embedding."""
    rows = np.zeros((len(fields["tokenizer.ggml.tokens"]), 32), np.float32)
    return lab.write_file(path, "llama", fields, {"token_embd.weight": (rows, Kind.F32)})


def tokenizer_of(path: Path) -> Tokenizer:
    tokenizer = load_model_text(path).tokenizer
    assert tokenizer is not None
    return tokenizer


# -- sentencepiece ----------------------------------------------------------------------------------------------------

CORPUS = (
    "the quick brown fox jumps over the lazy dog , the theory of the thing is that this other thing then thaws "
    "  two  spaces   three hello world ! <s> [INST] user assistant naïve café 2024 12,345.67 aaaa aaa aa abab\n\n\tx "
) * 3


def pieces() -> list[str]:
    """Sentencepiece's BPE training in little: the most frequent pair of neighbours becomes a token, again and again."""
    words = [list(SPACE + word) for word in CORPUS.split(" ")]
    found = list(dict.fromkeys(itertools.chain.from_iterable(words)))
    for _ in range(150):
        pairs: dict[str, int] = {}
        for word in words:
            for left, right in itertools.pairwise(word):
                pairs[left + right] = pairs.get(left + right, 0) + 1
        pairs = {pair: count for pair, count in pairs.items() if pair not in found}
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        found.append(best)
        for word in words:
            for at in range(len(word) - 2, -1, -1):
                if at + 1 < len(word) and word[at] + word[at + 1] == best:
                    word[at : at + 2] = [best]
    return [*found, SPACE * 2, SPACE * 3, SPACE * 4]


def sentencepiece(**more: Any) -> dict[str, Any]:
    """The metadata of a sentencepiece vocabulary, with ids in another order than scores."""
    ranks = {piece: rank for rank, piece in enumerate(pieces())}
    found = random.Random(2).sample(list(ranks), len(ranks))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *found, "<|end|>", "tool call"]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(found), CONTROL, USER]
    scores = [0.0] * 259 + [-float(ranks[piece]) for piece in found] + [-1000.0] * 2
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{{ bos_token }}{% for m in messages %}[INST] {{ m.content }}{% endfor %}",
    } | {f"tokenizer.ggml.{key}": value for key, value in more.items()}


def reference(fields: dict[str, Any], text: str) -> list[int]:
    """Sentencepiece's rule, by hand: of all neighbours whose union is a token, the best score first, leftmost first;
    anything else becomes bytes."""
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    ids = {token: i for i, token in enumerate(tokens)}
    scores = {t: s for t, s, k in zip(tokens, fields["tokenizer.ggml.scores"], types, strict=True) if k in (1, 4)}
    symbols = list((SPACE + text).replace(" ", SPACE)) if text else []
    while True:
        unions = [(-scores[a + b], at) for at, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in scores]
        if not unions:
            break
        _, at = min(unions)
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    found: list[int] = []
    for symbol in symbols:
        found += [ids[symbol]] if symbol in scores else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return found


TEXTS = [
    "the quick brown fox",
    " leading",
    "   three leading, two trailing  ",
    "a  b   c    d     e",
    "\n\n\ttabs\r\nand lines\n",
    "naïve café — “quotes” … 你好世界 😀👩\u200d👩\u200d👧 e\u0301 \u00a0\u2003\u200b",
    "aaaaaaaaa ababababa thethethe",
    "12,345.67 + x_1 == <0x41> \ufffd \x00 \x7f",
    f"a real {SPACE} in the text",
    "",
    " ",
]


def test_sentencepiece_is_its_own_rule(tmp_path: Path) -> None:
    fields = sentencepiece()
    tokenizer = tokenizer_of(write(tmp_path / "m.gguf", fields))
    for text in TEXTS:
        assert tokenizer.encode(text) == reference(fields, text), text
        if SPACE not in text:
            assert tokenizer.decode(tokenizer.encode(text)) == text
    assert 3 + 0xE4 in tokenizer.encode("你")  # a byte, as no token has the character
    rng = random.Random(0)
    alphabet = ["a", "b", "t", "h", "e", " ", "  ", "\n", "é", "好", "the", "1"]
    for _ in range(300):
        text = "".join(rng.choices(alphabet, k=rng.randrange(1, 40)))
        assert tokenizer.encode(text) == reference(fields, text), text
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_sentencepiece_is_transformers_llama(tmp_path: Path) -> None:
    """But where a text begins with a space: transformers' Metaspace adds none there; sentencepiece does."""
    fields = sentencepiece()
    tokens = fields["tokenizer.ggml.tokens"]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = generate_merges(vocab, dict(zip(tokens, fields["tokenizer.ggml.scores"], strict=True)))
    theirs = LlamaTokenizer(vocab=vocab, merges=merges, add_bos_token=False)
    tokenizer = tokenizer_of(write(tmp_path / "m.gguf", fields))
    compared = [text for text in TEXTS if not text.startswith((" ", SPACE)) and "<0x" not in text]
    assert len(compared) > 5
    for text in compared:
        assert tokenizer.encode(text) == theirs.encode(text), text
        assert tokenizer.decode(tokenizer.encode(text)) == theirs.decode(theirs.encode(text), skip_special_tokens=True)


def test_special_tokens_in_a_text(tmp_path: Path) -> None:
    """As llama.cpp has it: matched whole, and a space before the text that follows one."""
    fields = sentencepiece()
    end, tool = len(fields["tokenizer.ggml.tokens"]) - 2, len(fields["tokenizer.ggml.tokens"]) - 1
    tokenizer = tokenizer_of(write(tmp_path / "m.gguf", fields))
    assert tokenizer.encode("<s>the</s>") == [1, *reference(fields, "the"), 2]
    assert tokenizer.encode("the<|end|> the") == [*reference(fields, "the"), end, *reference(fields, " the")]
    assert tokenizer.encode("tool call the") == [tool, *reference(fields, " the")]
    assert tokenizer.decode([1, *reference(fields, "the"), end, tool]) == "thetool call"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.eos_ids) == ("<s>", "</s>", {2})
    assert tokenizer.encode_chat([{"role": "user", "content": "the"}]) == [1, *reference(fields, "[INST] the")]


def test_bos_eos_and_the_space_before(tmp_path: Path) -> None:
    fields = sentencepiece()
    the = reference(fields, "the")
    bare = {key: value for key, value in fields.items() if not key.endswith(("_token_id", "add_bos_token"))}
    assert tokenizer_of(write(tmp_path / "d.gguf", bare)).encode("the") == [1, *the]  # llama.cpp's defaults
    both = sentencepiece(add_bos_token=True, add_eos_token=True)
    assert tokenizer_of(write(tmp_path / "b.gguf", both)).encode("the") == [1, *the, 2]
    plain = tokenizer_of(write(tmp_path / "p.gguf", sentencepiece(add_space_prefix=False)))
    assert plain.encode("the") != the and plain.decode(plain.encode(" the")) == " the"
    names = [fields["tokenizer.ggml.tokens"][i] for i in plain.encode("the")]
    assert "".join(names) == "the"


def test_the_converted_folder_is_the_same_tokenizer(tmp_path: Path) -> None:
    model = lab.model_of(lab.configs()["llama"])
    tokens = sentencepiece()
    fields = {key: value[:320] if isinstance(value, list) else value for key, value in tokens.items()}
    path = lab.write_model(tmp_path / "m.gguf", model, metadata=fields | {"tokenizer.ggml.merges": None})
    folder = Tokenizer.from_folder(convert_gguf(path, tmp_path / "hf"))
    ours = tokenizer_of(path)
    for text in TEXTS:
        assert ours.encode(text) == folder.encode(text)
        assert ours.decode(ours.encode(text)) == folder.decode(folder.encode(text))


@pytest.mark.parametrize(
    ("more", "kind", "problem"),
    [
        ({"scores": None}, CheckpointError, "has no tokenizer.ggml.scores, which is needed"),
        ({"scores": [0.0, 1.0]}, CheckpointError, "tokens but 2 in tokenizer.ggml.scores"),
        ({"scores": [float("nan")] * 5}, CheckpointError, "tokenizer.ggml.scores is .nan.*, where a finite number"),
        ({"scores": "all"}, ConfigError, "have the score -1000, so nothing says which are merged first"),
        ({"unknown_token_id": 1 << 20}, CheckpointError, "unknown token id 1048576 is outside the"),
        ({"eom_token_id": 1 << 20}, CheckpointError, "eom token id 1048576 is outside the"),
    ],
)
def test_impossible_vocabularies_are_refused(tmp_path: Path, more: dict[str, Any], kind: type, problem: str) -> None:
    fields = sentencepiece()
    if more.get("scores") == "all":
        more = {"scores": [-1000.0] * len(fields["tokenizer.ggml.tokens"])}
    rows = {"token_embd.weight": (np.zeros((4, 32), np.float32), Kind.F32)}
    changed = fields | {f"tokenizer.ggml.{key}": value for key, value in more.items()}
    with pytest.raises(kind, match=problem) as caught:
        load_model_text(lab.write_file(tmp_path / "m.gguf", "llama", changed, rows))
    assert type(caught.value) is kind and "\n" not in str(caught.value)


# -- byte-level BPE ---------------------------------------------------------------------------------------------------

CUTS = {
    "llama-bpe": [
        "Hello",
        " WORLDs",
        "'s",
        " DON",
        "'T",
        " ",
        "123",
        "45",
        " 你好",
        "\n\n",
        " y",
        "_z",
        "!!\n",
    ],
    "qwen2": ["Hello", "'ll", " ", "1", "2", "3", " café", " -", "ok", "\r\n", "\t", "\tx"],
    "qwen35": [" नमस्ते", " ", "1", "2", "ok", "'s", "!!"],
    "tekken": ["hello", "World", " HTTPServer", "'s", " ", "1", "2", "a", "/b", "//\n"],
    "gpt-4o": ["hello", "World's", " HTTPServer", " ", "123", "4", " a", "/b", "//\n"],
    "kimi-k2": ["hello", "World's", "你好世界", "カナ", " ", "123", "4", " a", "/b", "!!\n"],
    "deepseek-v3": ["Hello", " world", " ", "123", "45", "你好カナ", "abc", ".net", " =\n", "  ", " xé"],
    "deepseek-coder": ["Hello", " world", "\n", "\n", " ", "1", "2", "你好", "x", "!?"],
    "deepseek-llm": ["Hello", " Ωмега", "\n", " ", "1", "2", "你好", "x", "!?", "  "],
    "gpt-2": ["Hello", " world", "'s", " 123", "  ", " x", "\n\n"],
    "smollm": ["Hello", " world", "'s", " ", "1", "2", "3", "!!"],
}
"""A text in the pieces that the models' own regexes make of it; at least one name of every kind."""


def pieces_of(pre: str, text: str) -> list[str]:
    """Where the pre-tokenizer cuts ``text``."""
    backend = tokenizers.Tokenizer(models.BPE())
    PRE_TOKENIZERS[pre].cut(backend)
    spans = [span for _, span in backend.pre_tokenizer.pre_tokenize_str(text)]
    return [text[lo:hi] for lo, hi in spans]


@pytest.mark.parametrize("pre", CUTS)
def test_pre_tokenizers_split_text(pre: str) -> None:
    assert pieces_of(pre, "".join(CUTS[pre])) == CUTS[pre]


PUBLISHED = {  # tokenizer.json of the models (Kimi: tokenization_kimi.py), for the `regex` package
    "llama-bpe": [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    ],
    "qwen2": [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    ],
    "qwen35": [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "tekken": [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "gpt-4o": [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "kimi-k2": [
        r"[\p{Han}]+"
        r"|[^\r\n\p{L}\p{N}]?[[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]--\p{Han}]*[[\p{Ll}\p{Lm}\p{Lo}\p{M}]--\p{Han}]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]--\p{Han}]+[[\p{Ll}\p{Lm}\p{Lo}\p{M}]--\p{Han}]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "deepseek-v3": [
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ],
    "deepseek-coder": ["[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}"],
    "gpt-2": [r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"],
    "smollm": [r"\p{N}", r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"],
}


def cut_by(patterns: list[str], text: str) -> list[str]:
    """Each pattern in turn cuts every piece, by another engine than tokenizers'."""
    found = [text]
    for pattern in patterns:
        compiled, cut = regex.compile(pattern, regex.V1), []
        for piece in found:
            at = 0
            for match in compiled.finditer(piece):
                cut += [piece[at : match.start()], match[0]]
                at = match.end()
            cut.append(piece[at:])
        found = [piece for piece in cut if piece]
    return found


@pytest.mark.parametrize("pre", PUBLISHED)
def test_cuts_are_the_published_regexes(pre: str) -> None:
    rng = random.Random(1)
    alphabet = [
        "a",
        "B",
        "é",
        "'s",
        "'LL",
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "1",
        "23",
        "²",
        "好",
        "カ",
        "ä",
        "한",
        "न",
        "्",
    ]
    alphabet += [".", "!?", "//", "_", "😀", "ǅ", "ʰ", "\U0001d49c", "\u00a0", "$", "e\u0301"]
    for _ in range(500):
        text = "".join(rng.choices(alphabet, k=rng.randrange(1, 25)))
        if PRE_TOKENIZERS[pre].composed and "\u0301" in text:
            continue
        assert pieces_of(pre, text) == cut_by(PUBLISHED[pre], text), repr(text)


def test_deepseeks_letters_have_case() -> None:
    """Its class is Unicode's letters with case of a while ago, less those of mathematics."""
    pattern = PRE_TOKENIZERS["deepseek-llm"].regexes[1]
    ranges = re.findall(r"\\x\{(\w+)\}(?:-\\x\{(\w+)\})?", pattern)
    letters = {chr(i) for lo, hi in ranges for i in range(int(lo, 16), int(hi or lo, 16) + 1)}
    assert len(letters) == 2729
    without_case = {letter for letter in letters if not regex.fullmatch(r"[\p{Lu}\p{Ll}\p{Lt}]", letter)}
    assert without_case <= {"\u0295"}  # which Unicode took its case from since
    for text in ("\u1f5f\u1f7d", "\u1fd0\u1fd3", "\u1fd6\u1fdb", "\u2126\u212a", "\ufb01\u00e9", "\U00010400\u03c9"):
        assert pieces_of("deepseek-llm", text) == [text]


def byte_level(pre: str, **more: Any) -> dict[str, Any]:
    fields = lab.vocabulary(320) | {"tokenizer.ggml.pre": pre}
    return fields | {f"tokenizer.ggml.{key}" if "." not in key else key: value for key, value in more.items()}


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_pre_tokenizer_makes_a_tokenizer(tmp_path: Path, pre: str) -> None:
    fields = {key: value for key, value in byte_level(pre).items() if not key.endswith("add_bos_token")}
    tokenizer = tokenizer_of(write(tmp_path / "m.gguf", fields))
    ids = tokenizer.encode("the 12 the!")
    assert tokenizer.decode(ids) == "the 12 the!"
    assert (ids[0] == 1) == PRE_TOKENIZERS[pre].adds_bos == (pre in ("llama-bpe", "llama3", "llama-v3", "tekken"))


def test_ends_of_text_and_templates(tmp_path: Path) -> None:
    more = {"tokenizer.chat_template.tool_use": "tools", "tokenizer.chat_template": "plain"}
    path = write(tmp_path / "m.gguf", byte_level("gpt-2", eot_token_id=0, eom_token_id=7, **more))
    text = load_model_text(path)
    assert text.generation.eos_token_id == (2, 0, 7)
    assert text.tokenizer is not None and text.tokenizer.eos_ids == {2, 0, 7}
    assert chat_templates(GgufHeader(path)) == {"default": "plain", "tool_use": "tools"}  # listed or not
    chat = [{"role": "user", "content": "x"}]
    assert text.tokenizer.apply_chat_template(chat, tools=[]) == "tools"
    assert text.tokenizer.apply_chat_template(chat) == "plain"


def test_tokens_without_a_name_and_unknown_ones(tmp_path: Path) -> None:
    fields = byte_level("gpt-2")
    fields["tokenizer.ggml.tokens"][319] = ""
    fields["tokenizer.ggml.token_type"][318] = UNKNOWN
    tokenizer = tokenizer_of(write(tmp_path / "m.gguf", fields))
    name = fields["tokenizer.ggml.tokens"][318]
    assert tokenizer.encode(name) == [318] and tokenizer.decode([318]) == ""
    assert tokenizer.vocab_size == 320


@pytest.mark.parametrize("pre", ["default", "falcon", "no-such-thing"])
def test_unknown_ways_to_cut_are_refused_by_name(tmp_path: Path, pre: str) -> None:
    fields = byte_level("gpt-2") | {"tokenizer.ggml.pre": pre}
    with pytest.raises(ConfigError, match=rf"cuts text by the pre-tokenizer {pre!r}; supported: 'llama-bpe', "):
        load_model_text(write(tmp_path / "m.gguf", fields))


def test_a_file_without_a_pre_tokenizer_is_refused(tmp_path: Path) -> None:
    fields = {key: value for key, value in byte_level("gpt-2").items() if key != "tokenizer.ggml.pre"}
    with pytest.raises(ConfigError, match=r"does not say how its tokenizer cuts text \(tokenizer.ggml.pre\)"):
        load_model_text(write(tmp_path / "m.gguf", fields))
