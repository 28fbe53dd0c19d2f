"""Sampling through the engine: a text depends on its seed alone, in any batch; penalties, ends, logprobs.

The reference is a loop written here over transformers' logits: one request, one token at a time, no cache.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.utils import logging

from narrows.arch.presets import load_model_config
from narrows.cli.main import main
from narrows.cost.pricer import StepShape
from narrows.engine.config import EngineConfig, resolve
from narrows.engine.core import Engine
from narrows.engine.llm import LLM
from narrows.engine.program import Wrap
from narrows.engine.worker import Worker
from narrows.errors import ConfigError
from narrows.layout import Mesh
from narrows.plan.named import applicable_layouts
from narrows.plan.report.saved import write_plan
from narrows.sched.sampling import SamplingParams, uniform
from narrows.sched.scheduler import Request

VOCAB = 97
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "num_attention_heads": 4,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
V3 = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 3,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "norm_topk_prob": True,
}


def full(*case: object) -> Any:
    """A case of ``make test-full``: in ``make test`` each of its values is in another case."""
    return pytest.param(*case, marks=pytest.mark.full)


DRAWN = SamplingParams(temperature=0.9, top_k=40, top_p=0.95, min_p=0.01)
PROMPT_LENGTHS = (9, 1, 30, 4, 17)
TEXT = {"".join((chr(97 + i // 26), chr(97 + i % 26))): i for i in range(VOCAB)}
"""The test tokenizer: id 0 is "aa", 1 is "ab", 96 is "ds"; any two adjacent letters may belong to one token or two."""


@dataclass
class Model:
    folder: Path
    model: Any

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Of the token after ``ids``."""
        with torch.no_grad():
            row: Tensor = self.model(torch.tensor([list(ids)])).logits[0, -1]
        return row.float()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Model]]:
    verbosity, num_threads = logging.get_verbosity(), torch.get_num_threads()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # several are slower for such small models
    made = {}
    for name, build in (
        ("llama", lambda: LlamaForCausalLM(LlamaConfig(**COMMON, num_key_value_heads=2, head_dim=16))),
        ("v3", lambda: DeepseekV3ForCausalLM(DeepseekV3Config(**COMMON, **V3))),
    ):
        torch.manual_seed(0)
        model = build().eval()
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        words = tokenizers.Tokenizer(tokenizers.models.WordLevel(TEXT, unk_token="aa"))
        words.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(".."), "isolated")
        words.decoder = tokenizers.decoders.Fuse()
        words.save(str(folder / "tokenizer.json"))
        made[name] = Model(folder, model)
    yield made
    torch.set_num_threads(num_threads)
    logging.enable_progress_bar()
    logging.set_verbosity(verbosity)


def prompt(length: int, seed: int = 1) -> tuple[int, ...]:
    return tuple(torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


PROMPTS = [prompt(length, seed=i) for i, length in enumerate(PROMPT_LENGTHS)]


def engine(model: Model, dp: int = 1, tp: int = 1, **options: Any) -> Engine:
    wrap = options.pop("wrap", None)
    engine_config = EngineConfig(
        model=str(model.folder), dp=dp, tp=tp, **{"dtype": "float32", "max_context": 128} | options
    )
    return Engine(resolve(engine_config), wrap=wrap)


def serve(
    engine: Engine, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams | None], num_tokens: int = 24
) -> list[Request]:
    requests = [engine.add(tuple(ids), num_tokens, sampling=p) for ids, p in zip(prompts, params, strict=True)]
    for _ in engine.run():
        pass
    assert all(request.finish_reason == "length" for request in requests)
    return requests


def straight(model: Model, ids: Sequence[int], params: SamplingParams, num_tokens: int) -> list[int]:
    """One request, one token after the other, as the parameters are defined."""
    tokens = list(ids)
    for _ in range(num_tokens):
        scores = model.logits(tokens)[None]
        if params.repetition_penalty != 1.0:
            scores = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(torch.tensor([tokens]), scores)
        for token, count in Counter(tokens[len(ids) :]).items():
            scores[0, token] -= params.presence_penalty + params.frequency_penalty * count
        tokens.append(chosen(scores, params, len(tokens)))
    return tokens[len(ids) :]


