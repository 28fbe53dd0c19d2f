"""TextStream: the joined pieces equal decode of all ids, for any ids; and text is held back only where needed."""

import functools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from narrows.text import TextStream
from narrows.text import Tokenizer as FolderTokenizer
from narrows.text.folder import TokenizerFiles

SPECIAL = ["<unk>", "<s>", "</s>"]
WORDS = "the narrow road the wide road"


def byte_level():
    """Tokens are pieces of UTF-8, which may begin or end inside a character."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([WORDS, "你好你们 нет 😀😃🇩🇪 é"], trainer)
    return backend


def sentencepiece(decoder):
    """Tokens are text with U+2581 for a space; characters it lacks are byte tokens."""
    pieces = ["", "\u2581", "\u2581\u2581", "\u2581the", "\u2581road", "the", "a", "b", "é", "\ufffd", "你"]
    names = [*SPECIAL, *(f"<0x{i:02X}>" for i in range(256)), *pieces, *"throd"]
    vocab = {name: i for i, name in enumerate(dict.fromkeys(names))}
    merges = [("t", "h"), ("r", "o"), ("\u2581", "\u2581")]
    vocab |= {left + right: vocab.get(left + right, len(vocab) + i) for i, (left, right) in enumerate(merges)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    if decoder is not None:
        backend.decoder = decoder
    backend.add_special_tokens(SPECIAL)
    return backend


def llama():
    """Llama 2's decoder: the first space of the whole text is dropped."""
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return sentencepiece(decoders.Sequence(parts))


def gemma():
    """Gemma's: no space is dropped."""
    return sentencepiece(decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]))


def metaspace():
    """T5's: every space of the first token is dropped; byte tokens stay as they are spelled."""
    return sentencepiece(decoders.Metaspace())


def words():
    """No decoder: tokens are joined with spaces."""
    return sentencepiece(None)


BACKENDS = [byte_level, llama, gemma, metaspace, words]


@functools.cache
def make(build):
    """The tokenizer of a backend, as if its folder held tokenizer.json only."""
    nothing = {"named": {}, "added": {}, "extra": (), "templates": {}, "eos_ids": frozenset()}
    return FolderTokenizer(build(), TokenizerFiles(folder=Path(), **nothing, split_special_tokens=False))


def pieces(tokenizer, ids, skip=True):
    """The pieces of each push and of finish."""
    stream = TextStream(tokenizer, skip_special_tokens=skip)
    return [*(stream.push(i) for i in ids), stream.finish()]


@pytest.mark.parametrize("build", BACKENDS)
@given(text=st.text(max_size=40) | st.text(alphabet="a the road 你😀é\ufffd", max_size=40), skip=st.booleans())
def test_streamed_text_equals_the_decoded_text(build, text, skip):
    tokenizer = make(build)
    ids = tokenizer.encode(text)
    assert "".join(pieces(tokenizer, ids, skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("build", BACKENDS)
@given(data=st.data(), skip=st.booleans())
def test_any_ids_decode_to_text(build, data, skip):
    """A model may sample anything: cut characters, special tokens inside them, ids that nobody spelled."""
    tokenizer = make(build)
    size = tokenizer.vocab_size
    some = st.integers(0, size + 2) | st.integers(max(size - 20, 0), size - 1) | st.integers(0, 4)
    utf8 = st.sampled_from([i for i in range(size) if "\ufffd" in tokenizer.decode([i])] or [0])
    ids = data.draw(st.lists(some | utf8, max_size=30))
    assert "".join(pieces(tokenizer, ids, skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


def test_a_character_is_emitted_with_its_last_byte():
    tokenizer = make(byte_level)
    alphabet = {tokenizer.decode([i]): i for i in range(tokenizer.vocab_size)}
    ids = tokenizer.encode("\u0928a", add_special_tokens=False)  # three bytes that no merge joins
    assert len(ids) == 4
    assert pieces(tokenizer, ids) == ["", "", "\u0928", "a", ""]
    assert pieces(tokenizer, [alphabet["a"], *ids[:2]]) == ["a", "", "", "\ufffd"]
    assert pieces(tokenizer, [*ids[:2], alphabet["a"]]) == ["", "", "\ufffda", ""]


def test_byte_tokens_are_emitted_when_their_run_ends():
    tokenizer = make(llama)
    run, letter = tokenizer.encode("\u0928")[1:], tokenizer.encode("a")[-1]
    assert pieces(tokenizer, [*run, letter]) == ["", "", "", "\u0928a", ""]
    assert pieces(tokenizer, [*run, run[0], letter]) == ["", "", "", "", "\ufffd\ufffd\ufffd\ufffda", ""]
    assert pieces(tokenizer, run) == ["", "", "", "\u0928"]


def test_spaces_between_words_stay_and_the_first_goes():
    tokenizer = make(llama)
    ids = [tokenizer._backend.token_to_id(name) for name in ("\u2581the", "\u2581road", "\u2581the")]
    assert pieces(tokenizer, ids) == ["the", " road", " the", ""]
    assert pieces(tokenizer, [ids[0], 1, ids[1]]) == ["the", "", " road", ""]
    nothing = tokenizer._backend.token_to_id("")
    assert pieces(tokenizer, [ids[0], nothing, nothing, ids[1]]) == ["the", "", "", " road", ""]
    assert pieces(tokenizer, [1, ids[0], ids[1]], skip=False) == ["<s>", " the", " road", ""]


def test_the_cost_of_a_token_does_not_grow_with_the_text():
    tokenizer = make(byte_level)
    stream = TextStream(tokenizer)
    for token in tokenizer.encode(WORDS * 200):
        stream.push(token)
        assert len(stream._ids) <= 1


class Counted:
    """A tokenizer that keeps how many ids it decodes at once."""

    def __init__(self, tokenizer: FolderTokenizer) -> None:
        self._tokenizer = tokenizer
        self.most = 0

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        self.most = max(self.most, len(ids))
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def __getattr__(self, name: str):
        return getattr(self._tokenizer, name)


@given(st.lists(st.sampled_from([0x80, 0xE4, 0xBD, 0xA0, 0xF0, 0x41]), min_size=1, max_size=3), st.integers(20, 60))
def test_endless_partial_characters_have_bounded_cost(codes: list[int], times: int) -> None:
    tokenizer = make(byte_level)
    tokens = {
        tokenizer.bytes_of(token): token for token in range(tokenizer.vocab_size) if not tokenizer.is_special(token)
    }
    ids = [tokens[bytes([code])] for code in codes] * times
    counted = Counted(tokenizer)
    stream = TextStream(counted)
    pieces = [stream.push(token) for token in ids]
    most = counted.most
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids)
    assert most <= 24
