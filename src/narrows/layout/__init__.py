"""Meshes, layouts, row splits, moves, topologies and row encodings. No torch."""

from narrows.layout.encoding import Encoding
from narrows.layout.even_split import Span, split_evenly, starts
from narrows.layout.layout import Layout, full, group, legal_layouts, owed, picture, scattered
from narrows.layout.mesh import Mesh
from narrows.layout.moves import Algorithm, Move, MoveKind, moves_from
from narrows.layout.rows import RowSplit
from narrows.layout.topology import Levels, Topology

__all__ = [
    "Algorithm",
    "Encoding",
    "Layout",
    "Levels",
    "Mesh",
    "Move",
    "MoveKind",
    "RowSplit",
    "Span",
    "Topology",
    "full",
    "group",
    "legal_layouts",
    "moves_from",
    "owed",
    "picture",
    "scattered",
    "split_evenly",
    "starts",
]
