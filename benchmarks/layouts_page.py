"""Prints docs/layouts.md: what the planner picks for DeepSeek models on five GPUs, and what it saves.

    python benchmarks/layouts_page.py > docs/layouts.md

Knows planners and their words; imports no torch and needs no GPU. Every figure of the page is made here, from the same
prices as ``narrows plan``; a test holds the page against this output.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial

from narrows.arch.presets import preset
from narrows.arch.stages import PriceClass
from narrows.arch.weight_sharding import WeightSharding, sharding_words
from narrows.cost.devices import device
from narrows.cost.memory import MemoryUse
from narrows.cost.pricer import StepShape
from narrows.layout import Mesh, Topology, split_evenly
from narrows.plan.named import applicable_layouts
from narrows.plan.plan import OpKind, Plan
from narrows.plan.planner import Deployment, Planner, choose_sharding
from narrows.plan.report.evidence import nodes_line
from narrows.plan.report.explain import describe, layout_words, main_segment

ROWS = (128, 1024, 4096, 16384)
CONTEXT = 4096
EIGHT = (Mesh.of(dp=1, tp=8), Mesh.of(dp=2, tp=4), Mesh.of(dp=8, tp=1))
SIXTEEN = (Mesh.of(dp=1, tp=16), Mesh.of(dp=2, tp=8), Mesh.of(dp=16, tp=1))
ON = (
    ("h20", "deepseek-v3", "fp8", EIGHT),
    ("h100", "deepseek-v3", "fp8", EIGHT),
    ("h100", "deepseek-v3", "fp8", SIXTEEN),
    ("h200", "deepseek-v3", "fp8", EIGHT),
    ("b200", "deepseek-v3", "fp8", EIGHT),
    ("a100", "deepseek-v3", "bf16", EIGHT),
    ("a100", "deepseek-v2", "bf16", EIGHT),
)
"""Device, model, dtype, meshes."""
NAMED = ("all-reduce", "attn-tp-input-scattered", "norm-before-gather", "sequence-parallel")
HEAD = f"""# What the planner picks, and what it saves

This page is the output of `python benchmarks/layouts_page.py`, which asks the planner what `narrows plan` asks it; a
test holds the two together. One prefill step of so many rows in all, context {CONTEXT}, one row per sequence with
logits, in a CUDA graph. **These are predictions**: no row of it has been run on these machines.

*Weight sharding* is chosen for that one step among the ways that fit memory with its KV cache, as by `narrows plan`.
The named layouts have the published sharding. The last columns say what each costs more than the plan picked.
`all-reduce` is what engines did before the two publications ([what was published](published.md)). **A** is
`attn-tp-input-scattered`, **B** is `norm-before-gather`, "seq" is Megatron's `sequence-parallel`. A dash means that a
layout does not apply. *Published sharding* is the same for `auto` with the published sharding: it separates what the
sharding saves from what the layouts save. *Prices* gives the sources of the picked plan's time: m measured, i
interpolated between measured points, s scaled from another device or size, r roofline. A roofline states its
efficiency. A plan is described by its moves into attention and into the experts in most layers. The place of the
router follows, and any unpublished weight sharding. "Last layer narrow": the last layer's experts see only the rows
whose logits are requested, in every plan picked here where that saves anything.

