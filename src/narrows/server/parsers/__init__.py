"""Parsers of generated text: reasoning and tool calls, one file per format of tool calls."""
