"""A load on an OpenAI-compatible server, and the field's figures of how it bears it."""
