"""A plan as a straight-line program: what every rank does, in order, one line per step. Words only; it runs nothing."""

from __future__ import annotations

from collections.abc import Iterator

from narrows.arch.stages import RowSet
from narrows.layout import Layout, Mesh
from narrows.plan.plan import Plan, Segment, Step, StepKind

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
        for step in segment.steps:
            lines += _lines(plan.mesh, step, indent, receiver, joined)
    lines.append(f"    return {plan.roles.output}")
    return "\n".join(lines) + "\n"


def _layers(segment: Segment) -> str:
    first, last = segment.layers[0], segment.layers[-1]
    return f"model.layers[{first}:{last + 1}]"


def _lines(mesh: Mesh, step: Step, indent: str, receiver: str, joined: list[str]) -> Iterator[str]:
    writes = ", ".join(step.writes)
    if step.kind is StepKind.ADD and step.joins:
        joined.append(step.reads[1])
        yield f"{indent}# {step.reads[1]} joins the sum that {step.reads[0]} owes"
        return
    if step.kind is StepKind.STAGE:
        code = f"{writes} = {receiver}.{step.name}({', '.join(step.reads)})"
    elif step.kind is StepKind.ADD:
        code = f"{writes} = {' + '.join(step.reads)}"
    elif step.kind is StepKind.SELECT:
        code = f"{writes} = select_rows({', '.join(step.reads)})"
    else:
        assert step.move is not None
        more = ""
        if joined and step.layout.owes_sum and not step.leaves.owes_sum:
            more = f", addends=[{', '.join(joined)}]"
            joined.clear()
        if step.stage is not None:
            more += f', norm="{step.stage.name}"'
        if step.encoded:
            travels = ", ".join(f'"{name}": "{encoding}"' for name, encoding in step.encoded.items())
            more = f", encode={{{travels}}}"
        code = f'{writes} = {step.name}({", ".join(step.reads)}, over="{step.move.axes}"{more})'
    rows = f"{step.rows} logit rows" if step.row_set is RowSet.LOGITS else f"{step.rows} rows"
    yield f"{indent}{code}".ljust(_COMMENT_AT) + f"  # {_places(mesh, step)}, {rows}, {step.ps / 1e6:.1f} us"


def _places(mesh: Mesh, step: Step) -> str:
    before, after = _name(mesh, step.layout), _name(mesh, step.leaves)
    return before if before == after else f"{before} -> {after}"


def _name(mesh: Mesh, layout: Layout) -> str:
    return layout.title(mesh) or str(layout)
