"""LLM: text in, text out; refusals with numbers; and the state after closing, stopping and failing."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from narrows.engine.llm import LLM, Completion
from narrows.errors import ConfigError, RankError
from narrows.sched.batch import Batch

VOCAB = 288
TEXTS = ["the narrow road", "a", "你好 世界, 😀!", "one two three four five six seven eight"]
LONG = 40


@pytest.fixture(scope="module")
def folder(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a byte-level tokenizer: random tokens are then bytes that are often no whole characters."""
    folder = tmp_path_factory.mktemp("with tokenizer")
    for file in tiny_model("v3", vocab_size=VOCAB, max_position_embeddings=128).iterdir():
        os.link(file, folder / file.name)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS * 5, trainer)
    assert 258 < backend.get_vocab_size() <= VOCAB
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(folder, max_context=96, rows_per_step=16, page_size=4) as llm:
        yield llm


@pytest.fixture(scope="module")
def expected(llm: LLM) -> list[Completion]:
    return llm.generate(TEXTS, max_tokens=LONG)


def rank_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("narrows rank")]


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(ConfigError) as error:
        call()
    text = str(error.value)
    assert text and "\n" not in text
    return text


# -- text ------------------------------------------------------------------------------------------------------------


def test_completions_come_in_the_order_of_the_prompts(llm: LLM, expected: list[Completion]) -> None:
    assert llm.tokenizer is not None
    assert [llm.tokenizer.decode(done.prompt_token_ids) for done in expected] == TEXTS
    for done in expected:
        assert done.finish_reason == "length" and len(done.token_ids) == LONG
        assert done.text == llm.tokenizer.decode(done.token_ids)
        assert len(set(done.token_ids)) > 5
    assert len({done.text for done in expected}) == len(TEXTS)


def test_streamed_pieces_join_to_the_text_and_end_with_the_completion(llm: LLM, expected: list[Completion]) -> None:
    pieces = list(llm.stream(TEXTS, max_tokens=LONG))
    for index, done in enumerate(expected):
        own = [piece for piece in pieces if piece.index == index]
        assert "".join(piece.text for piece in own) == done.text
        assert [piece.done for piece in own] == [None] * (len(own) - 1) + [done]
        assert len(own) == LONG
    assert any(piece.text == "" for piece in pieces), "characters are meant to be held back until they are whole"
    order = [piece.index for piece in pieces]
    assert order != sorted(order), "prompts are meant to run beside each other"


def test_ids_text_and_a_single_prompt_give_the_same_completion(llm: LLM, expected: list[Completion]) -> None:
    ids = [list(done.prompt_token_ids) for done in expected]
    assert llm.generate(ids, max_tokens=LONG) == expected
    assert llm.generate([TEXTS[0], ids[1]], max_tokens=LONG) == expected[:2]
    assert [llm.generate([text], max_tokens=LONG)[0] for text in TEXTS] == expected
    assert llm.generate([TEXTS[2]] * 3, max_tokens=LONG) == [expected[2]] * 3
    assert llm.generate([]) == []


@pytest.mark.parametrize(
    "options",
    [
        {"dp": 2},
        {"tp": 2, "checked": True},
        {"tp": 3, "layout": "sequence-parallel"},
        {"dp": 2, "tp": 2, "layout": "norm-before-gather", "rows_per_step": 3},
        {"dp": 4, "layout": "all-reduce", "rows_per_step": 1},
        {"kv_tokens": 80, "page_size": 1},
    ],
    ids=str,
)
def test_ranks_layouts_and_sizes_do_not_show_in_the_text(
    folder: Path, expected: list[Completion], options: dict[str, Any]
) -> None:
    with LLM(folder, **{"max_context": 96, **options}) as llm:
        assert llm.generate(TEXTS, max_tokens=LONG) == expected


def test_an_end_token_ends_the_text_and_is_not_part_of_it(llm: LLM, expected: list[Completion]) -> None:
    assert llm.tokenizer is not None
    whole = expected[0].token_ids
    end = next(token for token in whole[3:] if whole.index(token) >= 3)
    index = whole.index(end)
    (done,) = llm.generate([TEXTS[0]], max_tokens=LONG, stop_token_ids=[end])
    assert (done.finish_reason, done.token_ids) == ("stop", whole[: index + 1])
    assert done.text == llm.tokenizer.decode(whole[:index])