No plan below has an all-reduce with its norm as one op, because GPUs have no such kernel here. Rows travel plain:
int8 or fp8 rows in gathers are off by default ([encoded rows](encoded-rows.md)).
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One step on one mesh: the plan picked, its weight sharding, and what the named layouts cost more, as a share."""

    plan: Plan
    sharding: WeightSharding
    more: dict[str, float]


def cells(deployment: Deployment) -> Iterator[Cell]:
    """One per number of rows."""
    planner_of = cache(partial(Planner, deployment))
    for rows in ROWS:
        shape = step(deployment.mesh, rows)
        sharding = choose_sharding(deployment, [(shape, 1.0)], planner_of)
        plan = planner_of(sharding).plan(shape)
        named = applicable_layouts(deployment.config, deployment.mesh)
        more = {name: planner_of(WeightSharding()).plan(shape, name).ps / plan.ps - 1 for name in named}
        yield Cell(plan=plan, sharding=sharding, more=more)


def step(mesh: Mesh, rows: int) -> StepShape:
    return StepShape.of(mesh, split_evenly(rows, mesh.num_groups), phase="prefill", context=CONTEXT)


# -- words -------------------------------------------------------------------------------------------------------------


def words(deployment: Deployment, found: Cell) -> str:
    plan = found.plan
    parts = [describe(plan).replace("reduce-scatter", "RS").replace("all-gather", "AG").replace("all-reduce", "AR")]
    router = next((op for op in main_segment(plan).ops if op.name == "router"), None)
    if router is not None:
        parts.append(f"router at {layout_words(plan.mesh, router.layout)}")
    if any(layer is not None and op.kind is OpKind.SELECT for layer, op in plan.ops()):
        parts.append("last layer narrow")
    published = sharding_words(deployment.config, WeightSharding()).split(", ")
    parts += [word for word in sharding_words(deployment.config, found.sharding).split(", ") if word not in published]
    return "; ".join(parts)


def sources(plan: Plan) -> str:
    """Shares of the plan's time by where its prices come from, those of 1 % and more."""
    ps: Counter[str] = Counter()
    for segment in plan.segments:
        for op in segment.ops:
            ps[op.source.label[0]] += op.ps * segment.times
    return " ".join(f"{letter} {share:.0f} %" for letter in "misr" if (share := 100 * ps[letter] / plan.ps) >= 1)


def unfit(memory: MemoryUse) -> str:
    return (
        f"does not fit: weights {memory.weights / 1e9:.1f} GB on the fullest rank, and {memory.usable / 1e9:.1f} GB of "
        f"{memory.device / 1e9:.0f} GB are usable"
    )


def percent(cell: Cell, name: str) -> str:
    return f"{100 * cell.more[name]:.1f} %" if name in cell.more else "-"


# -- the page ----------------------------------------------------------------------------------------------------------


