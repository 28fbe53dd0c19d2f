"""`plan` identifies fields and stages by their role in the model, never by name."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import narrows.plan
from narrows.arch.chain import build_chain
from narrows.arch.config import ModelConfig
from narrows.arch.presets import PRESETS, preset
from narrows.arch.stages import Chain, Field, FieldRoles, LayerType, Stage
from narrows.arch.weight_sharding import sharding_choices
from narrows.cost.devices import device
from narrows.cost.pricer import Pricer, StepShape
from narrows.layout import Encoding, Mesh, split_evenly
from narrows.plan.graph import Graph
from narrows.plan.named import applicable_layouts, named_layout
from narrows.plan.plan import Op, OpKind, Plan
from narrows.plan.report.code import plan_code
from narrows.plan.report.explain import describe
from narrows.plan.search import Search
from narrows.plan.workspace import Kernels, workspace

MESHES = [Mesh.of(dp=1, tp=1), Mesh.of(dp=1, tp=4), Mesh.of(dp=2, tp=4)]
KERNELS = Kernels(cpu=False, compiled=False, itemsize=2, skew=0.0)


def stages_of(chain: Chain) -> Iterator[Stage]:
    yield from chain.prologue
    for layer_type in chain.layer_types:
        yield from layer_type.stages
    yield from chain.epilogue


def chains_of(config: ModelConfig, mesh: Mesh) -> Iterator[Chain]:
    for sharding in sharding_choices(config, mesh):
        for want_logits in (False, True):
            yield build_chain(config, mesh, sharding, want_logits=want_logits)


def all_names() -> set[str]:
    """Of every field, bundle and stage of every family, in every weight sharding."""
    names: set[str] = set()
    for model in PRESETS:
        for chain in chains_of(preset(model), MESHES[-1]):
            names |= {*chain.fields, *(field.bundle for field in chain.fields.values())}
            names |= {stage.name for stage in stages_of(chain)}
    return names


def strings(source: str) -> Iterator[tuple[int, str]]:
    """(line, value) of every string of a module that is not a docstring."""
    nodes = list(ast.walk(ast.parse(source)))
    documents = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documents:
            yield node.lineno, node.value


def test_no_module_of_plan_names_a_field_or_a_stage() -> None:
    """Nor within a longer text, unless the name is a word of English."""
    names = all_names()
    assert {"hidden", "residual", "post_attn_norm", "experts", "topk", "shard_argmax"} <= names
    within = re.compile("|".join(rf"\b{name}\b" for name in sorted(names) if "_" in name))
    found = [
        f"{path.name}:{line}: {text!r}"
        for path in Path(narrows.plan.__path__[0]).rglob("*.py")
        for line, text in strings(path.read_text(encoding="utf-8"))
        if text in names or within.search(text)
    ]
    assert not found


# -- other names, the same plan ----------------------------------------------------------------------------------------


def other(name: str) -> str:
    return f"my_{name[::-1]}"


def renamed(chain: Chain) -> Chain:
    """``chain`` with another name for every field, bundle and stage."""

    def stage(old: Stage) -> Stage:
        fields = {what: tuple(map(other, getattr(old, what))) for what in ("reads", "writes", "frees")}
        return replace(old, name=other(old.name), **fields)

    def field(old: Field) -> Field:
        return replace(old, name=other(old.name), bundle=other(old.bundle))

    roles = chain.roles
    return Chain(
        prologue=tuple(map(stage, chain.prologue)),
        layer_types=tuple(LayerType(name=t.name, stages=tuple(map(stage, t.stages))) for t in chain.layer_types),
        layers=chain.layers,
        epilogue=tuple(map(stage, chain.epilogue)),
        fields={other(name): field(old) for name, old in chain.fields.items()},
        roles=FieldRoles(
            input=other(roles.input),
            output=other(roles.output),
            stream=other(roles.stream),
            residual=other(roles.residual),
            addends=tuple(map(other, roles.addends)),
            encodable=frozenset(map(other, roles.encodable)),
            bundle_of={other(name): other(bundle) for name, bundle in roles.bundle_of.items()},
        ),
    )


def solved(chain: Chain, mesh: Mesh, config: ModelConfig, layout: str, encoding: Encoding, rows: int) -> Plan:
    phase = "prefill" if rows > 64 else "decode"
    shape = StepShape.of(mesh, split_evenly(rows, mesh.num_groups), phase=phase, context=4096)
    graph = Graph(chain, mesh, named_layout(layout, config, mesh), encoding, fuses_norms=True)
    prices = Pricer(device("l40s"), mesh, shape, "bf16", itemsize=2, graph=True)
    plan = Plan(layout_name=layout, mesh=mesh, shape=shape, segments=Search(graph, prices).solve(), roles=chain.roles)
    plan.validate()
    return plan


def with_other_names(plan: Plan) -> list[tuple[object, ...]]:
    """Ops and prices of ``plan``, with the names of :func:`renamed`."""
    return [(segment.layers, *said(op, other)) for segment in plan.segments for op in segment.ops]


def as_named(plan: Plan) -> list[tuple[object, ...]]:
    return [(segment.layers, *said(op, str)) for segment in plan.segments for op in segment.ops]


def said(op: Op, name: Callable[[str], str]) -> tuple[object, ...]:
    """All of ``step`` with its fields and stages renamed; adds are named after their addend."""
    if op.kind is OpKind.STAGE:
        title = name(op.name)
    else:
        title = f"add_{name(op.reads[1])}" if op.kind is OpKind.ADD else op.name
    fields = (tuple(map(name, op.reads)), tuple(map(name, op.writes)))
    rest = replace(op, name="", boundary="", reads=(), writes=(), stage=None)
    return title, name(op.boundary), None if op.stage is None else name(op.stage.name), fields, rest


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("model", ["deepseek-v3", "deepseek-v2-lite", "qwen3-30b-a3b", "llama-3.1-8b"])
def test_a_chain_with_other_names_has_the_same_plans(model: str, mesh: Mesh) -> None:
    config = replace(preset(model), num_hidden_layers=5)
    for chain in (*chains_of(config, mesh),)[::11]:
        mine = renamed(chain)
        for layout in applicable_layouts(config, mesh):
            for rows, encoding in ((3, Encoding.PLAIN), (4096, Encoding.INT8)):
                plan = solved(chain, mesh, config, layout, encoding, rows)
                same = solved(mine, mesh, config, layout, encoding, rows)
                assert as_named(same) == with_other_names(plan)
                assert same.gives_logits is plan.gives_logits
                assert workspace(same, mine.fields, KERNELS) == workspace(plan, chain.fields, KERNELS)
                assert len(describe(same)) - len(describe(plan)) == 3 * describe(same).count("my_")
                assert plan_code(same).count("\n") == plan_code(plan).count("\n")
