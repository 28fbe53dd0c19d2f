"""Writes plans to files and reads them back.

The file is JSON. It names the model's dimensions, the mesh and the weight sharding that it was made for. Reading it for
others is an error that names the difference, because the ops of a plan mean nothing without them.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from narrows.arch.chain import build_chain
from narrows.arch.config import ModelConfig
from narrows.arch.stages import Chain, PriceClass, RowSet, Stage
from narrows.arch.weight_sharding import WeightSharding
from narrows.cost.price import Source
from narrows.cost.pricer import StepShape
from narrows.errors import ConfigError, PlanError
from narrows.layout import Algorithm, Encoding, Layout, Mesh, Move, MoveKind, RowSplit, Topology
from narrows.plan.plan import ALL_REDUCE_NORM, Op, OpKind, Plan, Segment

__all__ = ["SavedPlan", "read_plan", "write_plan"]

VERSION = 2

SavedPlan = tuple[Plan, WeightSharding]
"""A plan, and how its ranks shard the weights."""


def write_plan(path: Path, plan: Plan, config: ModelConfig, sharding: WeightSharding) -> None:
    """Write ``plan`` to ``path``.

    Raises:
        ConfigError: the file cannot be written.
    """
    document = {
        "narrows_plan": VERSION,
        "model": _model_key(config),
        "mesh": dict(zip(plan.mesh.names, plan.mesh.sizes, strict=True)),
        "nodes": str(plan.nodes or Topology.one_node(plan.mesh.size)),
        "weight_sharding": asdict(sharding),
        "layout": plan.layout_name,
        "shape": {
            "phase": plan.shape.phase,
            "context": plan.shape.context,
            "rows": list(plan.shape.rows.counts),
            "logit_rows": list(plan.shape.logits.counts),
        },
        "segments": [
            {"name": s.name, "layers": list(s.layers), "ops": [_op_document(op) for op in s.ops]} for s in plan.segments
        ],
    }
    try:
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"the plan cannot be written to {path}: {error.strerror}") from None


def read_plan(path: Path, config: ModelConfig, mesh: Mesh) -> SavedPlan:
    """The plan in ``path``, checked against the model and mesh it is to run on.

    Raises:
        ConfigError: not a plan file, made for another model or mesh, or not a valid plan.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        version = document["narrows_plan"]
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{path} is not a plan file; make one with: narrows plan ... --save {path}") from None
    if version not in (1, VERSION):
        raise ConfigError(f"{path} is a plan file of version {version}; this narrows reads versions 1 and {VERSION}")
    try:
        if version == 1:
            _update(document)
        made_for = Mesh(tuple(document["mesh"]), tuple(document["mesh"].values()))
        if made_for != mesh:
            raise ConfigError(f"{path} is a plan for {made_for}, but the mesh is {mesh}")
        for name, value in _model_key(config).items():
            if document["model"].get(name) != value:
                was = document["model"].get(name)
                raise ConfigError(f"{path} is a plan for a model with {name} {was}, but here it is {value}")
        sharding = WeightSharding(**document["weight_sharding"])
        plan = _plan(
            document, mesh, build_chain(config, mesh, sharding), build_chain(config, mesh, sharding, want_logits=True)
        )
        plan.validate()
    except (KeyError, TypeError, ValueError, IndexError, PlanError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} is not a whole and valid plan: {error}") from None
    return plan, sharding


def _update(document: dict[str, Any]) -> None:
    """Turn a document of version 1, which called ops steps and weight sharding forms, into the present version."""
    document["weight_sharding"] = document.pop("forms")
    for segment in document["segments"]:
        segment["ops"] = segment.pop("steps")


def _model_key(config: ModelConfig) -> dict[str, Any]:
    names = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    return {name: getattr(config, name) for name in names}


def _op_document(op: Op) -> dict[str, Any]:
    move = op.move
    return {
        "kind": op.kind.value,
        "name": op.name,
        "boundary": op.boundary,
        "class": op.price_class.value,
        "reads": [[name, at.placements] for name, at in zip(op.reads, op.reads_at, strict=True)],
        "writes": [[name, at.placements] for name, at in zip(op.writes, op.writes_at, strict=True)],
        "row_set": op.row_set.value,
        "rows": op.rows,
        "nbytes": op.nbytes,
        "ps": op.ps,
        "source": op.source.label,
        "fused": op.fused,
        "encodings": [encoding.value for encoding in op.encodings],
        "move": None
        if move is None
        else {
            "kind": move.kind.value,
            "src": move.src.placements,
            "dst": move.dst.placements,
            "axes": [move.first, move.last],
            "algorithm": move.algorithm.value,
        },
    }


def _plan(document: dict[str, Any], mesh: Mesh, chain: Chain, with_logits: Chain) -> Plan:
    outside = {stage.name: stage for each in (chain, with_logits) for stage in (*each.prologue, *each.epilogue)}

    def stages(layers: list[int]) -> dict[str, Stage]:
        """The last layer's are others than those of the same name."""
        if not layers:
            return outside
        return {stage.name: stage for stage in chain.layer_types[chain.layers[layers[0]]].stages}

    shape = document["shape"]
    nodes = Topology.parse(document["nodes"]) if "nodes" in document else Topology.one_node(mesh.size)
    nodes.check(mesh)
    return Plan(
        layout_name=document["layout"],
        mesh=mesh,
        nodes=None if nodes.is_one_node else nodes,
        roles=chain.roles,
        shape=StepShape(
            rows=RowSplit(mesh, tuple(shape["rows"])),
            logits=RowSplit(mesh, tuple(shape["logit_rows"])),
            phase=shape["phase"],
            context=shape["context"],
        ),
        segments=tuple(
            Segment(
                name=segment["name"],
                layers=tuple(segment["layers"]),
                ops=tuple(_op(raw, mesh, stages(segment["layers"])) for raw in segment["ops"]),
            )
            for segment in document["segments"]
        ),
    )


def _op(raw: dict[str, Any], mesh: Mesh, stages: dict[str, Stage]) -> Op:
    kind = OpKind(raw["kind"])
    sources = {source.label: source for source in Source}
    return Op(
        kind=kind,
        name=raw["name"],
        boundary=raw["boundary"],
        price_class=PriceClass(raw["class"]),
        reads=tuple(name for name, _ in raw["reads"]),
        reads_at=tuple(Layout(at) for _, at in raw["reads"]),
        writes=tuple(name for name, _ in raw["writes"]),
        writes_at=tuple(Layout(at) for _, at in raw["writes"]),
        row_set=RowSet(raw["row_set"]),
        rows=raw["rows"],
        nbytes=raw["nbytes"],
        ps=raw["ps"],
        source=sources[raw["source"]],
        stage=stages[raw["boundary"]] if kind is OpKind.STAGE or raw["name"] == ALL_REDUCE_NORM else None,
        move=_move(raw["move"], mesh),
        fused=raw["fused"],
        encodings=tuple(Encoding(each) for each in raw.get("encodings", ())),
    )


def _move(raw: dict[str, Any] | None, mesh: Mesh) -> Move | None:
    if raw is None:
        return None
    first, last = raw["axes"]
    algorithm = Algorithm(raw.get("algorithm", Algorithm.FLAT))
    return Move(mesh, MoveKind(raw["kind"]), Layout(raw["src"]), Layout(raw["dst"]), first, last, algorithm)