def chosen(scores: Tensor, params: SamplingParams, position: int) -> int:
    if params.temperature == 0:
        first, second = scores[0].topk(2).values
        assert first - second > 1e-4, "so close that either token would be right: take another prompt"
        return int(scores.argmax())
    warpers = [TemperatureLogitsWarper(params.temperature)]
    warpers += [TopKLogitsWarper(params.top_k)] if params.top_k else []
    warpers += [TopPLogitsWarper(params.top_p)] if params.top_p < 1 else []
    warpers += [MinPLogitsWarper(params.min_p)] if params.min_p else []
    for warper in warpers:
        scores = warper(torch.zeros((1, 1), dtype=torch.int64), scores.double())
    shares, ids = scores.softmax(dim=-1)[0].sort(descending=True)
    assert params.seed is not None
    return int(ids[int((shares.cumsum(0) <= uniform(params.seed, position)).sum())])


# -- a text is its seed's --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(models: dict[str, Model]) -> dict[str, list[list[int]]]:
    """The text of each prompt alone on one rank, with seed i for prompt i."""
    texts = {}
    for name, model in models.items():
        with engine(model) as one:
            texts[name] = [serve(one, [ids], [replace(DRAWN, seed=i)])[0].output for i, ids in enumerate(PROMPTS)]
    return texts


@pytest.mark.parametrize("name", ["llama", "v3"])
def test_sampled_text_equals_a_plain_loop(
    models: dict[str, Model], alone: dict[str, list[list[int]]], name: str
) -> None:
    for i, ids in enumerate(PROMPTS):
        assert alone[name][i] == straight(models[name], ids, replace(DRAWN, seed=i), 24)
        assert len(set(alone[name][i])) > 8, "a text that loops proves little"


@pytest.mark.parametrize(
    ("name", "dp", "tp"),
    [
        full("llama", 1, 1),
        ("llama", 1, 2),
        full("llama", 2, 1),
        full("llama", 2, 2),
        full("v3", 1, 1),
        full("v3", 1, 2),
        ("v3", 2, 1),
        ("v3", 2, 2),
    ],
)
def test_the_same_seed_gives_the_same_text_in_every_batch(
    models: dict[str, Model], alone: dict[str, list[list[int]]], name: str, dp: int, tp: int
) -> None:
    """Under every layout: all prompts at once, in the other order, and cut into chunks beside others' decode."""
    params = [replace(DRAWN, seed=i) for i in range(len(PROMPTS))]
    for layout in applicable_layouts(load_model_config(str(models[name].folder)), Mesh.of(dp=dp, tp=tp)):
        with engine(models[name], dp, tp, layout=layout) as whole:
            assert [r.output for r in serve(whole, PROMPTS, params)] == alone[name], layout
            assert [r.output for r in serve(whole, PROMPTS[::-1], params[::-1])] == alone[name][::-1], layout
        with engine(models[name], dp, tp, layout=layout, rows_per_step=7, page_size=4) as chunked:
            greedy = [None, SamplingParams(logprobs=2)]
            requests = serve(chunked, [*PROMPTS, *PROMPTS[:2]], [*params, *greedy])
            assert [r.output for r in requests[: len(PROMPTS)]] == alone[name], layout


def test_seeds_change_the_text_and_a_missing_seed_is_random_per_request(models: dict[str, Model]) -> None:
    hot = SamplingParams(temperature=1.0)
    with engine(models["llama"]) as one:
        seeded = serve(one, [PROMPTS[0]] * 6, [replace(hot, seed=i) for i in range(6)])
        assert len({tuple(request.output) for request in seeded}) == 6
        unseeded = serve(one, [PROMPTS[0]] * 6, [hot] * 6)
        assert len({tuple(request.output) for request in unseeded}) == 6
        assert len({request.sampling.seed for request in unseeded if request.sampling}) == 6
        # the random seed is in the request, so that its text can be reproduced
        again = serve(one, [PROMPTS[0]] * 6, [request.sampling for request in unseeded])
        assert [request.output for request in again] == [request.output for request in unseeded]


