"""Random config.json files: transformers' numbers, or an error of one line. Never other numbers.

`make test` runs the first seeds, each on one mesh; `make test-full` 500 legal ones on three, and 1000 damaged ones. A
failure prints the config as JSON, made smaller as long as it fails.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from fuzz_configs import MESHES, Meshes, MismatchError, Outcome, check, shrink
from random_configs import FAMILIES, Config, damaged, legal
from torch import Tensor

from narrows.weights.safetensors_folder import SafetensorsFolder

NUM_LEGAL, NUM_DAMAGED = 500, 1000
SAMPLE = range(20)
DAMAGED_SAMPLE = (*range(40), 298, 447)
"""Among the first ones, two whose lines did not name what was damaged."""

REFUSED_AND_LEGAL = {
    "rope_type dynamic needs more than 2 rotated columns": "transformers divides by 0 once a text is long enough",
}
"""Configs that are refused although transformers runs them: a pattern of the error, and the reason."""
LARGEST_SHARE = 0.02
"""Of the legal configs of a slice that may be refused for one of these reasons, or one config."""

REFUSED_AND_DAMAGED = (
    r"not valid JSON \((NaN|Infinity) is no JSON number\)",
    r"^architecture .* is not supported",
    r"attention heads",
)
"""Errors that name none of the damaged fields, because they concern several."""
MOST_ACCEPTED_HERE_ALONE = 0.12
"""Share of a slice of damaged configs that narrows runs and transformers does not, since it minds fields that change
nothing. Of a thousand it is some 3 %."""


def run(config: Config, seed: int, *, is_legal: bool, meshes: Meshes = MESHES) -> Outcome:
    try:
        return check(config, seed, is_legal=is_legal, meshes=meshes)
    except MismatchError as error:

        def fails(smaller: Config) -> bool:
            try:
                check(smaller, seed, is_legal=False, meshes=meshes)
            except MismatchError:
                return True
            return False

        small = json.dumps(shrink(config, fails))
        pytest.fail(f"seed {seed}: {error}\nas small as it was made: {small}\nwhole: {json.dumps(config)}")


def told(outcomes: Iterable[tuple[int, Outcome]]) -> Counter[str]:
    counts = Counter(str(outcome) for _, outcome in outcomes)
    print({what: f"{number} of {counts.total()}" for what, number in counts.items()})
    return counts


def one_of_the_meshes(seed: int) -> Meshes:
    return (MESHES[seed % len(MESHES)],)


def run_legal(seeds: Iterable[int], meshes_of: Callable[[int], Meshes] = lambda seed: MESHES) -> None:
    outcomes = [(seed, run(legal(seed), seed, is_legal=True, meshes=meshes_of(seed))) for seed in seeds]
    counts = told(outcomes)
    assert counts["refused"] <= max(1, LARGEST_SHARE * counts.total()), counts
    for seed, outcome in outcomes:
        reasons = [pattern for pattern in REFUSED_AND_LEGAL if re.search(pattern, outcome.refused)]
        assert not outcome.refused or reasons, f"seed {seed}: {outcome.refused}\n{json.dumps(legal(seed))}"


def run_damaged(seeds: Iterable[int]) -> None:
    outcomes = [(seed, run(damaged(seed)[0], seed, is_legal=False, meshes=one_of_the_meshes(seed))) for seed in seeds]
    counts = told(outcomes)
    for seed, outcome in outcomes:
        config, changed = damaged(seed)
        named = any(name in outcome.refused for name in changed)
        assert (
            not outcome.refused
            or named
            or any(re.search(pattern, outcome.refused) for pattern in (*REFUSED_AND_DAMAGED, *REFUSED_AND_LEGAL))
        ), f"seed {seed}: {sorted(changed)} were damaged, and the line is: {outcome.refused}\n{json.dumps(config)}"
    assert counts["accepted here alone"] <= MOST_ACCEPTED_HERE_ALONE * counts.total(), counts


def test_legal_configs_give_the_numbers_of_transformers() -> None:
    run_legal(SAMPLE, one_of_the_meshes)


def test_damaged_configs_are_refused_by_name_or_harmless() -> None:
    run_damaged(DAMAGED_SAMPLE)


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("first", range(0, NUM_LEGAL, 25))
def test_every_legal_config_equals_transformers(first: int) -> None:
    run_legal(range(first, first + 25))


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("first", range(0, NUM_DAMAGED, 50))
def test_every_damaged_config_is_refused_by_name_or_harmless(first: int) -> None:
    run_damaged(range(first, first + 50))


# -- the fuzz itself -------------------------------------------------------------------------------------------------


def test_the_seeds_cover_every_family_and_rope_type() -> None:
    configs = [legal(seed) for seed in range(NUM_LEGAL)]
    assert min(Counter(config["model_type"] for config in configs).values()) > NUM_LEGAL / len(FAMILIES) / 2
    ropes = [config.get("rope_scaling") or config.get("rope_parameters") or {} for config in configs]
    kinds = Counter(rope.get("rope_type", rope.get("type")) for rope in ropes)
    assert {"linear", "dynamic", "yarn", "longrope", "llama3"} <= {kind for kind, count in kinds.items() if count > 20}
    assert legal(7) == legal(7) and damaged(7) == damaged(7)


def test_numbers_that_are_a_little_off_are_a_mismatch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank takes another last norm than the checkpoint holds: by 1 in 2000."""
    take = SafetensorsFolder.take

    def wrong(self: SafetensorsFolder, weight: Any, *rest: Any) -> Tensor:
        return take(self, weight, *rest) * (1.0005 if weight.name == "model.norm.weight" else 1)

    monkeypatch.setattr(SafetensorsFolder, "take", wrong)
    with pytest.raises(MismatchError, match="logits differs by"):
        check(legal(3, "llama"), 3, is_legal=True, meshes=((1, 1),))


def test_a_config_that_fails_is_made_smaller() -> None:
    config = {"a": 1, "b": 2, "rope_scaling": {"type": "linear", "factor": 2}, "c": None}
    assert shrink(config, lambda c: c.get("rope_scaling", {}).get("factor") == 2) == {"rope_scaling": {"factor": 2}}
