"""OpenAI's HTTP API over a backend that generates tokens: routes, schemas, guides, tool calls, metrics, limits."""
