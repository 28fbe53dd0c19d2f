"""Puts bos before a text and eos behind it, or takes them off, where a folder's config says other than its tokenizer.

``add_bos_token`` and ``add_eos_token`` of ``tokenizer_config.json`` say whether they are there; left out, what
``tokenizer.json`` adds stands. transformers 4 obeys them for Llama's tokenizers, and DeepSeek's (which are of that
class, and whose ``tokenizer.json`` adds nothing) were evaluated so; transformers 5 reads ``tokenizer.json`` alone.
"""

from __future__ import annotations

import tokenizers

from narrows.text.folder import TokenizerFiles

__all__ = ["TextEnds"]


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
    def _id(backend: tokenizers.Tokenizer, files: TokenizerFiles, role: str, asked: bool | None) -> int | None:
        return None if asked is None or role not in files.named else backend.token_to_id(files.named[role].content)

    def put(self, ids: list[int]) -> list[int]:
        """The ids with the ends that the config asks for. A text that begins with bos itself gets no second one."""
        if self._drop_bos:
            ids = ids[1:]
        if self._drop_eos:
            ids = ids[:-1]
        if self._add_bos and self._bos is not None and ids[:1] != [self._bos]:
            ids = [self._bos, *ids]
        if self._add_eos and self._eos is not None and ids[-1:] != [self._eos]:
            ids = [*ids, self._eos]
        return ids
