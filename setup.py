"""Builds the compiled code (src/narrows/native/csrc) for this machine; all else is in pyproject.toml.

Optional: where no compiler is found the install goes on without them, and `narrows.native.why_absent` says so.
"""

import hashlib
from glob import glob
from pathlib import Path

from setuptools import Extension, setup

SOURCES = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(Path("src/narrows/native/csrc").iterdir())))

setup(
    ext_modules=[
        Extension(
            "narrows.native._narrows",
            sources=sorted(glob("src/narrows/native/csrc/*.cpp")),
            depends=sorted(glob("src/narrows/native/csrc/*.h")),
            define_macros=[("NARROWS_SOURCES", f'"{SOURCES.hexdigest()}"')],
            extra_compile_args=[
                *("-O3", "-g0", "-march=native", "-std=c++20"),
                *("-fopenmp", "-fvisibility=hidden", "-Wall"),
            ],
            extra_link_args=["-fopenmp"],
            optional=True,
        )
    ]
)
