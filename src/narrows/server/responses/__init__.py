"""OpenAI's responses API: its requests as conversations, and what the model says as its items and events."""
