"""A plan as a straight-line program: what every rank does, in order, one line per op. It is for reading only."""

from __future__ import annotations

from collections.abc import Iterator

from narrows.arch.stages import RowSet
from narrows.layout import Algorithm, Layout, Mesh
from narrows.plan.plan import Op, OpKind, Plan, Segment

__all__ = ["plan_code"]

_COMMENT_AT = 72


def plan_code(plan: Plan) -> str:
    """The program text of ``plan``, with rows and layouts as comments. It parses as Python.

    A joined addend is written as an argument of the move that completes the sum, which is how it runs.
    """
    shape = plan.shape
    lines = [
        f"# layout {plan.layout_name} on {plan.mesh}: a {shape.phase} step of {shape.rows.total} rows, context "
        f"{shape.context}, logits of {shape.logits.total}; {plan.seconds * 1e3:.3f} ms predicted",
        "# names in comments: (placements), rows of the rank that has most, microseconds",
        f"def step(model, {plan.roles.input}):",
    ]
    joined: list[str] = []
    for segment in plan.segments:
        indent = "    "
        receiver = "model"
        if segment.layers:
            lines.append(f"    for layer in {_layers(segment)}:  # {segment.name}, {len(segment.layers)} of them")
            indent, receiver = "        ", "layer"
        for op in segment.ops:
            lines += _lines(plan.mesh, op, indent, receiver, joined)
    lines.append(f"    return {plan.roles.output}")
    return "\n".join(lines) + "\n"


def _layers(segment: Segment) -> str:
    first, last = segment.layers[0], segment.layers[-1]
    return f"model.layers[{first}:{last + 1}]"


def _lines(mesh: Mesh, op: Op, indent: str, receiver: str, joined: list[str]) -> Iterator[str]:
    writes = ", ".join(op.writes)
    if op.kind is OpKind.ADD and op.joins:
        joined.append(op.reads[1])
        yield f"{indent}# {op.reads[1]} joins the sum that {op.reads[0]} owes"
        return
    if op.kind is OpKind.STAGE:
        code = f"{writes} = {receiver}.{op.name}({', '.join(op.reads)})"
    elif op.kind is OpKind.ADD:
        code = f"{writes} = {' + '.join(op.reads)}"
    elif op.kind is OpKind.SELECT:
        code = f"{writes} = select_rows({', '.join(op.reads)})"
    else:
        assert op.move is not None
        more = ""
        if joined and op.layout.owes_sum and not op.leaves.owes_sum:
            more = f", addends=[{', '.join(joined)}]"
            joined.clear()
        if op.move.algorithm is not Algorithm.FLAT:
            more += f', algorithm="{op.move.algorithm}"'
        if op.stage is not None:
            more += f', norm="{op.stage.name}"'
        if op.encoded:
            travels = ", ".join(f'"{name}": "{encoding}"' for name, encoding in op.encoded.items())
            more = f", encode={{{travels}}}"
        code = f'{writes} = {op.name}({", ".join(op.reads)}, over="{op.move.axes}"{more})'
    rows = f"{op.rows} logit rows" if op.row_set is RowSet.LOGITS else f"{op.rows} rows"
    yield f"{indent}{code}".ljust(_COMMENT_AT) + f"  # {_layouts(mesh, op)}, {rows}, {op.ps / 1e6:.1f} us"


def _layouts(mesh: Mesh, op: Op) -> str:
    before, after = _name(mesh, op.layout), _name(mesh, op.leaves)
    return before if before == after else f"{before} -> {after}"


def _name(mesh: Mesh, layout: Layout) -> str:
    return layout.title(mesh) or str(layout)
