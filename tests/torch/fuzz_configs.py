"""One config.json against transformers: random weights, three meshes, a random layout each; and shrinking of failures.

A slice of seeds by hand:  PYTHONPATH=src python tests/torch/fuzz_configs.py legal 0 50 [FAMILY]
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from random_configs import LONGEST, Config, Draw, damaged, legal
from random_models import save_random_model

from narrows.arch.config import ModelConfig, read_config
from narrows.arch.positions import most_positions
from narrows.arch.quantization import check_loadable
from narrows.engine.config import EngineConfig
from narrows.errors import CheckpointError, ConfigError
from narrows.evaluate.transformers_model import TransformersModel, load_transformers
from narrows.evaluate.verify import verify
from narrows.layout import Mesh
from narrows.models.registry import check_executable
from narrows.plan.named import applicable_layouts

Meshes = tuple[tuple[int, int], ...]
MESHES: Meshes = ((1, 1), (1, 2), (2, 2))
DECODE = 5
_ROUNDINGS = 20
"""Some random models blow up the last bit (a norm over one column that is nearly 0). A difference beyond the
tolerance, but within this multiple of transformers' own rounding, is rounding."""
_OURS = re.compile(r"read config.json differently|cannot (load|run) it|no tensor for")
"""Errors of `verify --against transformers` itself: they do not refuse a config."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of a config. ``refused``: the error line. ``nobody_runs_it``: why transformers does not run a
    config that narrows accepts. Both empty: the numbers are equal."""

    refused: str = ""
    nobody_runs_it: str = ""

    def __str__(self) -> str:
        return "refused" if self.refused else "accepted here alone" if self.nobody_runs_it else "equal"


class MismatchError(AssertionError):
    """A config that is read as another one than transformers reads, or that ends in anything but one clear line."""


def check(config: Config, seed: int, *, is_legal: bool, meshes: Meshes = MESHES) -> Outcome:
    """Refused in one line, or equal to transformers on every mesh.

    Raises:
        MismatchError: neither.
    """
    folder = Path(tempfile.mkdtemp(prefix="narrows-fuzz-"))
    try:
        return _check(folder, config, Draw(seed), is_legal=is_legal, meshes=meshes)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check(folder: Path, config: Config, draw: Draw, *, is_legal: bool, meshes: Meshes) -> Outcome:
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if refused := _one_line(lambda: _check_read(read_config(folder))):
        return Outcome(refused=refused.removeprefix(f"{folder}/config.json: "))
    read = read_config(folder)
    if (rule := _unread_rule(read)) is not None:
        return Outcome(
            nobody_runs_it=f"transformers routes this family in one way whatever its file says, not by {rule}"
        )
    try:
        save_random_model(folder, draw)
        reference = load_transformers(folder, read)
        reference.begin([[0] * min(LONGEST, most_positions(read) - DECODE - 1)])
    except Exception as error:
        if is_legal:
            raise MismatchError(f"the generator made what transformers refuses: {error!r}") from error
        return Outcome(nobody_runs_it=f"{type(error).__name__}: {error}")
    longest = min(LONGEST, most_positions(read) - DECODE - 1)  # without its scaling a model may be shorter
    prompts = [
        [draw.randrange(read.vocab_size) for _ in range(min(longest, draw.choice((1, draw.randint(2, 40), LONGEST))))]
        for _ in range(3)
    ]
    for dp, tp in meshes:
        if tp > read.num_attention_heads:
            continue  # refused by every command: a head is not split
        layout = draw.choice(sorted(applicable_layouts(read, Mesh.of(dp=dp, tp=tp))))
        engine_config = EngineConfig(model=str(folder), dp=dp, tp=tp, dtype="float32", checked=True)
        if refused := _one_line(partial(_compare, engine_config, layout, prompts, reference)):
            return Outcome(refused=refused)
    return Outcome()


def _check_read(read: ModelConfig) -> None:
    check_executable(read)
    check_loadable(read.quantization, read.name)


def _unread_rule(read: ModelConfig) -> str | None:
    """A rule of routing that is obeyed here, as in DeepSeek's own code, and that transformers does not read."""
    if read.moe is None or read.model_type not in ("deepseek_v2", "deepseek_v3"):
        return None
    scoring, method = {"deepseek_v2": ("softmax", None), "deepseek_v3": ("sigmoid", "noaux_tc")}[read.model_type]
    if read.moe.scoring_func != scoring:
        return read.moe.scoring_func
    return read.moe.topk_method if method and read.moe.topk_method != method else None


def _compare(engine_config: EngineConfig, name: str, prompts: list[list[int]], reference: TransformersModel) -> None:
    report = verify(engine_config, prompts, num_decode=DECODE, layouts=[name], outside=lambda _: reference)
    (layout,) = report.layouts
    if not report.ok and (layout.first_difference is None or layout.worst > _ROUNDINGS * _rounding(reference, prompts)):
        raise MismatchError(f"dp {engine_config.dp} x tp {engine_config.tp}, {layout.layout}: {layout.failure}")


def _rounding(reference: TransformersModel, prompts: list[list[int]]) -> float:
    """How far transformers' own float32 is from its float64, in the row where it is furthest, relative to the row."""
    exact = copy.deepcopy(reference.model).double()
    worst = 0.0
    with torch.no_grad():
        for prompt in prompts:
            want_TV = exact(torch.tensor([prompt])).logits[0]
            error_TV = reference.model(torch.tensor([prompt])).logits[0].double() - want_TV
            worst = max(worst, (error_TV.norm(dim=-1) / want_TV.norm(dim=-1)).max().item())
    return worst


def _one_line(run: Callable[[], Any]) -> str:
    """The reason why ``run`` refused; empty if it did not."""
    try:
        run()
    except (ConfigError, CheckpointError) as error:
        said = str(error)
        if not said or "\n" in said or _OURS.search(said):
            raise MismatchError(f"no clear line: {said!r}") from error
        return said
    except MismatchError:
        raise
    except Exception as error:
        raise MismatchError(f"no clear line but {type(error).__name__}: {error}") from error
    return ""


def shrink(config: Config, fails: Callable[[Config], bool]) -> Config:
    """A smaller config that fails too: each field, also of the rope, is left out if without it the rest still fails."""
    small = copy.deepcopy(config)
    ropes = [(name, inner) for name in ("rope_scaling", "rope_parameters") for inner in _dict(config.get(name))]
    for *outer, name in [*((name,) for name in config), *ropes]:
        tried = copy.deepcopy(small)
        fields = tried.get(outer[0], {}) if outer else tried
        if name in fields:
            del fields[name]
            small = tried if fails(tried) else small
    return small


def _dict(value: Any) -> Config:
    return value if isinstance(value, dict) else {}


def main() -> None:
    kind, first, last, *family = sys.argv[1:]
    told: Counter[str] = Counter()
    for seed in range(int(first), int(last)):
        config = legal(seed, *family) if kind == "legal" else damaged(seed)[0]
        what, why = "WRONG", ""
        try:
            outcome = check(config, seed, is_legal=kind == "legal")
            what, why = str(outcome), outcome.refused or outcome.nobody_runs_it
        except MismatchError as error:
            why = f"{error} {json.dumps(config)}"
        print(seed, config.get("model_type"), what, why, flush=True)
        told[what] += 1
    print(dict(told))


if __name__ == "__main__":
    main()
