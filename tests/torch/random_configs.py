"""Random small config.json files: legal ones of every family that runs, and damaged ones. The same seed, the same file.

A field is often left out, so that the family's default is tested; and fields are written as transformers 4 wrote
them, or as transformers 5 does. Sizes stay small, since a model is made of each.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

Config = dict[str, Any]

LONGEST = 130
"""Tokens of the longest prompt that is run."""
_ACTIVATIONS = ("silu", "silu", "silu", "swish", "gelu", "gelu_pytorch_tanh", "gelu_new", "relu")
_DTYPES = ("float32", "bfloat16", "float16")


class Draw(random.Random):
    """Random choices that configs are made of."""

    def often(self, config: Config, name: str, *values: Any, share: float = 0.7) -> None:
        """Set ``name`` to one of ``values``, or leave it out."""
        if self.random() < share:
            config[name] = self.choice(values)

    def odds(self, share: float) -> bool:
        return self.random() < share


def legal(seed: int, family: str | None = None) -> Config:
    """A config that transformers runs; of ``family``, or of a random one."""
    draw = Draw(seed)
    family = draw.choice(sorted(FAMILIES)) if family is None else family
    config = {"model_type": family, **_common(draw)}
    FAMILIES[family](draw, config)
    _rope(draw, config)
    names = sorted(config)
    draw.shuffle(names)
    return {name: config[name] for name in names}


def _common(draw: Draw) -> Config:
    config: Config = {
        "vocab_size": draw.randint(40, 130),
        "num_hidden_layers": draw.choice((1, 2, 2, 3, 4)),
        "intermediate_size": draw.randint(9, 70),
        "max_position_embeddings": draw.choice((160, 256, 300, 4096)),
    }
    draw.often(config, "rms_norm_eps", 1e-6, 1e-5, 1e-2, 3e-3)
    draw.often(config, "tie_word_embeddings", True, False, False, share=0.5)
    draw.often(config, "hidden_act", *_ACTIVATIONS, share=0.6)
    draw.often(config, draw.choice(("dtype", "torch_dtype")), *_DTYPES, share=0.8)
    draw.often(config, "eos_token_id", 1, None, [1, 2], [3])
    draw.often(config, "bos_token_id", 0, None)
    draw.often(config, "pad_token_id", None, 0, share=0.3)
    draw.often(config, "use_cache", True, False, share=0.3)
    draw.often(config, "initializer_range", 0.02, share=0.3)
    draw.often(config, "attention_dropout", 0.0, share=0.3)
    draw.often(config, "transformers_version", "4.45.2", "5.23.0", share=0.5)
    draw.often(config, "a_field_of_the_future", 7, None, {"x": 1}, share=0.1)
    return config


def _heads(draw: Draw, config: Config, *, head_dims: tuple[int, ...], kv_default: bool) -> None:
    """Attention heads, kv heads that divide them, and a hidden size that they divide."""
    kv_heads, per_kv = draw.choice((1, 1, 2, 3, 4)), draw.choice((1, 2, 3, 5))
    heads = kv_heads * per_kv
    config["num_attention_heads"] = heads
    config["hidden_size"] = heads * draw.choice([width for width in (4, 6, 8, 10, 16) if 12 <= heads * width <= 96])
    if not (kv_default and per_kv == 1 and draw.odds(0.5)):
        config["num_key_value_heads"] = kv_heads
    elif draw.odds(0.3):
        config["num_key_value_heads"] = None
    if head_dims:
        config["head_dim"] = draw.choice(head_dims)


def _llama(draw: Draw, config: Config) -> None:
    _heads(draw, config, head_dims=draw.choice(((), (4, 6, 10, 16, 24))), kv_default=True)
    draw.often(config, "attention_bias", True, False, share=0.5)
    draw.often(config, "mlp_bias", True, False, share=0.5)
    draw.often(config, "pretraining_tp", 1, share=0.3)


def _qwen2(draw: Draw, config: Config) -> None:
    _heads(draw, config, head_dims=draw.choice(((), (), (4, 10, 16))), kv_default=False)
    _windows(draw, config)


def _qwen3(draw: Draw, config: Config) -> None:
    _heads(draw, config, head_dims=draw.choice(((4, 6, 10, 16, 24), (4, 6, 10, 16, 24), ())), kv_default=False)
    draw.often(config, "attention_bias", True, False, share=0.5)
    _windows(draw, config)


def _windows(draw: Draw, config: Config) -> None:
    layers = config["num_hidden_layers"]
    draw.often(config, "use_sliding_window", False, True, share=0.6)
    draw.often(config, "sliding_window", 4096, None, 3, 17, 64, share=0.6)
    draw.often(config, "max_window_layers", 28, 0, 1, layers, share=0.6)
    if draw.odds(0.15):
        config["layer_types"] = ["full_attention"] * layers


def _qwen3_moe(draw: Draw, config: Config) -> None:
    _heads(draw, config, head_dims=draw.choice(((), (4, 6, 10, 16, 24))), kv_default=False)
    config["num_experts"] = draw.choice((2, 5, 8, 16))
    config["num_experts_per_tok"] = draw.randint(1, min(8, config["num_experts"]))
    config["moe_intermediate_size"] = draw.randint(5, 40)
    draw.often(config, "norm_topk_prob", True, False)
    draw.often(config, "attention_bias", True, False, share=0.4)
    draw.often(config, "decoder_sparse_step", 1, 1, 1, 2, share=0.5)
    draw.often(config, "mlp_only_layers", [], None, [0], [1], share=0.4)
    draw.often(config, "router_aux_loss_coef", 0.001, share=0.3)
    draw.often(config, "use_sliding_window", False, share=0.4)
    draw.often(config, "sliding_window", 4096, None, share=0.4)
    draw.often(config, "max_window_layers", 28, share=0.3)


def _mistral(draw: Draw, config: Config) -> None:
    _heads(draw, config, head_dims=draw.choice(((), (4, 6, 10, 16))), kv_default=False)
    draw.often(config, "sliding_window", 4096, None, None, 5, 64, share=0.8)


def _glm4_moe(draw: Draw, config: Config) -> None:
    _heads(draw, config, head_dims=draw.choice(((8, 16, 24), ())), kv_default=False)
    if "head_dim" not in config:
        config["hidden_size"] = config["num_attention_heads"] * 8
    _grouped_experts(draw, config, groups_default=True)
    draw.often(config, "attention_bias", True, False, share=0.6)
    draw.often(config, "use_qk_norm", True, False, share=0.6)
    draw.often(config, "partial_rotary_factor", 0.5, 0.25, 1.0, share=0.5)
    draw.often(config, "num_nextn_predict_layers", 1, 0, share=0.5)


def _deepseek(draw: Draw, config: Config) -> None:
    heads = draw.choice((1, 2, 3, 4, 6, 8))
    config["num_attention_heads"] = config["num_key_value_heads"] = heads
    widths = [width for width in (6, 7, 10, 16, 33) if 12 <= heads * width <= 96]
    config["hidden_size"] = heads * draw.choice(widths)
    config["q_lora_rank"] = draw.choice((None, 1, 7, 24))
    config["kv_lora_rank"] = draw.choice((1, 5, 16, 24))
    config["qk_nope_head_dim"] = draw.choice((1, 5, 8, 16))
    config["qk_rope_head_dim"] = draw.choice((2, 4, 8, 12))
    config["v_head_dim"] = draw.choice((1, 6, 12, 16))
    draw.often(config, "attention_bias", True, False, False, share=0.5)
    draw.often(config, "moe_layer_freq", 1, share=0.3)


def _deepseek_v2(draw: Draw, config: Config) -> None:
    _deepseek(draw, config)
    # transformers looks at pairs of columns as complex numbers, which needs every part of a head to be even.
    config["qk_nope_head_dim"], config["kv_lora_rank"] = draw.choice((2, 8, 16)), draw.choice((2, 6, 16, 24))
    if draw.odds(0.5):
        del config["num_key_value_heads"]
    _grouped_experts(draw, config, groups_default=False)
    grouped = config.get("n_group") is not None and config.get("topk_group") is not None
    draw.often(config, "topk_method", *(("group_limited_greedy", "greedy") if grouped else ("greedy",)))
    draw.often(config, "mlp_bias", True, False, share=0.4)
    draw.often(config, "scoring_func", "softmax", share=0.4)
    draw.often(config, "aux_loss_alpha", 0.001, share=0.3)


def _deepseek_v3(draw: Draw, config: Config) -> None:
    _deepseek(draw, config)
    _grouped_experts(draw, config, groups_default=True)
    draw.often(config, "rope_interleave", True, False, share=0.5)
    draw.often(config, "scoring_func", "sigmoid", share=0.5)
    draw.often(config, "topk_method", "noaux_tc", share=0.5)
    draw.often(config, "num_nextn_predict_layers", 1, 0, share=0.5)
    draw.often(config, "ep_size", 1, share=0.3)


def _grouped_experts(draw: Draw, config: Config, *, groups_default: bool) -> None:
    """Experts in groups. The last group's two best must exist, and the chosen groups must hold enough experts."""
    groups, each = draw.choice((1, 1, 2, 4, 8)), draw.choice((2, 3, 4))
    chosen = draw.randint(1, groups)
    if config["model_type"] == "deepseek_v3" and draw.odds(0.2):  # the defaults: 8 groups, of which 4
        groups, chosen = 8, 4
    config["n_routed_experts"] = groups * each
    config["num_experts_per_tok"] = draw.randint(1, min(8, chosen * each))
    default = {"deepseek_v3": (8, 4), "glm4_moe": (1, 1), "deepseek_v2": (1, 1)}[config["model_type"]]
    if (groups, chosen) != default or draw.odds(0.5):
        config["n_group"], config["topk_group"] = groups, chosen
        if (groups, chosen) == (1, 1) and not groups_default and draw.odds(0.3):
            config["n_group"] = config["topk_group"] = None
    config["moe_intermediate_size"] = draw.randint(5, 40)
    draw.often(config, "n_shared_experts", 1, 2, 3)
    draw.often(config, "routed_scaling_factor", 1.0, 2.5, 0.7, 16.0)
    draw.often(config, "norm_topk_prob", True, False)
    draw.often(config, "first_k_dense_replace", 0, 1, 2, config["num_hidden_layers"])


