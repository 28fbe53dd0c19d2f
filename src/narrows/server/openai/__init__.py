"""OpenAI's APIs: chat completions, completions, responses, and the tokenizer routes."""
