"""One schema per model family: the fields of ``config.json`` that are read, refused, or known to be harmless."""