def section(name: str, model: str, dtype: str, meshes: tuple[Mesh, ...]) -> Iterator[str]:
    on = device(name)
    size = meshes[0].size
    yield f"\n## {model} in {dtype} on {size} x {on.title}\n"
    nodes = Topology(size // 8, 8) if size > 8 else None
    deployments = [Deployment(config=preset(model), mesh=mesh, device=on, dtype=dtype, nodes=nodes) for mesh in meshes]
    fits = [deployment for deployment in deployments if deployment.memory(WeightSharding()).fits]
    for deployment in deployments:
        if deployment not in fits:
            yield f"- {deployment.mesh}: {unfit(deployment.memory(WeightSharding()))}"
    if not fits:
        return
    if len(fits) < len(deployments):
        yield ""
    if size > 8:
        yield f"{nodes_line(deployments[0])} ([topology](topology.md)).\n"
    yield "| mesh | rows | ms | picked | all-reduce | A | B | seq | published sharding | communication | prices |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for deployment in fits:
        for found in cells(deployment):
            plan = found.plan
            shape_holds = deployment.memory(found.sharding).holds(plan.shape.kv_tokens)
            note = "" if shape_holds else " (no room for this step's KV cache)"
            share = 100 * plan.totals()[PriceClass.COMMUNICATION] / plan.seconds
            more = " | ".join(percent(found, each) for each in (*NAMED, "auto"))
            yield (
                f"| {deployment.mesh} | {plan.shape.rows.total} | {plan.seconds * 1e3:.2f} | "
                f"{words(deployment, found)}{note} | {more} | {share:.0f} % | {sources(plan)} |"
            )
    yield f"\nPrices of the {name}: " + "; ".join(f"{group}: {text}" for group, text in on.sources) + "."


def page() -> str:
    lines = [HEAD]
    for each in ON:
        lines += section(*each)
    lines += beside_the_prototype()
    return "\n".join(lines) + "\n"


# -- beside an independent search --------------------------------------------------------------------------------------

PROTOTYPE = {
    ("h20", 1, 8): ((1.0, 0.1), (11.8, 1.9), (15.0, 2.0), (15.5, 2.2)),
    ("h100", 1, 8): ((0.2, 0.1), (5.9, 1.1), (13.3, 1.5), (17.9, 2.4)),
    ("b200", 1, 8): ((0.1, 1.4), (3.5, 0.4), (15.1, 3.2), (24.6, 6.1)),
    ("h20", 2, 4): ((2.8, 2.0), (11.0, 8.9), (12.8, 10.3), (11.9, 9.3)),
    ("h100", 2, 4): ((2.4, 1.7), (8.5, 6.7), (17.8, 14.0), (21.0, 15.7)),
    ("b200", 2, 4): ((4.6, 3.7), (6.9, 5.3), (19.3, 16.1), (26.2, 21.4)),
    ("h100", 8, 1): ((2.8, 2.1), (8.5, 5.6), (16.2, 9.0), (19.4, 9.1)),
}
"""What an independent prototype found, in %: all-reduce and the published layout against the best plan."""


def beside_the_prototype() -> Iterator[str]:
    yield """
## Beside an independent prototype

Before this planner there was a prototype of the search, written apart from it, with its own prices from the same
tables. The table is for DeepSeek-V3 in FP8 on 8 GPUs, published sharding, memory ignored (so H100 too). It says, in
%, what all-reduce costs more than the best plan / what the published layout does (A at dp 1, else B). The prototype's
figures follow in brackets.

| | 128 rows | 1024 | 4096 | 16384 |
|---|---|---|---|---|"""
    for (name, dp, tp), theirs in PROTOTYPE.items():
        mesh = Mesh.of(dp=dp, tp=tp)
        planner = Planner(
            Deployment(config=preset("deepseek-v3"), mesh=mesh, device=device(name), dtype="fp8"), WeightSharding()
        )
        words = []
        for rows, (their_first, their_second) in zip(ROWS, theirs, strict=True):
            best = planner.plan(step(mesh, rows)).ps
            pair = (NAMED[0], NAMED[1 + (dp > 1)])
            ours = [planner.plan(step(mesh, rows), each).ps / best * 100 - 100 for each in pair]
            words.append(f"{ours[0]:.1f} / {ours[1]:.1f} ({their_first:.1f} / {their_second:.1f})")
        yield f"| {name}, {mesh} | {' | '.join(words)} |"
    yield BESIDE


BESIDE = """
Only the prototype's figures are left, so differences are explained here as far as that can be checked:

- Both find the same order nearly everywhere. It is all-reduce at few rows; from about 1000 rows on both collectives
  are converted and the router runs on slices. The most to gain is at dp 2 x tp 4.
- Every plan here may run the last layer's experts on the rows with logits alone, which no named layout does. Without
  that `auto` on H20, dp 1 x tp 8, 4096 rows is 15.7 / 2.5, so it adds about 1 to each figure.
- At 128 rows, and on B200 at 1024, A costs more here than in the prototype. In the measured B200 curves at 1024 rows
  a reduce-scatter and a gather of the latent take 113 us, an all-reduce 52. So 61 layers lose 3.7 ms of about 41,
  more than the narrower projection and norm give back. The prototype must have priced those small collectives
  otherwise.
- At 4096 rows and more on H100 and B200 all-reduce costs less here than in the prototype (12.4 against 19.4 at dp 8).
  The router is priced at the bf16 rate on GPUs here ([decisions](decisions.md)), and the attention core is part of
  the total. With a dearer router or a cheaper rest the same difference in collectives is a larger share.

The larger savings of the tables above are mostly `experts whole` (the column *published sharding*). With whole
experts on a rank their GEMMs are wider, and a rank reads fewer of them. The saving rests on an assumed imbalance of
1.2 between ranks, and on GEMM efficiencies that were measured for other shapes. It is a prediction to try, not a
promise."""


if __name__ == "__main__":
    print(page(), end="")