def test_the_checkpoints_end_token_is_the_default(folder: Path, tmp_path: Path, expected: list[Completion]) -> None:
    end = expected[1].token_ids[2]
    for file in folder.iterdir():
        if file.name != "config.json":
            os.link(file, tmp_path / file.name)
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(raw | {"eos_token_id": [end, 1]}), encoding="utf-8")
    with LLM(tmp_path, max_context=96) as llm:
        assert {end, 1} <= llm.eos_ids
        done, without = llm.generate(TEXTS[1:2], max_tokens=LONG) + llm.generate(
            TEXTS[1:2], max_tokens=LONG, ignore_eos=True
        )
    assert done.finish_reason == "stop" and done.token_ids[-1] == end and len(done.token_ids) <= 3
    assert without.token_ids == expected[1].token_ids and without.finish_reason == "length"


def test_a_text_ends_where_the_context_does(llm: LLM) -> None:
    (done,) = llm.generate([list(range(2, 92))], max_tokens=LONG)
    assert (len(done.token_ids), done.finish_reason) == (6, "length")


def test_without_a_tokenizer_there_are_token_ids_and_no_text(tiny_model: Callable[..., Path]) -> None:
    with LLM(tiny_model("llama"), max_context=32) as llm:
        (done,) = llm.generate([[1, 2, 3]], max_tokens=5)
        assert (done.text, len(done.token_ids), done.prompt_token_ids) == ("", 5, (1, 2, 3))
        text = refused(lambda: llm.generate(["the road"]))
        assert "has no tokenizer.json; " in text and "give prompts as token ids" in text


def test_random_weights_need_no_checkpoint_and_depend_on_the_seed(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    config = (tiny_model("v3") / "config.json").read_text(encoding="utf-8")
    (tmp_path / "config.json").write_text(config, encoding="utf-8")
    texts = []
    for options in ({}, {"tp": 2}, {"seed": 1}):
        with LLM(tmp_path, load_format="dummy", max_context=32, **options) as llm:
            texts.append(llm.generate([[1, 2, 3]], max_tokens=20)[0].token_ids)
    assert texts[0] == texts[1] != texts[2]


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "options", "said"),
    [
        ([[]], {}, ["the prompt is empty", "at least one token"]),
        ([""], {}, ["the prompt is empty"]),
        ([list(range(96))], {}, ["has 96 tokens", "context holds 96", "95 tokens", "--max-context"]),
        ([[5, 288]], {}, ["token id 288", "vocabulary of 288"]),
        ([[5, -1]], {}, ["token id -1", "vocabulary of 288"]),
        ([[5]], {"max_tokens": 0}, ["max_tokens is 0", "at least 1"]),
        ([[5]], {"max_tokens": -3}, ["max_tokens is -3"]),
        ("a text", {}, ["one text of 6 characters", "[text]"]),
    ],
)
def test_a_prompt_that_cannot_run_is_refused_and_leaves_nothing_behind(
    llm: LLM, expected: list[Completion], prompts: Any, options: dict[str, Any], said: list[str]
) -> None:
    text = refused(lambda: llm.generate(prompts, **options))
    assert [part for part in said if part not in text] == []
    if isinstance(prompts, list):
        refused(lambda: llm.generate([TEXTS[0], *prompts], **options))  # the good one before it is taken out again
    assert not llm.engine.scheduler.has_work
    assert llm.generate(TEXTS[:1], max_tokens=LONG) == expected[:1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tensor_parallel": 2}, ["does not know the option 'tensor_parallel'", "dp", "tp", "layout"]),
        ({"layout": "fast"}, ["layout 'fast' is not known", "all-reduce", "auto"]),
        ({"layout": "norm-before-gather"}, ["norm-before-gather cannot apply", "dp is 1"]),
        ({"tp": 16}, ["tp 16 is larger than the 8 attention heads", "dp 2 x tp 8"]),
        ({"dp": 0}, ["dp", "size 0"]),
        ({"dtype": "int3"}, ["dtype 'int3' is not known", "bfloat16"]),
        ({"device": "abacus"}, ["abacus", "h20"]),
        ({"load_format": "pickle"}, ["load format 'pickle'", "safetensors"]),
        ({"rows_per_step": 0}, ["--max-rows is 0"]),
        ({"page_size": 0}, ["page size is 0"]),
        ({"max_context": 129}, ["--max-context 129", "128 positions"]),
        ({"max_context": 1}, ["--max-context 1"]),
        ({"kv_tokens": 0}, ["--kv-tokens is 0"]),
        ({"kv_tokens": 10**12}, ["1000000000000 tokens", "this host has", "lower --kv-tokens"]),
    ],
    ids=str,
)
def test_an_impossible_option_is_refused_before_ranks_start(
    folder: Path, options: dict[str, Any], said: list[str]
) -> None:
    before = rank_threads()
    text = refused(lambda: LLM(folder, **options))
    assert [part for part in said if part not in text] == []
    assert rank_threads() == before