def test_neighbouring_seeds_and_positions_draw_from_the_models_distribution(models: dict[str, Model]) -> None:
    """600 requests with consecutive seeds: their first tokens are spread as the probabilities say (chi-square)."""
    probs = models["llama"].logits(PROMPTS[0]).double().softmax(dim=-1)
    with engine(models["llama"], kv_tokens=16 * 700) as one:
        requests = serve(one, [PROMPTS[0]] * 600, [SamplingParams(temperature=1.0, seed=i) for i in range(600)], 1)
    counts = torch.bincount(torch.tensor([request.output[0] for request in requests]), minlength=VOCAB)
    often = probs * 600 >= 5
    observed = torch.cat((counts[often], counts[~often].sum()[None])).double()
    expected = torch.cat((probs[often], probs[~often].sum()[None])) * 600
    degrees = len(observed) - 1
    assert degrees > 8
    assert ((observed - expected) ** 2 / expected).sum() < degrees + 4 * (2 * degrees) ** 0.5


# -- penalties -------------------------------------------------------------------------------------------------------

PENALTIES = [
    dict(repetition_penalty=1.4),
    dict(repetition_penalty=0.8),
    dict(presence_penalty=1.5),
    dict(presence_penalty=-1.0),
    dict(frequency_penalty=0.9),
    dict(frequency_penalty=-0.3),
    dict(repetition_penalty=1.2, presence_penalty=0.4, frequency_penalty=0.3),
]


@pytest.mark.parametrize(
    ("name", "temperature", "dp", "tp"),
    [
        ("llama", 0.0, 1, 1),
        full("llama", 0.0, 2, 2),
        full("llama", 0.8, 1, 1),
        ("llama", 0.8, 2, 2),
        full("v3", 0.0, 1, 1),
        ("v3", 0.0, 2, 2),
        full("v3", 0.8, 1, 1),
        full("v3", 0.8, 2, 2),
    ],
)
def test_penalties_equal_a_plain_loop(
    models: dict[str, Model], name: str, temperature: float, dp: int, tp: int
) -> None:
    """One step runs ahead, so a row's token is often a sample that the host has not seen: it counts all the same."""
    params = [SamplingParams(temperature=temperature, seed=i, **p) for i, p in enumerate(PENALTIES)]
    params.append(SamplingParams(temperature=temperature, seed=99))
    ids = PROMPTS[4]
    expected = [straight(models[name], ids, p, 20) for p in params]
    assert len({tuple(text) for text in expected}) >= len(params) - 1, "nearly every penalty changes the text"
    with engine(models[name], dp, tp, rows_per_step=12) as busy:
        assert [request.output for request in serve(busy, [ids] * len(params), params, 20)] == expected


def test_a_frequency_penalty_of_2_makes_greedy_text_run_through_the_vocabulary(models: dict[str, Model]) -> None:
    with engine(models["llama"]) as one:
        free, bound = serve(one, [PROMPTS[1]] * 2, [None, SamplingParams(frequency_penalty=2.0)], 60)
        assert max(Counter(bound.output).values()) < max(Counter(free.output).values())


def histories(workers: list[Worker]) -> list[set[int]]:
    return [set(worker._sampler._histories) for worker in sorted(workers, key=lambda w: w.comm.rank)]


