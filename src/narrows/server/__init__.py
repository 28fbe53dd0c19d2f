"""HTTP server: OpenAI's and Anthropic's APIs over any backend (:class:`narrows.api.Backend`)."""
