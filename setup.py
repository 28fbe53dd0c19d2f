"""Builds the compiled code (src/narrows/native/csrc) for this machine; all else is in pyproject.toml.

Optional: where no compiler is found the install goes on without them, and `narrows.native.why_absent` says so.
"""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from itertools import chain
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(Path("src/narrows/native/csrc").iterdir())))


class ManyCompilers(build_ext):
    """Compiles as many files at once as there are cores; setuptools goes through them one by one."""

    def build_extension(self, ext: Extension) -> None:
        one_by_one = self.compiler.compile

        def compile_all(sources: list[str], **options: Any) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return list(chain(*pool.map(lambda source: one_by_one([source], **options), sources)))

        for source in ext.sources:
            Path(self.build_temp, source).parent.mkdir(parents=True, exist_ok=True)
        self.compiler.compile = compile_all
        super().build_extension(ext)


setup(
    cmdclass={"build_ext": ManyCompilers},
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
    ],
)