def test_ranks_drop_the_history_of_requests_that_ended(models: dict[str, Model]) -> None:
    workers: list[Worker] = []

    def wrap(worker: Worker) -> Wrap:
        workers.append(worker)
        return lambda layer, op, reads, writes, operation: operation

    penalized = SamplingParams(presence_penalty=0.5)
    with engine(models["llama"], 1, 2, wrap=wrap) as two:
        long = two.add(PROMPTS[0], 12, sampling=penalized)
        short = two.add(PROMPTS[1], 3, sampling=penalized)
        stopped = two.add(PROMPTS[2], 12, sampling=penalized)
        plain = two.add(PROMPTS[3], 12, sampling=SamplingParams(temperature=1.0, seed=0))
        seen = []
        for request in two.run():
            if request is stopped and len(stopped.output) == 5:
                two.scheduler.abort(stopped, "stop")
            if request is long:
                seen.append(histories(workers))
        assert {long.id, short.id, stopped.id} in [ranks[0] for ranks in seen]
        assert all(plain.id not in held for ranks in seen for held in ranks), "no rank needs its history"
        # Steps run ahead, so the held text may be a step older when the host looks.
        assert seen[-1] == [{long.id}] * 2
        (other,) = serve(two, [PROMPTS[0]], [None], 2)
        assert histories(workers) == [set()] * 2
        # and a request with the same tokens starts afresh
        (again,) = serve(two, [PROMPTS[0]], [penalized], 12)
        assert again.output == long.output and other.output != []


# -- log-probabilities -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dp", "tp"),
    [
        ("llama", 1, 1),
        full("llama", 1, 2),
        full("llama", 2, 1),
        full("llama", 2, 2),
        full("v3", 1, 1),
        ("v3", 1, 2),
        ("v3", 2, 1),
        ("v3", 2, 2),
    ],
)
def test_logprobs_are_transformers(models: dict[str, Model], name: str, dp: int, tp: int) -> None:
    params = [
        SamplingParams(logprobs=5),
        SamplingParams(logprobs=0, temperature=1.0, seed=1),
        None,
        SamplingParams(logprobs=20, temperature=0.7, top_k=2, repetition_penalty=1.5, seed=2),
        SamplingParams(logprobs=1, frequency_penalty=1.0),
    ]
    with engine(models[name], dp, tp, rows_per_step=20) as busy:
        requests = serve(busy, PROMPTS, params, 10)
    for request, sampling in zip(requests, params, strict=True):
        if sampling is None:
            assert request.logprobs == []
            continue
        assert len(request.logprobs) == len(request.output) == 10
        for i, (token, (logprob, best)) in enumerate(zip(request.output, request.logprobs, strict=True)):
            expected = models[name].logits([*request.prompt, *request.output[:i]]).double().log_softmax(dim=-1)
            assert logprob == pytest.approx(expected[token].item(), abs=1e-4), "of the logits before any penalty"
            values = [value for _, value in best]
            assert len(best) == sampling.logprobs and values == sorted(values, reverse=True)
            assert values == pytest.approx(
                expected.sort(descending=True).values[: sampling.logprobs].tolist(), abs=1e-4
            )
            assert all(value == pytest.approx(expected[other].item(), abs=1e-4) for other, value in best)


# -- ends ------------------------------------------------------------------------------------------------------------


def generate(llm: LLM, **options: Any) -> Any:
    (completion,) = llm.generate([PROMPTS[0]], **options)
    return completion


def words(ids: Sequence[int]) -> str:
    by_id = {i: word for word, i in TEXT.items()}
    return "".join(by_id[i] for i in ids)


@pytest.fixture(scope="module")
def llm(models: dict[str, Model]) -> Iterator[LLM]:
    with LLM(models["llama"].folder, tp=2, dtype="float32", max_context=128) as llm:
        yield llm


def test_length(llm: LLM) -> None:
    done = generate(llm, max_tokens=7)
    assert (len(done.token_ids), done.finish_reason, done.text) == (7, "length", words(done.token_ids))


