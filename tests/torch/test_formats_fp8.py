"""FP8 block-scaled checkpoints: any slice is the slice of the whole dequantised tensor, and the model is the same one.

The oracle dequantises whole tensors by repeating each scale over its block, with none of the engine's arithmetic.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV3Config, LlamaConfig, PretrainedConfig

from narrows.arch.config import CheckpointQuantization, read_config
from narrows.arch.weight_sharding import WeightSharding
from narrows.arch.weights import Weight
from narrows.engine.config import EngineConfig, resolve
from narrows.engine.core import Engine
from narrows.errors import CheckpointError, ConfigError
from narrows.weights import safetensors_folder
from narrows.weights.safetensors_folder import SafetensorsFolder

torch.set_num_threads(1)

FP8 = torch.float8_e4m3fn


def quantise(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Values and scales, each block's largest value at FP8's largest (448)."""
    num_rows, num_columns = (-(-size // unit) for size, unit in zip(weight.shape, block, strict=True))
    scale = torch.ones(num_rows, num_columns)
    values = torch.empty(weight.shape, dtype=FP8)
    for b in range(num_rows):
        for c in range(num_columns):
            at = slice(b * block[0], (b + 1) * block[0]), slice(c * block[1], (c + 1) * block[1])
            scale[b, c] = weight[at].abs().max() / 448
            values[at] = (weight[at] / scale[b, c]).to(FP8)
    return values, scale


def dequantise(values: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    repeated = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return values.float() * repeated[: values.shape[0], : values.shape[1]]


def source_of(folder: Path, block: tuple[int, int], dtype: torch.dtype = torch.float32, **tensors: Tensor):
    save_file(tensors, folder / "model.safetensors")
    quantization = CheckpointQuantization(quant_method="fp8", weight_block_size=block)
    return SafetensorsFolder(folder, quantization=quantization, dtype=dtype)


# -- slices -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [(4, 3), (1, 1), (11, 9), (16, 16), (1, 9), (5, 16)], ids=str)
def test_every_span_is_the_slice_of_the_whole(tmp_path: Path, block: tuple[int, int]) -> None:
    torch.manual_seed(0)
    values, scale = quantise(torch.randn(11, 9), block)
    source = source_of(tmp_path, block, **{"a.weight": values, "a.weight_scale_inv": scale})
    whole = dequantise(values, scale, block)
    assert torch.equal(source.take(Weight(name="a.weight", shape=(11, 9)), None), whole)
    for dim, size in enumerate(whole.shape):
        weight = Weight(name="a.weight", shape=(11, 9), dim=dim)
        for lo in range(size + 1):
            for hi in range(lo, size + 1):
                assert torch.equal(source.take(weight, (lo, hi)), whole.narrow(dim, lo, hi - lo)), (dim, lo, hi)


def test_spans_about_the_edges_of_blocks_of_128(tmp_path: Path) -> None:
    torch.manual_seed(1)
    values, scale = quantise(torch.randn(300, 270), (128, 128))
    source = source_of(tmp_path, (128, 128), **{"a.weight": values, "a.weight_scale_inv": scale})
    whole = dequantise(values, scale, (128, 128))
    for dim, size in enumerate(whole.shape):
        cuts = [0, 1, 127, 128, 129, 255, 256, 257, size - 1, size]
        for lo in cuts:
            for hi in cuts[cuts.index(lo) :]:
                got = source.take(Weight(name="a.weight", shape=(300, 270), dim=dim), (lo, hi))
                assert torch.equal(got, whole.narrow(dim, lo, hi - lo)), (dim, lo, hi)


def test_only_overlapping_scales_are_read_and_values_are_rounded_once(tmp_path, monkeypatch) -> None:
    read = []
    real = safetensors_folder.dequantize_blocks

    def watched(values: Tensor, scale: Tensor, *rest: object) -> Tensor:
        read.append((tuple(values.shape), tuple(scale.shape)))
        return real(values, scale, *rest)

    monkeypatch.setattr(safetensors_folder, "dequantize_blocks", watched)
    values, scale = quantise(torch.randn(40, 60), (8, 10))
    source = source_of(tmp_path, (8, 10), torch.bfloat16, **{"a.weight": values, "a.weight_scale_inv": scale})
    got = source.take(Weight(name="a.weight", shape=(40, 60), dim=0), (7, 17))
    assert torch.equal(got, dequantise(values, scale, (8, 10))[7:17].bfloat16()) and got.dtype == torch.bfloat16
    source.take(Weight(name="a.weight", shape=(40, 60), dim=1), (20, 30))
    assert read == [((10, 60), (3, 6)), ((40, 10), (5, 1))]


def test_plain_tensors_keep_their_dtype_and_scales_may_be_bfloat16(tmp_path: Path) -> None:
    values, scale = quantise(torch.randn(10, 10), (4, 4))
    tensors = {"a.weight": values, "a.weight_scale_inv": scale.bfloat16(), "b": torch.ones(3, dtype=torch.float16)}
    source = source_of(tmp_path, (4, 4), **tensors)
    got = source.take(Weight(name="a.weight", shape=(10, 10)), None)
    assert torch.equal(got, dequantise(values, scale.bfloat16().float(), (4, 4)))
    assert source.take(Weight(name="b", shape=(3,)), None).dtype == torch.float16


# -- a model ----------------------------------------------------------------------------------------------------------


def v3(intermediate_size: int = 70, moe_intermediate_size: int = 28) -> torch.nn.Module:
    """A random DeepSeek V3, with sizes that few blocks divide (transformers needs multiples of 4)."""
    config = DeepseekV3Config(
        vocab_size=67,
        hidden_size=52,
        intermediate_size=intermediate_size,
        moe_intermediate_size=moe_intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=20,
        kv_lora_rank=22,
        qk_nope_head_dim=10,
        qk_rope_head_dim=4,
        v_head_dim=6,
        max_position_embeddings=64,
    )
    return random_model(config)


def llama(num_heads: int, num_kv_heads: int, head_dim: int) -> torch.nn.Module:
    """A random Llama of five blocks of 128 inner columns."""
    return random_model(
        LlamaConfig(
            vocab_size=67,
            hidden_size=240,
            intermediate_size=640,
            num_hidden_layers=2,
            num_attention_heads=num_heads,
            num_key_value_heads=num_kv_heads,
            head_dim=head_dim,
            max_position_embeddings=64,
        )
    )


def random_model(config: PretrainedConfig) -> torch.nn.Module:
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            spread = min(0.2, 2 / weight.shape[-1] ** 0.5)
            weight.copy_(torch.randn_like(weight) * spread + (1.0 if "norm" in name else 0.0))
    return model


def is_quantised(name: str) -> bool:
    """DeepSeek quantises the linear layers, not the router, the embedding, the head or the norms."""
    return "_proj" in name


def write_both(folder: Path, block: tuple[int, int], model: torch.nn.Module | None = None) -> tuple[Path, Path]:
    """An FP8 checkpoint in two files with an index, and the same weights dequantised, as float32."""
    plain, fp8 = folder / "plain", folder / "fp8"
    (v3() if model is None else model).save_pretrained(plain)
    tensors: dict[str, Tensor] = {}
    restored: dict[str, Tensor] = {}
    for name, weight in load_file(plain / "model.safetensors").items():
        tensors[name] = restored[name] = weight
        if is_quantised(name):
            tensors[name], scale = quantise(weight, block)
            tensors[f"{name}_scale_inv"] = scale
            restored[name] = dequantise(tensors[name], scale, block)
    unquantised = {name.split(".")[-2] for name, weight in restored.items() if weight.ndim == 2} - {
        name.split(".")[-2] for name, tensor in tensors.items() if tensor.dtype == FP8
    }
    assert unquantised <= {"embed_tokens", "lm_head", "gate"}
    save_file(restored, plain / "model.safetensors", {"format": "pt"})
    fp8.mkdir()
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": list(block),
    }
    (fp8 / "config.json").write_text(json.dumps(config))
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    where = {name: files[i % 2] for i, name in enumerate(sorted(tensors))}  # a scale is not beside its values
    for file in files:
        save_file({name: tensors[name] for name, at in where.items() if at == file}, fp8 / file)
    (fp8 / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return plain, fp8


PROMPTS = [(5, 9, 2, 33, 60, 1, 0, 7), (66, 3, 3)]


def engine_logits(
    model: Path, dp: int = 1, tp: int = 1, dtype: str = "float32", sharding: WeightSharding | None = None
) -> Tensor:
    """Of the prompts' last tokens, prefilled together."""
    engine_config = EngineConfig(model=str(model), dp=dp, tp=tp, dtype=dtype, max_context=32, want_logits=True)
    with Engine(resolve(engine_config, sharding)) as engine:
        for prompt in PROMPTS:
            engine.add(prompt, 1)
        return engine.submit(engine.scheduler.schedule(), keep_logits=True).result()[0].logits


@pytest.mark.parametrize("block", [(128, 128), (16, 8)], ids=str)
def test_an_fp8_model_is_its_dequantised_twin(tmp_path: Path, block: tuple[int, int]) -> None:
    plain, fp8 = write_both(tmp_path, block)
    reference = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = torch.stack([reference(torch.tensor([prompt])).logits[0, -1] for prompt in PROMPTS])
    got = engine_logits(fp8)
    assert torch.equal(got, engine_logits(plain))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    for dp, tp in ((1, 2), (2, 1), (1, 3), (2, 2)):
        sharded = engine_logits(fp8, dp, tp)
        assert torch.equal(sharded, engine_logits(plain, dp, tp)), (dp, tp)
        torch.testing.assert_close(sharded, expected, rtol=1e-4, atol=1e-4)


CUT_BLOCKS = {
    # 640 columns are 5 blocks of 128: 214 on the first of 3 ranks, 320 on each of 2. Heads of 24 and 40 rows too.
    "intermediate 640": (lambda: llama(3, 3, 40), "whole", ((1, 3), (1, 2), (2, 2))),
    "heads that ranks share unevenly": (lambda: llama(5, 5, 24), "whole", ((1, 2), (1, 3))),
    "heads that ranks hold twice": (lambda: llama(6, 2, 40), "whole", ((1, 3), (2, 3))),
    "moe 192, split": (lambda: v3(640, 192), "split", ((1, 2), (1, 3), (2, 2))),
    "moe 192, whole": (lambda: v3(640, 192), "whole", ((1, 2), (1, 3))),
}


@pytest.mark.parametrize(("model", "experts", "meshes"), CUT_BLOCKS.values(), ids=CUT_BLOCKS)
def test_blocks_that_ranks_share(tmp_path: Path, model, experts: str, meshes) -> None:
    """vllm #55649, sglang #31475: a rank's part begins within a block of 128, whose scale both neighbours need."""
    plain, fp8 = write_both(tmp_path, (128, 128), model())
    reference = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = torch.stack([reference(torch.tensor([prompt])).logits[0, -1] for prompt in PROMPTS])
    torch.testing.assert_close(engine_logits(fp8), expected, rtol=1e-4, atol=1e-4)
    for dp, tp in meshes:
        sharded = engine_logits(fp8, dp, tp, sharding=WeightSharding(experts=experts))
        torch.testing.assert_close(sharded, expected, rtol=1e-4, atol=1e-4)


def test_an_fp8_model_in_bfloat16(tmp_path: Path) -> None:
    plain, fp8 = write_both(tmp_path, (16, 8))
    assert torch.equal(engine_logits(fp8, tp=2, dtype="bfloat16"), engine_logits(plain, tp=2, dtype="bfloat16"))


# -- what is refused --------------------------------------------------------------------------------------------------


def one_line(caught: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(caught.value)
    assert "\n" not in text and len(text) < 400
    return text


BAD_SCALES = {
    "missing": (None, r"its scales a.weight_scale_inv \(3, 2\) are missing"),
    "too few": (torch.ones(2, 2), r"a.weight_scale_inv has shape \(2, 2\), but blocks of 4 x 8 make it \(3, 2\)"),
    "by row": (torch.ones(10), r"has shape \(10,\), but blocks of 4 x 8 make it \(3, 2\)"),
    "one": (torch.ones(()), r"has shape \(\), but"),
    "encoded": (torch.ones(3, 2, dtype=torch.uint8), "a.weight_scale_inv is stored as U8; supported: F64, F32"),
}


@pytest.mark.parametrize(("scale", "problem"), BAD_SCALES.values(), ids=BAD_SCALES)
def test_scales_that_do_not_fit(tmp_path: Path, scale: Tensor | None, problem: str) -> None:
    scales = {} if scale is None else {"a.weight_scale_inv": scale}
    source = source_of(tmp_path, (4, 8), **{"a.weight": torch.ones(10, 10).to(FP8)}, **scales)
    with pytest.raises(CheckpointError, match=problem) as caught:
        source.take(Weight(name="a.weight", shape=(10, 10), dim=0), (0, 4))
    one_line(caught)


def test_fp8_that_the_config_does_not_announce(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(4, 4).to(FP8), "b": torch.ones(4).to(FP8)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"a.weight \(4, 4\) is stored as F8_E4M3, which takes"):
        SafetensorsFolder(tmp_path).take(Weight(name="a.weight", shape=(4, 4)), None)
    source = SafetensorsFolder(
        tmp_path, quantization=CheckpointQuantization(quant_method="fp8", weight_block_size=(2, 2))
    )
    with pytest.raises(CheckpointError, match="takes a matrix"):
        source.take(Weight(name="b", shape=(4,)), None)


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.int8, torch.int32], ids=str)
def test_unknown_encodings_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    source = source_of(tmp_path, (4, 4), **{"a.weight": torch.ones(4, 4).to(dtype)})
    with pytest.raises(CheckpointError, match=r"a.weight is stored as .*; supported: F64, F32, F16, BF16, and F8_E4M3"):
        source.take(Weight(name="a.weight", shape=(4, 4)), None)


METHODS = {
    "gptq": ({"quant_method": "gptq", "bits": 4}, "quantised by 'gptq'; supported: none, or 'fp8'"),
    "awq": ({"quant_method": "awq"}, "'awq'"),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "'bitsandbytes'"),
    "fp8 by tensor": ({"quant_method": "fp8"}, "'fp8' without weight_block_size"),
    "another by blocks": ({"quant_method": "x", "weight_block_size": [128, 128]}, "'x'"),
}


@pytest.mark.parametrize(("quantization", "problem"), METHODS.values(), ids=METHODS)
def test_other_methods_are_refused_before_anything_is_loaded(tmp_path: Path, quantization: dict, problem: str) -> None:
    v3().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    with pytest.raises(ConfigError, match=problem) as caught:
        resolve(EngineConfig(model=str(tmp_path)))
    assert "[128, 128]" in one_line(caught)
    resolved = resolve(EngineConfig(model=str(tmp_path), load_format="dummy"))
    assert any("dequantised" in note for note in resolved.notes)


BAD_CONFIGS = {
    "no method": ({"bits": 4}, "names no quant_method"),
    "a list": ([], r"quantization_config is \[\]"),
    "one number": ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size is \[128\]"),
    "zero": ({"quant_method": "fp8", "weight_block_size": [128, 0]}, "two whole numbers"),
    "text": ({"quant_method": "fp8", "weight_block_size": "128"}, "two whole numbers"),
}


@pytest.mark.parametrize(("quantization", "problem"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_a_quantization_config_that_makes_no_sense(quantization: object, problem: str) -> None:
    raw = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 8}
    assert read_config(raw | {"intermediate_size": 8}).quantization is None
    with pytest.raises(CheckpointError, match=problem):
        read_config(raw | {"intermediate_size": 8, "quantization_config": quantization})
