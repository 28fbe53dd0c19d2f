"""Builds the compiled code (src/narrows/native/csrc) for this machine; all else is in pyproject.toml.

Optional: where no compiler is found the install goes on without them, and `narrows.native.why_absent` says so.
"""

from glob import glob

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "narrows.native._narrows",
            sources=sorted(glob("src/narrows/native/csrc/*.cpp")),
            depends=sorted(glob("src/narrows/native/csrc/*.h")),
            extra_compile_args=["-O3", "-march=native", "-std=c++20", "-fopenmp", "-fvisibility=hidden", "-Wall"],
            extra_link_args=["-fopenmp"],
            optional=True,
        )
    ]
)