FAMILIES: dict[str, Callable[[Draw, Config], None]] = {
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "glm4_moe": _glm4_moe,
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
}


# -- rotary positions, in the dialects of transformers 4 and 5 ----------


def _rope(draw: Draw, config: Config) -> None:
    kinds = ("default", "default", "default", "linear", "dynamic", "yarn", "yarn", "longrope", "llama3")
    kind = draw.choice(kinds)
    scaling = _SCALINGS[kind](draw, config)
    theta = draw.choice((None, 500.0, 10000, 10000.0, 1e6))
    if kind == "default":
        _unscaled(draw, config, theta)
        return
    if kind == "llama3" and theta is None:
        theta = 500000.0
    if draw.odds(0.5):
        config["rope_parameters"] = {"rope_type": kind} | scaling | ({} if theta is None else {"rope_theta": theta})
        return
    name = "rope_type" if kind in ("llama3",) else draw.choice(("type", "rope_type"))
    config["rope_scaling"] = {name: kind} | scaling
    if theta is not None:  # beside the scaling, or, in files that were converted by hand, in it
        (config["rope_scaling"] if draw.odds(0.2) else config)["rope_theta"] = theta


def _unscaled(draw: Draw, config: Config, theta: float | None) -> None:
    if draw.odds(0.5):
        draw.often(config, "rope_scaling", None, share=0.5)
        if theta is not None:
            config["rope_theta"] = theta
        return
    config["rope_parameters"] = {"rope_type": "default"} if draw.odds(0.8) else {}
    if theta is not None:
        config["rope_parameters"]["rope_theta"] = theta


