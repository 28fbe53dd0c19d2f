"""One schema per model family: what of a ``config.json`` is read, what is refused, and what is known to be harmless."""
