"""How byte-level BPE cuts text before merging, by the names of ``tokenizer.ggml.pre``.

GGUF stores the NAME; the regexes live in llama.cpp, which in turn follows the models' own ``tokenizer.json``. Here each
name stands for the pre-tokenizer (and normalizer) of the models it was made for, since the ids of a text are those of
the model's own tokenizer. Where llama.cpp's engine needed another spelling of a regex, the model's is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

__all__ = ["PRE_TOKENIZERS", "PreTokenizer"]

CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
QWEN2 = (
    rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)  # digits in threes, else the same
QWEN35 = QWEN2.replace(r"\p{L}+", r"[\p{L}\p{M}]+", 1).replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")

_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"


def _cased(upper: str, lower: str, ending: str, digits: str, slash: str) -> str:
    """Words that end where lower case becomes upper case (tiktoken's o200k, and those made after it)."""
    start = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{start}[{upper}]*[{lower}]+{ending}|{start}[{upper}]+[{lower}]*{ending}|{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n{slash}]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


TEKKEN = _cased(_UPPER, _LOWER, "", r"\p{N}", "/")
O200K = _cased(_UPPER, _LOWER, CONTRACTION + "?", r"\p{N}{1,3}", "/")
_NO_HAN = r"&&[^\p{Han}]"
KIMI_K2 = r"[\p{Han}]+|" + _cased(_UPPER + _NO_HAN, _LOWER + _NO_HAN, CONTRACTION + "?", r"\p{N}{1,3}", "")

DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",  # noqa: RUF001
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
DEEPSEEK_CODER = ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+")
_CASED_LETTERS = (
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 388-38A "
    "38C 38E-3A1 3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF "
    "1D00-1D2B 1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D "
    "1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 "
    "1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128 212A-212D 212F-2134 2139 213C-213F "
    "2145-2149 214E 2183 2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 A640-A66D A680-A69B A722-A76F "
    "A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3 "
    "104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943"
)
"""Code points of the letters with case that DeepSeek's first tokenizer takes for words, in hexadecimal."""


def _class(ranges: str) -> str:
    """The regex of one character out of ``41-5A B5 ...``."""
    return "[" + "".join("-".join(f"\\x{{{end}}}" for end in part.split("-")) for part in ranges.split()) + "]"


DEEPSEEK_LLM = (
    "[\r\n]",
    rf"\s?{_class(_CASED_LETTERS)}+",
    r"\s?[!-/:-~！-／：-～‘-‟　-。]+",  # noqa: RUF001
    r"\s+$",
    DEEPSEEK_CODER[3],
)


@dataclass(frozen=True, kw_only=True)
class PreTokenizer:
    """What a name under ``tokenizer.ggml.pre`` stands for.

    ``regexes``: text is cut by each in turn, whatever lies between matches being a piece too. ``single_digits``: then
    every digit alone. ``gpt2``: then GPT-2's words. ``composed``: characters are composed first (NFC).
    ``ignore_merges``: a word that is a token is that token, whatever the merges would make of it. ``adds_bos``: what is
    done where the file does not say.
    """

    regexes: tuple[str, ...] = ()
    single_digits: bool = False
    gpt2: bool = False
    composed: bool = False
    ignore_merges: bool = False
    adds_bos: bool = False

    def cut(self, backend: Tokenizer) -> None:
        """Set the normalizer and the pre-tokenizer of ``backend``."""
        steps: list[pre_tokenizers.PreTokenizer] = [
            pre_tokenizers.Split(Regex(regex), behavior="isolated") for regex in self.regexes
        ]
        if self.single_digits:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.gpt2))
        if self.composed:
            backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]


_GPT2 = PreTokenizer(gpt2=True)
_DIGITS_GPT2 = PreTokenizer(gpt2=True, single_digits=True)
_QWEN2 = PreTokenizer(regexes=(QWEN2,), composed=True)
_LLAMA3 = PreTokenizer(regexes=(LLAMA3,), ignore_merges=True, adds_bos=True)
_O200K = PreTokenizer(regexes=(O200K,))

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = MappingProxyType(
    {
        "llama-bpe": _LLAMA3,
        "llama3": _LLAMA3,
        "llama-v3": _LLAMA3,
        "smaug-bpe": PreTokenizer(regexes=(LLAMA3,)),  # a Llama 3 that was converted under another name
        "glm4": PreTokenizer(regexes=(LLAMA3,), ignore_merges=True),
        "tekken": PreTokenizer(regexes=(TEKKEN,), ignore_merges=True, adds_bos=True),
        "gpt-4o": _O200K,
        "llama4": _O200K,
        "kanana2": _O200K,
        "qwen2": _QWEN2,
        "deepseek-r1-qwen": _QWEN2,
        "megrez": PreTokenizer(regexes=(QWEN2,)),
        "stablelm2": PreTokenizer(regexes=(QWEN2,)),
        "qwen35": PreTokenizer(regexes=(QWEN35,), composed=True),
        "deepseek-llm": PreTokenizer(regexes=DEEPSEEK_LLM, single_digits=True),
        "deepseek-coder": PreTokenizer(regexes=DEEPSEEK_CODER, single_digits=True),
        "deepseek-v3": PreTokenizer(regexes=DEEPSEEK_V3),
        "joyai-llm": PreTokenizer(regexes=DEEPSEEK_V3),
        "kimi-k2": PreTokenizer(regexes=(KIMI_K2,), ignore_merges=True),
        "gpt-2": _GPT2,
        "gigachat": _GPT2,
        "mellum": _GPT2,
        "trillion": _GPT2,
        "smollm": _DIGITS_GPT2,
        "starcoder": _DIGITS_GPT2,
        "refact": _DIGITS_GPT2,
        "codeshell": _DIGITS_GPT2,
        "minerva-7b": _DIGITS_GPT2,
    }
)
"""The known values of ``tokenizer.ggml.pre``."""
