"""Builds wheel and source archive, installs the bare wheel in a fresh venv, and runs the commands that it supports.

    python tests/bare.py FOLDER

For `make test-bare`, because pip needs a package index. Exits with 1 at the first failure.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
LICENCES = ("LICENSE", "NOTICE", "src/narrows/cost/data/NOTICE")
V3 = ("deepseek-v3", "--device", "h20", "--dp", "2", "--tp", "4")


def run(*command: str | Path, code: int = 0) -> str:
    """Output of the command on both streams; it must exit with ``code``."""
    print(f"$ {' '.join(map(str, command))}", flush=True)
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != code:
        sys.exit(f"ended with {done.returncode}, not {code}:\n{done.stdout}")
    return done.stdout


def need(condition: bool, what: str) -> None:
    if not condition:
        sys.exit(f"not as promised: {what}")


def check_archives(folder: Path) -> Path:
    """The wheel; it and the source archive carry the licences, and nothing that was compiled elsewhere."""
    (wheel,), (source,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as built, tarfile.open(source) as sources:
        in_wheel, in_source = built.namelist(), sources.getnames()
    for licence in LICENCES:
        need(any(name.endswith(f".dist-info/licenses/{licence}") for name in in_wheel), f"{licence} in the wheel")
        need(any(name.endswith(f"/{licence}") for name in in_source), f"{licence} in the source archive")
    need("narrows/cost/data/NOTICE" in in_wheel, "the notice beside the price tables")
    need(not any(name.endswith(".so") for name in in_source), "no compiled code in the source archive")
    return wheel


def main() -> None:
    folder = Path(sys.argv[1])
    python = folder.absolute() / "venv" / "bin" / "python"
    pip = (python, "-m", "pip", "--quiet", "--disable-pip-version-check")
    run(*pip, "install", "build")
    run(python, "-m", "build", "--outdir", folder, ".")
    wheel = check_archives(folder)
    run(*pip, "uninstall", "--yes", "build")
    # Without a compiler: the code in the wheel is another matter, this is a build from the source archive.
    os.environ |= {"CC": "/nowhere/cc", "CXX": "/nowhere/cxx"}
    run(*pip, "install", "--no-binary", "narrows", *folder.glob("*.tar.gz"))
    need("plan" in run(python, "-m", "narrows", "--help"), "a build without a compiler installs")
    run(*pip, "install", "--force-reinstall", "--no-deps", wheel)
    need("torch" not in run(*pip, "list"), "no torch")
    narrows = (python, "-m", "narrows")
    need("against the best" in run(*narrows, "plan", *V3, "--rows", "16384"), "a plan")
    need("TPOT" in run(*narrows, "simulate", *V3, "--rate", "2", "--num-requests", "8"), "a simulation")
    need("[engine]" in run(*narrows, "generate", "narrows-demo", "--prompt", "x", code=2), "generate names its extra")
    need("[serve]" in run(*narrows, "serve", "narrows-demo", code=2), "serve names its extra")
    print("as promised: narrows plans and simulates without torch")


if __name__ == "__main__":
    main()
