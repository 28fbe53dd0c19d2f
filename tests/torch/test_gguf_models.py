"""Models of every architecture from GGUF: the same logits as transformers', whole and over ranks.

The files are `gguf_lab`'s. Two outside programs check these files: transformers reads the architectures
that it knows from GGUF (below), and llama.cpp itself gave transformers' logits when this was written (docs/formats.md).
"""

from __future__ import annotations

from pathlib import Path

import gguf_lab as lab
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from narrows.arch.config import MLA
from narrows.arch.presets import load_model_config
from narrows.arch.weights import Weight
from narrows.convert.gguf_config import gguf_config
from narrows.convert.gguf_file import GgufFile
from narrows.convert.gguf_header import GgufHeader
from narrows.convert.gguf_to_hf import convert_gguf
from narrows.engine.config import EngineConfig, resolve
from narrows.engine.core import Engine
from narrows.errors import CheckpointError, ConfigError
from narrows.weights.gguf_source import GgufWeights

torch.set_num_threads(1)

CONFIGS = lab.configs()
PROMPT = tuple((i * 37 + 11) % 300 + 10 for i in range(40))
MIXED = (Kind.Q8_0, Kind.Q4_1, Kind.BF16, Kind.Q5_0, Kind.F16)


def ours(model: Path, dp: int = 1, tp: int = 1) -> Tensor:
    """Logits of the prompt's last token."""
    engine_config = EngineConfig(model=str(model), dp=dp, tp=tp, dtype="float32", max_context=64, want_logits=True)
    with Engine(resolve(engine_config)) as engine:
        engine.add(PROMPT, 1)
        return engine.submit(engine.scheduler.schedule(), keep_logits=True).result()[0].logits[0]


def theirs(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([PROMPT])).logits[0, -1]


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_transformers_over_ranks(tmp_path: Path, name: str) -> None:
    model = lab.model_of(CONFIGS[name])
    path = lab.write_model(tmp_path / "m.gguf", model, kinds=MIXED)
    expected = theirs(model)
    assert expected.std() > 0.1
    close(ours(path, dp=2, tp=2), expected)


@pytest.mark.parametrize("name", ["deepseek v2", "deepseek v2 lite", "deepseek v3"])
def test_kv_b_in_one_piece_as_older_files_have_it(tmp_path: Path, name: str) -> None:
    model = lab.model_of(CONFIGS[name])
    path = lab.write_model(tmp_path / "m.gguf", model, kinds=MIXED, whole_kv_b=True)
    assert "blk.0.attn_kv_b.weight" in GgufHeader(path).tensors
    close(ours(path, tp=2), theirs(model))


@pytest.mark.parametrize("name", ["qwen3moe", "deepseek v3"])
def test_gate_and_up_of_experts_in_one_tensor(tmp_path: Path, name: str) -> None:
    model = lab.model_of(CONFIGS[name])
    path = lab.write_model(tmp_path / "m.gguf", model, kinds=MIXED, fused_experts=True)
    assert "blk.1.ffn_up_exps.weight" not in GgufHeader(path).tensors
    close(ours(path, tp=2), theirs(model))


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "qwen3, tied", "qwen3moe"])
def test_transformers_reads_the_same_model_from_the_file(tmp_path: Path, name: str) -> None:
    """An outside reader of the file itself, for the architectures that it knows."""
    path = lab.write_model(tmp_path / "m.gguf", lab.model_of(CONFIGS[name]), kinds=(Kind.Q8_0, Kind.Q4_0))
    left_out = {"head_dim": 32, "moe_intermediate_size": 96}  # keys that it does not read
    config = AutoConfig.for_model(**load_gguf_checkpoint(str(path))["config"] | left_out)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and set(missing) <= ({"lm_head.weight"} if "tied" in name else set())
    close(ours(path, tp=2), theirs(model))


@pytest.mark.parametrize("name", ["llama, biases", "qwen3moe", "deepseek v2 lite", "deepseek v3"])
def test_the_converted_folder_is_the_model(tmp_path: Path, name: str) -> None:
    model = lab.model_of(CONFIGS[name])
    path = lab.write_model(tmp_path / "m.gguf", model, kinds=MIXED)
    folder = convert_gguf(path, tmp_path / "hf", dtype="float32")
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded) is type(model)
    close(theirs(loaded), theirs(model))


def test_some_biases_only(tmp_path: Path) -> None:
    """llama.cpp adds a bias where there is one; Hugging Face's Llama has all or none, so the others are zero."""
    model = lab.model_of(CONFIGS["llama, biases"])
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.bias.zero_()
        model.model.layers[2].mlp.up_proj.bias.zero_()
    path = lab.write_model(tmp_path / "m.gguf", model, drop=["blk.1.attn_output.bias", "blk.2.ffn_up.bias"])
    close(ours(path, tp=2), theirs(model))


