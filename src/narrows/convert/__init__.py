"""Room of other file formats: a GGUF file in Hugging Face's words, and conversions to a Hugging Face folder.

It imports `errors` only, and no torch: weights pass through numpy, a piece of a tensor at a time. ``gguf_header`` and
``gguf_config`` do without numpy too, as rooms that plan read them.
"""