def _linear(draw: Draw, config: Config) -> Config:
    return {"factor": draw.choice((1.0, 2, 4.0, 8))}


def _dynamic(draw: Draw, config: Config) -> Config:
    """It shows only in texts that are longer than the positions, of which there are then ``factor`` times as many."""
    factor, positions = draw.choice(((1.5, 100), (2.0, 80), (4, 48), (4, 4096)))
    config["max_position_embeddings"] = positions
    return {"factor": factor}


def _yarn(draw: Draw, config: Config) -> Config:
    scaling: Config = {
        "factor": draw.choice((1.5, 4, 4.0, 40)),
        "original_max_position_embeddings": draw.choice((32, 64, 128)),
    }
    draw.often(scaling, "beta_fast", 32, 16, share=0.5)
    draw.often(scaling, "beta_slow", 1, 2, share=0.5)
    if draw.odds(0.5):
        scaling["mscale"], scaling["mscale_all_dim"] = draw.choice(((1.0, 1.0), (0.707, 0.707), (0.7, 1.0), (1, 0)))
    draw.often(scaling, "attention_factor", 1.2, share=0.15)
    draw.often(scaling, "truncate", True, False, share=0.15)
    return scaling


def _longrope(draw: Draw, config: Config) -> Config:
    half = _rotary_dim(config) // 2
    scaling: Config = {
        "short_factor": [round(draw.uniform(1, 2), 3) for _ in range(half)],
        "long_factor": [round(draw.uniform(1, 8), 3) for _ in range(half)],
        "original_max_position_embeddings": draw.choice((32, 64, 128)),
    }
    draw.often(scaling, "factor", 2.0, 8, share=0.4)
    draw.often(scaling, "attention_factor", 1.1, share=0.2)
    return scaling


