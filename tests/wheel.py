"""Installs the wheel of `make wheel` in a fresh venv without a compiler, and runs it there on every target of this CPU.

    python tests/wheel.py FOLDER

For `make test-wheel`, because pip needs a package index. Exits with 1 at the first thing that is not as promised.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
V3 = ("deepseek-v3", "--device", "h20", "--dp", "2", "--tp", "4", "--rows", "16384")
DEMO = ("narrows-demo", "--tp", "2", "--ranks", "processes", "--chat", "--prompt", "What is 47 + 38?")


class Venv:
    """A venv in ``folder`` whose commands find nothing else on their path: no compiler, and no narrows of this tree."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder, folder / "venv" / "bin"
        kept = ("HOME", "LANG", "PIP_CERT", "PIP_CONFIG_FILE", "SSL_CERT_FILE", "http_proxy", "https_proxy", "no_proxy")
        self.environment = {name: os.environ[name] for name in kept if name in os.environ}
        self.environment |= {"PATH": str(self.bin), "CC": "/nowhere/cc", "CXX": "/nowhere/c++"}
        self.environment |= {name: value for name, value in os.environ.items() if name.startswith("PIP_")}

    def run(self, name: str, *arguments: str | Path, code: int = 0, **environment: str) -> str:
        """What a command of the venv printed; it must end with ``code``."""
        given = (f"{key}={value}" for key, value in environment.items())
        print("$", *given, name, *arguments)
        sys.stdout.flush()
        done = subprocess.run(
            [self.bin / name, *arguments],
            cwd=self.folder,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode != code:
            sys.exit(f"ended with {done.returncode}, not {code}:\n{done.stdout}")
        return done.stdout


def need(condition: bool, what: str) -> None:
    if not condition:
        sys.exit(f"not as promised: {what}")


def the_wheel() -> Path:
    """The wheel in dist/, whose name and content are as they should be."""
    wheels = list((ROOT / "dist").glob("*.whl"))
    if len(wheels) != 1:
        sys.exit(f"dist/ has {len(wheels)} wheels: make wheel builds the one that is tested here")
    (wheel,) = wheels
    need(
        re.fullmatch(r"narrows-[\d.]+-py3-none-manylinux[\w.]+\.whl", wheel.name) is not None, f"the name {wheel.name}"
    )
    with zipfile.ZipFile(wheel) as built:
        names = built.namelist()
    need([name for name in names if ".so" in name] == ["narrows/native/_narrows.so"], "one library, and none beside it")
    return wheel


def check_targets(venv: Venv) -> list[str]:
    """The targets that this CPU can run; the best one must run."""
    found = json.loads(venv.run("narrows", "info", "--json"))["compiled_code"]
    sources = (ROOT / "src/narrows/native/csrc/targets.def").read_text()
    names = re.findall(r"^TARGET\((\w+),", sources, re.MULTILINE)
    need(all(target["compiled"] for target in found["targets"]), "every target is compiled")
    if found["targets"][0]["name"] != "baseline":  # another family of CPUs has baseline alone
        need([target["name"] for target in found["targets"]] == names, f"the targets are {', '.join(names)}")
    can = [target["name"] for target in found["targets"] if not target["missing"]]
    need(found["running"] == can[0], f"the best target runs, which is {can[0]}")
    return can


def main() -> None:
    wheel, venv = the_wheel(), Venv(Path(sys.argv[1]).absolute())
    constraints = ("--constraint", ROOT / "constraints.txt")
    quiet = ("-m", "pip", "--quiet", "--disable-pip-version-check")
    for compiler in ("gcc", "g++", "cc", "c++", "clang"):
        need(not (venv.bin / compiler).exists(), f"no {compiler} is on the path")
    venv.run("python", *quiet, "install", *constraints, wheel)
    need("against the best" in venv.run("narrows", "plan", *V3), "a plan without torch")
    bare = json.loads(venv.run("narrows", "info", "--json"))
    need(bare["torch"] is None, "no torch yet")
    venv.run("python", *quiet, "install", *constraints, f"{wheel}[engine]")
    can = check_targets(venv)
    for target in can:
        out = venv.run("narrows", "generate", *DEMO, NARROWS_TARGET=target)
        need("\n85\n" in out, f"the right sum on {target}")
        need("collectives: shared memory" in out, f"compiled collectives on {target}")
    out = venv.run("narrows", "generate", *DEMO, NARROWS_NATIVE="0")
    need("\n85\n" in out and "gloo" in out, "the right sum without compiled code")
    venv.run("python", "-m", "narrows", "verify", "narrows-demo", "--tp", "2")
    print(f"as promised: {wheel.name} runs without a compiler on {', '.join(can)}")


if __name__ == "__main__":
    main()
