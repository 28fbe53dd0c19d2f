"""PURE room: meshes, layouts, row splits, moves and row encodings. It imports nothing above `errors`, and no torch."""

from narrows.layout.deal import Span, deal, starts
from narrows.layout.encoding import Encoding
from narrows.layout.layout import Layout, full, group, legal_layouts, owed, picture, scattered
from narrows.layout.mesh import Mesh
from narrows.layout.moves import Move, MoveKind, moves_from
from narrows.layout.rows import RowSplit

__all__ = [
    "Encoding",
    "Layout",
    "Mesh",
    "Move",
    "MoveKind",
    "RowSplit",
    "Span",
    "deal",
    "full",
    "group",
    "legal_layouts",
    "moves_from",
    "owed",
    "picture",
    "scattered",
    "starts",
]
