"""The smallest ``config.json`` that is a model, for tests of the files around it."""

from __future__ import annotations

LLAMA = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "vocab_size": 8,
    "rms_norm_eps": 1e-6,
}
