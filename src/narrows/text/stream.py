"""Token ids to text as they arrive. Knows the tokenizer's `decode`, not how any kind of tokenizer spells text.

The pieces of text joined are exactly `decode` of all the ids at once. Text is held back only while a later token could
still change it:

    multi-byte characters    the last U+FFFD of the text so far may be a character whose bytes are still coming
    byte tokens (<0xE4>)     a run of them is decided as a whole: one bad byte makes every byte of the run U+FFFD

`tokenizers.DecodeStream` is not used: it has no end (a cut character is lost), and it raises "Invalid prefix
encountered" from then on when a run of byte tokens turns out to be bad (0.23).
"""

from __future__ import annotations

from narrows.text.tokenizer import Tokenizer

__all__ = ["TextStream"]

_MANY, _KEPT = 16, 8
"""Of more ids than that, whose text ends in U+FFFD, so many are kept: a character has four bytes."""


class TextStream:
    """Incremental detokenisation of one sequence of ids.

    ``push`` costs the decoding of a few tokens, however long the text, since ids whose text is settled are dropped: but
    for one, which stands before the next tokens so that a tokenizer which drops the text's first space (sentencepiece)
    does not drop theirs. Exact for decoders that spell a token without looking further ahead than the above; all known
    language models' do. (A decoder that strips the END of a text cannot be streamed.)
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        """A stream at the beginning of a text; ``skip_special_tokens`` as in `Tokenizer.decode`."""
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids: list[int] = []  # the settled id that stands in front, then all ids whose text may change
        self._num_given = 0  # characters of the text of `_ids` that have been handed out

    def push(self, token: int) -> str:
        """The text that ``token`` settles; may be empty, and may hold text of earlier tokens."""
        if self._tokenizer.is_silent(token, skip_special_tokens=self._skip):
            return ""  # not even the end of a run of byte tokens
        self._ids.append(token)
        if self._tokenizer.is_byte(token):
            return ""
        text = self._decode(self._ids)
        settled = text.removesuffix("\ufffd")
        piece = self._give(settled)
        if len(settled) == len(text):
            self._forget()
        elif len(self._ids) > _MANY:
            self._forget_front(text)
        return piece

    @property
    def held(self) -> str:
        """What is held back so far, as it will be if nothing changes it; without a character that is not complete."""
        return self._decode(self._ids)[self._num_given :].rstrip("\ufffd")

    def finish(self) -> str:
        """The text that was held back; call it once, after the last id."""
        return self._give(self._decode(self._ids))

    def _give(self, text: str) -> str:
        piece = text[self._num_given :]
        self._num_given += len(piece)
        return piece

    def _forget(self) -> None:
        """Keep the last id only, if it has text of its own: then no leading space is at stake any more."""
        last = self._ids[-1:]
        text = self._decode(last)
        if text:
            self._ids, self._num_given = last, len(text)

    def _forget_front(self, text: str) -> None:
        """Keep the last ids only, unless they begin inside a character: of parts of characters there is no end."""
        front, back = self._ids[:-_KEPT], self._ids[-_KEPT:]
        before, after = self._decode(front), self._decode(back)
        if after and before + after == text:
            self._ids, self._num_given = back, self._num_given - len(before)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)
