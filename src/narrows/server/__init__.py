"""OpenAI-compatible HTTP over any :class:`~narrows.server.backend.Backend`. Knows no engine, no rank and no tensor."""
