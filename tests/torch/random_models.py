"""Checkpoints that transformers makes of a config.json, with random weights, none of them 0 or 1 by habit."""

from __future__ import annotations

import random
import warnings
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

__all__ = ["save_random_model"]


def save_random_model(folder: Path, draw: random.Random) -> None:
    """Add weights to a folder that holds a config.json, in transformers' own format; config.json stays as it is.

    Raises:
        Exception: transformers refuses the config.
    """
    torch.manual_seed(draw.randrange(2**31))
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if config.num_hidden_layers > 8 or config.hidden_size > 1000 or config.vocab_size > 10000:
            raise ValueError("too large to be made here")
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    spread = draw.choice((1.0, 1.0, 3e-3))  # small: then the epsilon of the first norm is seen
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" in name:
                continue
            if "norm" in name:
                tensor.copy_(1 + 0.1 * torch.randn_like(tensor))
            elif tensor.dim() < 2:
                tensor.normal_(0, 0.1)
            elif "embed" in name:
                tensor.normal_(0, spread)
            else:
                tensor.normal_(0, 1.4 * tensor.shape[-1] ** -0.5)
    saved = folder / "saved"
    tied = bool(model.config.tie_word_embeddings)
    match draw.choice(("one file", "one file", "shards", "stacked experts", "names without model.")):
        case "shards":
            model.save_pretrained(saved, max_shard_size="40KB")
        case "stacked experts":
            model.save_pretrained(saved, save_original_format=False)
        case "names without model." if tied:  # else there is no head in them
            model.model.save_pretrained(saved)
        case _:
            model.save_pretrained(saved)
    for file in saved.glob("*.safetensors*"):
        file.rename(folder / file.name)
