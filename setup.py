"""Builds the compiled kernels and collectives (src/narrows/native/csrc) for this machine; see pyproject.toml.

Optional: where no compiler is found the install goes on, and narrows says at start that it runs without them.
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