# -- slices of quantised tensors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
def test_slices_of_stacked_experts_that_cut_through_blocks(tmp_path: Path, fused: bool) -> None:
    """Blocks are 32 values; an expert's 96 columns over 5 ranks are cut at 20, 40, 58, 77."""
    model = lab.model_of(CONFIGS["qwen3moe"])
    source = GgufWeights(lab.write_model(tmp_path / "m.gguf", model, kinds=[Kind.Q4_0, Kind.Q8_0], fused_experts=fused))
    experts = model.model.layers[1].mlp.experts
    gate, up = experts.gate_up_proj.detach().chunk(2, dim=1)
    whole = {"gate_proj": (gate, 0), "up_proj": (up, 0), "down_proj": (experts.down_proj.detach(), 1)}
    for name, (stacked, dim) in whole.items():
        shape = tuple(stacked.shape[1:])
        weight = Weight(name=f"model.layers.1.mlp.experts.{{expert}}.{name}.weight", shape=shape, dim=dim)
        for expert in (0, 3, 7):
            for lo, hi in ((0, 20), (20, 40), (40, 58), (58, 77), (77, 96), (33, 34), (0, 96), (5, 5)):
                expected = stacked[expert].narrow(dim, lo, hi - lo)
                assert torch.equal(source.take(weight, (lo, hi), expert), expected), (name, expert, lo, hi)
            assert torch.equal(source.take(weight, None, expert), stacked[expert])


def test_spans_of_kv_b_put_together_from_two_tensors(tmp_path: Path) -> None:
    config = CONFIGS["deepseek v3"]
    model = lab.model_of(config)
    source = GgufWeights(lab.write_model(tmp_path / "m.gguf", model, kinds=[Kind.Q8_0]))
    whole = model.model.layers[2].self_attn.kv_b_proj.weight.detach()
    weight = Weight(name="model.layers.2.self_attn.kv_b_proj.weight", shape=tuple(whole.shape), dim=0)
    for lo, hi in ((0, 64), (64, 192), (30, 34), (31, 33), (63, 130), (200, 256), (0, 256), (7, 7)):
        assert torch.equal(source.take(weight, (lo, hi)), whole[lo:hi]), (lo, hi)
    columns = Weight(name=weight.name, shape=weight.shape, dim=1)
    for lo, hi in ((0, 17), (17, 50), (95, 96)):
        assert torch.equal(source.take(columns, (lo, hi)), whole[:, lo:hi]), (lo, hi)


