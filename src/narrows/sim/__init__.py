"""PURE room: the real scheduler on predicted time. Knows plans, prices and loads; no torch, no rank and no clock."""