def test_a_request_larger_than_the_cache_names_the_needed_size(folder: Path) -> None:
    with LLM(folder, max_context=96, kv_tokens=30, page_size=10) as llm:
        text = refused(lambda: llm.generate([[2] * 20], max_tokens=20))
        assert "39 tokens" in text and "30" in text and "--kv-tokens to 39" in text
        assert len(llm.generate([[2] * 20], max_tokens=11)[0].token_ids) == 11


@pytest.mark.parametrize("name", ["no such folder/at all", "no-such-preset", "deepseek-v3"])
def test_a_missing_model_is_a_one_line_error(name: str) -> None:
    text = refused(lambda: LLM(name))
    assert name in text and any(part in text for part in ("config.json", "presets", "--load-format dummy"))


# -- what is left behind ---------------------------------------------------------------------------------------------


def test_closing_ends_the_rank_threads_and_closing_again_does_nothing(folder: Path) -> None:
    before = rank_threads()
    with LLM(folder, dp=2, tp=2, max_context=96) as llm:
        assert len(rank_threads()) == len(before) + 4
        llm.generate([[2, 3]], max_tokens=3)
    assert rank_threads() == before
    llm.close()
    with pytest.raises(RankError, match="closed"):
        llm.generate([[2, 3]], max_tokens=3)


def test_an_abandoned_stream_leaves_a_usable_engine(folder: Path, expected: list[Completion]) -> None:
    with LLM(folder, dp=2, max_context=96, rows_per_step=16, page_size=4) as llm:
        for places in (0, 1, 2, 5, 30):
            stream = llm.stream(TEXTS, max_tokens=LONG)
            for _ in range(places):
                next(stream)
            if places % 2:
                stream.close()
            del stream
            assert not llm.engine.scheduler.has_work
            llm.engine.scheduler.check_integrity()
            assert llm.generate(TEXTS, max_tokens=LONG) == expected


def test_ctrl_c_in_the_middle_of_a_step_leaves_a_usable_engine(
    folder: Path, expected: list[Completion], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted:
        """A step whose result is not ready when the host first polls."""

        def __init__(self, future: Future[Any], times: int) -> None:
            self._future, self._times = future, times

        def result(self) -> Any:
            self._times -= 1
            if self._times >= 0:
                raise KeyboardInterrupt
            return self._future.result()

    with LLM(folder, tp=2, max_context=96, rows_per_step=16) as llm:
        submit, steps = llm.engine.submit, []

        def interrupted(batch: Batch, **options: Any) -> Any:
            steps.append(batch)
            return Interrupted(submit(batch, **options), len(steps) == 6)

        monkeypatch.setattr(llm.engine, "submit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(TEXTS, max_tokens=LONG)
        assert not llm.engine.scheduler.has_work
        assert llm.generate(TEXTS, max_tokens=LONG) == expected


def test_a_second_stream_is_refused_and_the_first_continues(llm: LLM, expected: list[Completion]) -> None:
    stream = llm.stream(TEXTS[:1], max_tokens=LONG)
    pieces = [next(stream)]
    assert "still open" in refused(lambda: llm.generate(TEXTS[1:2]))
    pieces += stream
    assert "".join(piece.text for piece in pieces) == expected[0].text
    assert llm.generate(TEXTS[1:2], max_tokens=LONG) == expected[1:2]