def test_a_rank_decodes_the_blocks_of_its_slice_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = GgufWeights(lab.write_model(tmp_path / "m.gguf", lab.model_of(CONFIGS["deepseek v3"]), kinds=[Kind.Q8_0]))
    decoded: list[int] = []
    pieces = GgufFile.pieces

    def count(self, name, rows, columns):
        decoded.append(len(rows) * (-(-columns[1] // 32) - columns[0] // 32))
        return pieces(self, name, rows, columns)

    monkeypatch.setattr(GgufFile, "pieces", count)
    source.take(
        Weight(name="model.layers.1.mlp.experts.{expert}.down_proj.weight", shape=(128, 96), dim=1), (20, 40), 5
    )
    assert sum(decoded) == 128 * 2  # of 8 experts one, of its 3 blocks a row two
    decoded.clear()
    source.take(Weight(name="model.layers.1.self_attn.kv_b_proj.weight", shape=(256, 96), dim=0), (64, 128))
    assert sum(decoded) == 96 * 1 + 32 * 3  # one head's keys (transposed: 96 rows of 32) and its values


# -- the resulting config ------------------------------------------------------------------------------------------


def test_which_deepseek_a_file_holds(tmp_path: Path) -> None:
    v3 = lab.model_of(CONFIGS["deepseek v3"])
    path = lab.write_model(tmp_path / "3.gguf", v3)
    config = load_model_config(str(path))
    assert config.model_type == "deepseek_v3" and isinstance(config.attention, MLA)
    moe = config.moe
    assert moe is not None
    assert (moe.scoring_func, moe.topk_method, moe.n_group, moe.topk_group) == ("sigmoid", "noaux_tc", 4, 2)
    assert (moe.norm_topk_prob, moe.routed_scaling_factor, moe.first_k_dense_replace) == (True, 2.5, 1)
    assert config.rope.as_mapping() is not None
    assert (config.rope.as_mapping()["mscale"], config.rope.as_mapping()["mscale_all_dim"]) == (0.707, 0.707)
    # Files without keys for groups, as they were written until late 2025, have none: as llama.cpp computes them.
    plain = lab.write_model(
        tmp_path / "1.gguf", v3, metadata={"expert_group_count": None, "expert_group_used_count": None}
    )
    moe = load_model_config(str(plain)).moe
    assert moe is not None and (moe.n_group, moe.topk_group) == (1, 1)
    v2 = load_model_config(str(lab.write_model(tmp_path / "2.gguf", lab.model_of(CONFIGS["deepseek v2, grouped"]))))
    assert v2.model_type == "deepseek_v2"
    assert v2.moe is not None and v2.moe.topk_method == "group_limited_greedy"


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    model = lab.model_of(CONFIGS["deepseek v3"])
    extra = {f"blk.3.nextn.{name}.weight": np.ones(128, np.float32) for name in ("enorm", "hnorm")}
    path = lab.write_model(
        tmp_path / "m.gguf", model, metadata={"block_count": 4, "nextn_predict_layers": 1}, tensors=extra
    )
    assert load_model_config(str(path)).num_hidden_layers == 3
    close(ours(path), theirs(model))


def test_a_dense_deepseek(tmp_path: Path) -> None:
    model = lab.model_of(lab.dense_deepseek())
    close(ours(lab.write_model(tmp_path / "m.gguf", model, kinds=MIXED), tp=2), theirs(model))


SMALL = np.zeros(8, np.float32)
WRONG = {
    "experts without their bias": (
        "deepseek v3",
        {"drop": ["blk.1.exp_probs_b.bias"]},
        CheckpointError,
        "lacks 1 of .* first blk.1.exp_probs_b.bias",
    ),
    "a missing stack of experts": (
        "qwen3moe",
        {"drop": ["blk.2.ffn_down_exps.weight"]},
        CheckpointError,
        "lacks 1 of .* first blk.2.ffn_down_exps.weight",
    ),
    "half of kv_b": (
        "deepseek v2",
        {"drop": ["blk.0.attn_v_b.weight"]},
        CheckpointError,
        "lacks 1 of .* first blk.0.attn_v_b.weight",
    ),
    "another number of experts": (
        "qwen3moe",
        {"metadata": {"expert_count": 9}},
        CheckpointError,
        r"ffn_gate_inp.weight is \(8, 128\), but the metadata makes it \(9, 128\)",
    ),
    "a million heads": (
        "qwen3",
        {"metadata": {"attention.head_count": 1 << 20, "attention.head_count_kv": 1 << 20}},
        CheckpointError,
        r"attn_q.weight is \(128, 96\), but the metadata makes it \(33554432, 96\)",
    ),
    "ten million layers": (
        "qwen3",
        {"metadata": {"block_count": 10_000_000}},
        CheckpointError,
        "10000000 layers of 36 tensors",
    ),
    "a tensor of another architecture": (
        "qwen3",
        {"tensors": {"blk.0.attn_sinks.weight": SMALL}},
        ConfigError,
        "1 tensors that a Qwen3ForCausalLM does not, first blk.0.attn_sinks.weight",
    ),
    "a bias that the family has not": (
        "qwen2",
        {"tensors": {"blk.0.attn_output.bias": SMALL}},
        ConfigError,
        "a Qwen2ForCausalLM does not, first blk.0.attn_output.bias",
    ),
    "Mixtral": (
        "mistral",
        {"metadata": {"expert_count": 8, "expert_used_count": 2}},
        ConfigError,
        "llama.expert_count is 8, which narrows does not obey for the architecture 'llama'; supported: 0",
    ),
    "softmax that is normalised": (
        "deepseek v2",
        {"metadata": {"expert_weights_norm": True}},
        ConfigError,
        "deepseek2.expert_weights_norm is True; supported with softmax scores: false",
    ),
    "a third way of scoring": (
        "deepseek v2",
        {"metadata": {"expert_gating_func": 3}},
        ConfigError,
        "expert_gating_func is 3; supported: 1 .softmax. and 2 .sigmoid.",
    ),
    "latent sizes that disagree": (
        "deepseek v3",
        {"metadata": {"attention.key_length": 100}},
        CheckpointError,
        "attention.key_length is 100, but the other fields make it 112",
    ),
    "more to rotate than a head has": (
        "deepseek v3",
        {"metadata": {"rope.dimension_count": 48, "attention.key_length": 144}},
        CheckpointError,
        "heads of 48 columns cannot rotate 48",
    ),
}


@pytest.mark.parametrize(("name", "options", "kind", "problem"), WRONG.values(), ids=WRONG)
def test_errors_are_one_line_before_any_tensor_is_read(tmp_path: Path, name, options, kind, problem) -> None:
    path = lab.write_model(tmp_path / "m.gguf", lab.model_of(CONFIGS[name]), **options)
    with pytest.raises(kind, match=problem) as caught:
        load_model_config(str(path))
    assert type(caught.value) is kind and "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_the_config_of_a_tied_model_and_its_vocabulary(tmp_path: Path) -> None:
    path = lab.write_model(tmp_path / "m.gguf", lab.model_of(CONFIGS["qwen3, tied"]))
    raw = gguf_config(GgufHeader(path))
    assert raw["tie_word_embeddings"] and raw["vocab_size"] == 320 and raw["head_dim"] == 32
    wrong = lab.write_model(tmp_path / "w.gguf", lab.model_of(CONFIGS["qwen3"]), metadata={"vocab_size": 321})
    with pytest.raises(CheckpointError, match=r"qwen3\.vocab_size is 321, but there are 320 embeddings"):
        load_model_config(str(wrong))