def test_a_stop_string_across_a_token_border_ends_the_text_and_frees_the_pages(llm: LLM) -> None:
    """It is found when a row of the request is in flight already: that sample is dropped, others continue as before."""
    free = llm.engine.scheduler.pools[0].num_free
    whole, beside = llm.generate([PROMPTS[0], PROMPTS[2]], max_tokens=30)
    text = whole.text
    at = next(i for i in range(9, len(text), 2) if text.find(text[i : i + 2]) == i)  # from an odd place: two tokens'
    stop = text[at : at + 2]
    cut, other = llm.generate([PROMPTS[0], PROMPTS[2]], max_tokens=30, stop=[stop, "never in it"])
    assert (cut.text, cut.finish_reason) == (text[:at], "stop")
    assert cut.token_ids == whole.token_ids[: at // 2 + 2], "the tokens that hold the stop string, and no more"
    if stop not in beside.text:
        assert other == beside
    assert llm.engine.scheduler.pools[0].num_free == free
    llm.engine.scheduler.check_integrity()
    assert not llm.engine.scheduler.has_work
    assert generate(llm, max_tokens=30, stop=stop) == cut, "one string is as good as a list of one"


def test_pieces_never_show_the_beginning_of_a_stop_string(llm: LLM) -> None:
    whole = generate(llm, max_tokens=30)
    stop = whole.text[9:14]
    shown = ""
    for piece in llm.stream([PROMPTS[0]], max_tokens=30, stop=[stop]):
        shown += piece.text
        assert whole.text.startswith(shown) and len(shown) <= 9
    assert shown == whole.text[:9]


def test_a_stop_string_in_the_last_token_allowed_is_a_stop(llm: LLM) -> None:
    whole = generate(llm, max_tokens=12)
    ending = next(whole.text[-n:] for n in range(1, 9) if whole.text.find(whole.text[-n:]) == 24 - n)
    done = generate(llm, max_tokens=12, stop=[ending])
    assert (done.finish_reason, done.text) == ("stop", whole.text[: -len(ending)])
    assert done.token_ids == whole.token_ids


def test_text_held_for_a_stop_string_is_emitted_at_the_end(llm: LLM) -> None:
    whole = generate(llm, max_tokens=6)
    done = generate(llm, max_tokens=6, stop=[whole.text[-3:] + "zz"])
    assert (done.text, done.finish_reason) == (whole.text, "length")


def test_stop_token_ids_end_the_text_without_being_in_it(llm: LLM) -> None:
    whole = generate(llm, max_tokens=30)
    token = whole.token_ids[11]
    first = whole.token_ids.index(token)
    done = generate(llm, max_tokens=30, stop_token_ids=[token, 10**6])
    assert (done.token_ids, done.finish_reason) == (whole.token_ids[: first + 1], "stop")
    assert done.text == words(whole.token_ids[:first])


def test_the_end_of_sequence_token_ends_a_text_unless_it_is_ignored(
    models: dict[str, Model], llm: LLM, tmp_path: Path
) -> None:
    whole = generate(llm, max_tokens=20)
    eos = whole.token_ids[8]
    first = whole.token_ids.index(eos)
    for file in models["llama"].folder.iterdir():
        shutil.copy(file, tmp_path)
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    with LLM(tmp_path, dp=2, dtype="float32", max_context=128) as ending:
        done = generate(ending, max_tokens=20)
        assert (done.token_ids, done.finish_reason) == (whole.token_ids[: first + 1], "stop")
        assert done.text == words(whole.token_ids[:first])
        ignoring = generate(ending, max_tokens=20, ignore_eos=True)
        assert (ignoring.token_ids, ignoring.finish_reason) == (whole.token_ids, "length")
        both = generate(ending, max_tokens=20, ignore_eos=True, stop_token_ids=[eos])
        assert both.token_ids == done.token_ids, "an id that was requested still ends it"


def test_logprobs_stay_with_their_tokens_when_a_text_ends_early(llm: LLM) -> None:
    whole = generate(llm, max_tokens=30, sampling=SamplingParams(logprobs=3))
    token = whole.token_ids[5]
    done = generate(llm, max_tokens=30, sampling=SamplingParams(logprobs=3), stop_token_ids=[token])
    assert len(done.logprobs) == len(done.token_ids) == whole.token_ids.index(token) + 1
    for got, expected in zip(done.logprobs, whole.logprobs, strict=False):
        assert got[0] == pytest.approx(expected[0], abs=1e-5)


def test_an_unread_stream_leaves_a_usable_engine(llm: LLM) -> None:
    expected = llm.generate(PROMPTS, max_tokens=15)
    for length in (1, 2, 7):
        stream = llm.stream(PROMPTS, max_tokens=15)
        for _ in range(length):
            next(stream)
        stream.close()
        assert not llm.engine.scheduler.has_work
        assert llm.engine.scheduler.pools[0].num_free == llm.resolved.limits.pages_per_group - 1
    assert llm.generate(PROMPTS, max_tokens=15) == expected


def test_requests_continue_in_the_next_run(models: dict[str, Model]) -> None:
    with engine(models["llama"]) as one:
        expected = [request.output for request in serve(one, PROMPTS, [None] * 5, 15)]
        requests = [one.add(ids, 15) for ids in PROMPTS]
        for places in (3, 8):
            run = one.run()
            for _ in range(places):
                next(run)
            run.close()
        for _ in one.run():
            pass
        assert [request.output for request in requests] == expected


def test_stop_strings_need_a_tokenizer_and_may_not_be_empty(models: dict[str, Model], llm: LLM, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a stop string is empty"):
        generate(llm, stop=[""])
    for file in models["llama"].folder.iterdir():
        if file.name != "tokenizer.json":
            shutil.copy(file, tmp_path)
    with LLM(tmp_path, dtype="float32", max_context=128) as bare, pytest.raises(ConfigError, match="stop strings"):
        generate(bare, stop=["x"])


# -- other features with sampling --------------------------------------------------------------------------------------


def test_a_saved_plan_without_whole_logits_refuses_to_sample_and_continues(
    models: dict[str, Model], tmp_path: Path
) -> None:
    with engine(models["llama"], 1, 2) as free:
        resolved = free.resolved
        shape = StepShape.of(resolved.mesh, (16,), phase="prefill", context=64)
        write_plan(tmp_path / "plan.json", free.plans.planner.plan(shape), resolved.config, resolved.sharding)
        expected = serve(free, PROMPTS, [None] * 5)
    with engine(models["llama"], 1, 2, plan_file=str(tmp_path / "plan.json")) as pinned:
        for params in (DRAWN, SamplingParams(logprobs=0), SamplingParams(presence_penalty=1.0)):
            with pytest.raises(ConfigError, match="it cannot sample, penalise or give log-probabilities"):
                pinned.add(PROMPTS[0], 5, sampling=params)
        assert not pinned.scheduler.has_work
        assert [r.output for r in serve(pinned, PROMPTS, [None] * 5)] == [r.output for r in expected]


def test_the_command_line_samples_as_the_library(
    models: dict[str, Model], llm: LLM, capsys: pytest.CaptureFixture[str]
) -> None:
    params = SamplingParams(
        temperature=0.8, top_p=0.9, top_k=30, min_p=0.01, repetition_penalty=1.1, seed=7, logprobs=2
    )
    whole = llm.generate([words(PROMPTS[0])], max_tokens=12, sampling=params)[0]
    stop = whole.text[9:12]
    done = llm.generate([words(PROMPTS[0])], max_tokens=12, sampling=params, stop=[stop])[0]
    assert done.finish_reason == "stop" and done.text == whole.text[: whole.text.index(stop)]
    options = "--temperature 0.8 --top-p 0.9 --top-k 30 --min-p 0.01 --repetition-penalty 1.1 --seed 7 --logprobs 2"
    common = f"--tp 2 --dtype float32 --max-context 128 --max-tokens 12 --quiet --prompt {words(PROMPTS[0])}"
    argv = ["generate", str(models["llama"].folder), *common.split(), *options.split(), "--stop", stop]
    for more in ([], ["--batch-invariant"]):
        assert main([*argv, *more]) == 0
        text, *tokens = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
        assert text == done.text
        assert [float(line.split()[0]) for line in tokens] == [round(value, 3) for value, _ in done.logprobs]
        assert [line.split()[1].strip("'") for line in tokens] == [words([token]) for token in done.token_ids]
    assert main([*argv, "--batch-invariant", "--max-rows", "100"]) == 2
    assert "chunks of 256 rows, but a step may hold 100" in capsys.readouterr().err
    assert main([*argv, "--min-p", "1.5"]) == 2
    assert "min_p is 1.5; it must be between 0 and 1" in capsys.readouterr().err
