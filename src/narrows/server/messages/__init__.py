"""Anthropic's messages API: its requests as conversations, and what the model says as its blocks and events."""
