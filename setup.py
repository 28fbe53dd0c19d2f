"""Builds the compiled code (src/narrows/native/csrc) for every target of its CPU family; all else is in pyproject.toml.

Optional: where no compiler is found the install goes on without them, and `narrows.native.why_absent` says so.
"""

import hashlib
import os
import re
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from platform import machine
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

CSRC = Path("src/narrows/native/csrc")
FILES = sorted(path for path in CSRC.rglob("*") if path.is_file())
DIGEST = hashlib.sha256(b"".join(path.read_bytes() for path in FILES)).hexdigest()


def targets() -> dict[str, list[str]]:
    """The compiler's options for each target that is compiled here, the least demanding first."""
    found = re.findall(r"^TARGET\((\w+),((?:\s*FEATURE\(\"\w+\"\))*)\s*\)$", (CSRC / "targets.def").read_text(), re.M)
    options = {name: [f"-m{feature}" for feature in re.findall(r'"([^"]+)"', features)] for name, features in found}
    there = {name: given for name, given in options.items() if not given or machine() in ("x86_64", "AMD64")}
    return dict(reversed(there.items()))


class ManyTargets(build_ext):
    """Compiles the kernels once for each target, and as many files at once as there are cores."""

    def get_ext_filename(self, fullname: str) -> str:
        """Without Python's version in it: the library calls no function of Python's, and none of torch's."""
        return f"{Path(*fullname.split('.'))}.so"

    def build_extension(self, ext: Extension) -> None:
        one_by_one = self.compiler.compile

        def compile_one(source: str, target: str | None, flags: list[str], options: dict[str, Any]) -> list[str]:
            if target is not None:
                options = {
                    **options,
                    "macros": [*options["macros"], ("NARROWS_TARGET", target)],
                    "extra_postargs": [*options["extra_postargs"], *flags],
                    "output_dir": str(Path(options["output_dir"], target)),
                }
            made: list[str] = one_by_one([source], **options)
            return made

        def compile_all(sources: list[str], **options: Any) -> list[str]:
            kernels = [source for source in sources if Path(source).parent.name == "kernels"]
            work = [(source, None, []) for source in sources if source not in kernels]
            # In this order: where several targets have the same function of the standard library, the linker takes the
            # first one, which every CPU can run.
            work += [(source, target, flags) for target, flags in targets().items() for source in kernels]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return list(chain(*pool.map(lambda one: compile_one(*one, options), work)))

        for target in ("", *targets()):
            for source in ext.sources:
                Path(self.build_temp, target, source).parent.mkdir(parents=True, exist_ok=True)
        self.compiler.compile = compile_all
        super().build_extension(ext)


class AnyPython(bdist_wheel):
    """A wheel for every Python 3 of this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    cmdclass={"build_ext": ManyTargets, "bdist_wheel": AnyPython},
    ext_modules=[
        Extension(
            "narrows.native._narrows",
            sources=[str(path) for path in FILES if path.suffix == ".cpp"],
            depends=[str(path) for path in FILES if path.suffix != ".cpp"],
            include_dirs=[str(CSRC)],
            define_macros=[("NARROWS_SOURCES", f'"{DIGEST}"')],
            extra_compile_args=[
                *("-O3", "-g0", "-std=c++20", "-ffp-contract=off"),
                *("-fopenmp", "-fvisibility=hidden", "-Wall"),
            ],
            extra_link_args=["-fopenmp"],
            optional=True,
        )
    ],
)
