"""Model families: one file each, in forward order, with the checkpoint's names. Methods are named as the plan's stages.

A model computes on one rank's share of the weights. It knows its slices and caches; not layouts, plans or collectives:
what an input's rows are, and who adds up the outputs, is the plan's business.
"""

from narrows.models.registry import EXECUTABLE, build_model

__all__ = ["EXECUTABLE", "build_model"]
