"""PURE room: requests, pages, the scheduler and the batches it makes. Ints only; no torch, no layouts, no model."""
