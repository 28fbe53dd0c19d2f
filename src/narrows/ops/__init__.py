"""The operations of a layer on one rank's tensors: one file per op, a plain-torch twin beside every faster path.

It knows no rank, no layout, no plan, no model and no configuration: whatever an op needs is an argument. It is the only
room beside ``comm`` that may ask what device a tensor lives on.

Conventions of every op:

- ``out=`` where it is offered is written and returned; without it the op allocates. ``out`` must not overlap an input
  unless the op says that it may.
- 0 rows are an ordinary input.
- ``<op>_reference`` is the same function in plain torch with the same signature, for tests.
- Inference only: callers run under ``torch.inference_mode``.
"""
