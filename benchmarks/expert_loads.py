"""How unevenly a real router loads ranks that hold whole experts, beside what plans are priced with.

    python benchmarks/expert_loads.py [MODEL] [TEXT ...]

Runs texts (this repository's pages by default) through MODEL (narrows-demo by default) on one rank, notes the experts
of every row in every layer, and deals those experts to 2, 4 and 8 ranks: the fullest rank's pairs over the even share,
as a mean over layers and windows of so many rows. Random tokens are no measure of a trained router.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from narrows.bench.routing import ExpertChoices
from narrows.cost.imbalance import imbalance
from narrows.engine.llm import LLM
from narrows.layout import split_evenly, starts

RANKS = (2, 4, 8)
WINDOWS = (1, 8, 64, 512)
SKEWS = (0.0, 0.6, 1.01)
TOKENS = 1024
"""Of each text."""


def loads(ids_TK: Tensor, experts: int, ranks: int, rows: int) -> Iterator[float]:
    """The fullest rank's load over the even share, for every window of so many rows."""
    spans = starts(split_evenly(experts, ranks))
    even = ids_TK.shape[1] * (spans[0][1] - spans[0][0]) / experts
    for first in range(0, ids_TK.shape[0] - rows + 1, rows):
        counts = ids_TK[first : first + rows].flatten().long().bincount(minlength=experts).tolist()
        yield max(sum(counts[lo:hi]) for lo, hi in spans) / (rows * even)


def main(model: str = "narrows-demo", *files: str) -> None:
    root = Path(__file__).parent.parent
    pages = [Path(file) for file in files] or [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    kept: list[Tensor] = []
    with LLM(model, rows_per_step=TOKENS, layout="all-reduce") as llm:
        moe = llm.resolved.config.moe
        assert moe is not None, f"{model} has no routed experts"
        engine: Any = llm.engine
        engine.instrument(ExpertChoices)
        for page in pages:
            prompt = llm.tokenizer.encode(page.read_text(encoding="utf-8"))[:TOKENS]
            llm.generate([prompt], max_tokens=1)
            kept += [ids for ids in engine.readings()[0] if len(ids) > 1]
    print(f"{model}: {moe.n_routed_experts} experts, {moe.num_experts_per_tok} a row; {len(pages)} texts")
    print("ranks  rows   router" + "".join(f"   skew {skew:g}" for skew in SKEWS))
    for ranks in RANKS:
        for rows in WINDOWS:
            found = [load for ids in kept for load in loads(ids, moe.n_routed_experts, ranks, rows)]
            priced = [
                imbalance(ranks, rows, experts=moe.n_routed_experts, top_k=moe.num_experts_per_tok, skew=skew)
                for skew in SKEWS
            ]
            mean = sum(found) / len(found)
            print(f"{ranks:5d} {rows:5d} {mean:8.3f}" + "".join(f"{each:9.3f}" for each in priced))


if __name__ == "__main__":
    main(*sys.argv[1:])
