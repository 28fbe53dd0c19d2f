"""Grammars that texts are held to: tried in processes that can be ended, compiled once, and followed token by token."""
