"""The engine on a real GPU, against the same engine on the CPU. Skipped where torch sees no GPU, as in CI.

Thread ranks share the one GPU, so that every mesh and layout can be checked on it; NCCL between several GPUs is not
tested.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from narrows.arch.presets import PRESETS
from narrows.comm.device import DeviceGraph
from narrows.comm.process_groups import NcclTransport
from narrows.cost.devices import device_of_card
from narrows.engine.config import EngineConfig
from narrows.engine.llm import LLM, Completion
from narrows.engine.worker import GRAPHS
from narrows.errors import ConfigError
from narrows.evaluate.verify import verify
from narrows.sched.sampling import SamplingParams

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")

PROMPTS = ["What is 12 plus 30?", "The river", "Which is larger, 41 or 14?"]
DRAWN = SamplingParams(temperature=0.8, top_k=40, top_p=0.95, repetition_penalty=1.1, seed=5)


def texts(sampling: SamplingParams | None = None, **options: object) -> list[Completion]:
    with LLM("narrows-demo", **options) as llm:
        return llm.generate(PROMPTS, max_tokens=24, sampling=sampling)


@pytest.fixture(scope="module")
def on_cpu() -> dict[SamplingParams | None, list[Completion]]:
    return {sampling: texts(sampling, dtype="float32") for sampling in (None, DRAWN)}


@pytest.mark.parametrize("sampling", [None, DRAWN])
@pytest.mark.parametrize(("dp", "tp"), [(1, 1), (1, 2), (2, 2), (1, 8), (4, 2)])
def test_texts_equal_the_cpus(
    dp: int, tp: int, sampling: SamplingParams | None, on_cpu: dict[SamplingParams | None, list[Completion]]
) -> None:
    got = texts(sampling, dtype="float32", run_on="cuda", dp=dp, tp=tp)
    assert [one.token_ids for one in got] == [one.token_ids for one in on_cpu[sampling]]


@pytest.mark.parametrize("sampling", [None, DRAWN, SamplingParams(temperature=0.8, seed=5, logprobs=2)])
def test_texts_of_graphs_equal_walked_ones(
    sampling: SamplingParams | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Contexts grow through several pages, so that most steps are replays at other lengths than the captured ones."""
    options = {"dtype": "float32", "run_on": "cuda", "page_size": 4}
    walked = texts(sampling, **options)
    monkeypatch.setenv(GRAPHS, "1")
    replays, replay = [], DeviceGraph.replay

    def counted(self: DeviceGraph) -> None:
        replays.append(id(self))
        replay(self)

    monkeypatch.setattr(DeviceGraph, "replay", counted)
    got = texts(sampling, **options)
    assert [one.token_ids for one in got] == [one.token_ids for one in walked]
    assert not caplog.text, "no graph was dropped"
    assert len(replays) > len(set(replays)) or sampling is DRAWN, "DRAWN penalises, so its steps are walked"


@pytest.mark.parametrize("kind", ["deepseek-v2-lite", "qwen3-30b-a3b", "llama-3.1-8b"])
def test_graphs_of_published_widths_in_bf16(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Captured without an error, and right at their first replay."""
    monkeypatch.setenv(GRAPHS, "1")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(PRESETS[kind] | {"num_hidden_layers": 2}), encoding="utf-8")
    with LLM(file, load_format="dummy", dtype="bfloat16", run_on="cuda", max_context=1024) as llm:
        llm.generate([list(range(100, 400)), [7, 8, 9]], max_tokens=40)
    assert not caplog.text


def test_texts_of_a_rank_process_equal_the_cpus(on_cpu: dict[SamplingParams | None, list[Completion]]) -> None:
    got = texts(dtype="float32", run_on="cuda", ranks="processes")
    assert [one.token_ids for one in got] == [one.token_ids for one in on_cpu[None]]


def test_scores_equal_the_cpus() -> None:
    scored = []
    for run_on in ("cpu", "cuda"):
        with LLM("narrows-demo", dtype="float32", run_on=run_on) as llm:
            scored.append([s.logprob for one in llm.score(PROMPTS) for s in one.prompt_logprobs])
    torch.testing.assert_close(torch.tensor(scored[1]), torch.tensor(scored[0]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("dp", "tp"), [(1, 4), (2, 2), (4, 1), (2, 4)])
def test_every_layout_and_stage_equals_one_rank(dp: int, tp: int, dtype: str) -> None:
    prompts = [[(7 * i + j) % 250 for j in range(5 + 9 * i)] for i in range(6)]
    report = verify(EngineConfig(model="narrows-demo", run_on="cuda", dtype=dtype, dp=dp, tp=tp), prompts, num_decode=4)
    assert report.layouts and report.ok, [layout.failure for layout in report.layouts]


@pytest.mark.parametrize("kind", ["deepseek-v2-lite", "qwen3-30b-a3b", "llama-3.1-8b", "dsv3-mini"])
def test_published_widths_run_in_bf16(kind: str, tmp_path: Path) -> None:
    """Two layers with random weights: every kernel takes these shapes, and gives finite numbers."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(PRESETS[kind] | {"num_hidden_layers": 2}), encoding="utf-8")
    with LLM(file, load_format="dummy", dtype="bfloat16", run_on="cuda", max_context=1024) as llm:
        done = llm.generate([list(range(100, 400)), [7, 8, 9]], max_tokens=4, sampling=SamplingParams(logprobs=1))
        assert [len(one.token_ids) for one in done] == [4, 4]
        assert all(-100 < logprob <= 0 for one in done for logprob, _ in one.logprobs)


def test_prices_are_for_the_installed_gpu() -> None:
    name = device_of_card(torch.cuda.get_device_name(0))
    if name is None:
        pytest.skip("no prices for this card")
    with LLM("narrows-demo", run_on="cuda") as llm:
        assert llm.resolved.deployment.device.name == name
        assert llm.engine.ranks.transport == "memory of one device (cuda)"


def test_more_rank_processes_than_gpus_are_refused() -> None:
    num = torch.cuda.device_count() + 1
    with pytest.raises(ConfigError, match=f"the host has {num - 1}"):
        LLM("narrows-demo", run_on="cuda", ranks="processes", tp=num)


def test_nccl_transport_of_one_rank() -> None:
    """Calls to NCCL are legal and padding is removed; sums over several ranks would need several GPUs."""
    torch.cuda.set_device(0)
    transport = NcclTransport(torch.distributed.HashStore(), 0, 1, host=None)
    x = torch.arange(12.0, device="cuda").view(4, 3)
    addend = torch.ones_like(x)
    assert torch.equal(transport.gather(x, [4]), x)
    assert torch.equal(transport.reduce(x, [4], (addend,), whole=True), x + 1)
    assert torch.equal(transport.reduce(x, [4], (addend,), whole=False), x + 1)
    ids = torch.arange(4, device="cuda", dtype=torch.int32).view(4, 1)
    for got, want in zip(transport.gather_fields([x, ids], [4]), (x, ids), strict=True):
        assert torch.equal(got, want)
    assert torch.equal(transport.gather_columns(x, [3]), x)