def _llama3(draw: Draw, config: Config) -> Config:
    return {
        "factor": draw.choice((2.0, 8.0, 32)),
        "low_freq_factor": 1.0,
        "high_freq_factor": draw.choice((2.0, 4.0)),
        "original_max_position_embeddings": draw.choice((32, 64, 128)),
    }


_SCALINGS: dict[str, Callable[[Draw, Config], Config]] = {
    "default": lambda draw, config: {},
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
}


def _rotary_dim(config: Config) -> int:
    family = config["model_type"]
    if family.startswith("deepseek"):
        return int(config["qk_rope_head_dim"])
    default = 128 if family == "qwen3" else config["hidden_size"] // config["num_attention_heads"]
    head_dim = config.get("head_dim") or default
    return int(head_dim * config.get("partial_rotary_factor", 0.5 if family == "glm4_moe" else 1.0))


# -- damaged ones ----------

_WRONG = (None, "many", "4", -1, 0, 1.5, True, [], [1, 2], {}, {"x": 1}, 10**7, 1e400, float("nan"), "", "none", False)


def damaged(seed: int) -> tuple[Config, frozenset[str]]:
    """A legal config in which one to three fields are of a wrong type, out of bounds, missing or contradict others; and
    the names of the fields that were changed."""
    draw = Draw(f"damaged {seed}")
    whole = legal(draw.randrange(10**6))
    config = copy.deepcopy(whole)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        draw.choice((_wrong_value, _wrong_value, _wrong_rope, _missing, _contradiction))(draw, config)
    # By their text: true equals 1, and is another value all the same.
    return config, frozenset(
        name for name in {*whole, *config} if repr(whole.get(name, ...)) != repr(config.get(name, ...))
    )


def _wrong_value(draw: Draw, config: Config) -> None:
    config[draw.choice(sorted(config))] = draw.choice(_WRONG)


def _wrong_rope(draw: Draw, config: Config) -> None:
    name = draw.choice(("rope_scaling", "rope_parameters"))
    inside = config.get(name)
    if not isinstance(inside, dict) or not inside or draw.odds(0.3):
        config[name] = draw.choice((*_WRONG, "yarn", {"type": "yarn"}, {"rope_type": "of the future", "factor": 2.0}))
        return
    field = draw.choice(sorted(inside))
    if draw.odds(0.3):
        del inside[field]
    else:
        inside[field] = draw.choice(_WRONG)


def _missing(draw: Draw, config: Config) -> None:
    del config[draw.choice(sorted(config))]


def _contradiction(draw: Draw, config: Config) -> None:
    changes: tuple[Config, ...] = (
        {"num_key_value_heads": 7},
        {"num_attention_heads": 5, "num_key_value_heads": 2},
        {"head_dim": 7},
        {"head_dim": 0},
        {"num_experts_per_tok": 64},
        {"n_group": 5},
        {"topk_group": 9},
        {"n_routed_experts": 3, "n_group": 3, "topk_group": 1},
        {"qk_rope_head_dim": 3},
        {"hidden_size": 37},
        {"rope_theta": 777.0, "rope_parameters": {"rope_type": "default", "rope_theta": 999.0}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
        {"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}},
        {"dtype": "int8"},
        {"hidden_act": "swiglu"},
        {"layer_types": ["full_attention"]},
        {"layer_types": ["sliding_attention"] * config.get("num_hidden_layers", 1)}
        if isinstance(config.get("num_hidden_layers", 1), int) and config.get("num_hidden_layers", 1) < 9
        else {"layer_types": "full_attention"},
        {"sliding_window": 0, "use_sliding_window": True},
        {"partial_rotary_factor": 0.5},
        {"attention_bias": True},
        {"rope_interleave": False},
        {"num_hidden_layers": 10**7},
        {"model_type": draw.choice(("gemma", "LLAMA", None, 3, "deepseek_v32"))},
        {"architectures": ["DeepseekV32ForCausalLM"]},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"first_k_dense_replace": 9},
        {"mlp_only_layers": [0, 99]},
        {"topk_method": "noaux_tc"},
        {"scoring_func": "softmax"},
    )
    config |= draw.choice(changes)
