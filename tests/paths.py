"""Ways from one layout to another by single moves, for tests that move tensors anywhere."""

from __future__ import annotations

from narrows.layout import Layout, Mesh, Move, moves_from

__all__ = ["paths_from"]


def paths_from(mesh: Mesh, src: Layout) -> dict[Layout, tuple[Move, ...]]:
    """A shortest sequence of moves from ``src`` to each layout that moves lead to, ``src`` itself included."""
    paths: dict[Layout, tuple[Move, ...]] = {src: ()}
    for layout in (waiting := [src]):
        for move in moves_from(mesh, layout):
            if move.dst not in paths:
                paths[move.dst] = (*paths[layout], move)
                waiting.append(move.dst)
    return paths
