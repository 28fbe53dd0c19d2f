"""PURE room: what models are (configs, presets), their stages, forms and weights by slices. No torch, no prices."""
