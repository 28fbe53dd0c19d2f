"""narrows: LLM inference whose activations cross ranks where they are narrowest, by plan."""
