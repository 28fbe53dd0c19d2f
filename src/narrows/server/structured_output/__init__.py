"""Structured output: schemas and grammars of clients, compiled within limits and followed token by token."""
