"""A load drawn: how the latencies are distributed, and what went on when. Needs matplotlib (the extra ``plot``)."""

from __future__ import annotations

from collections.abc import Sequence

from narrows.bench.plot import check_plot
from narrows.workload.figures import Answer

__all__ = ["plot_load"]


def plot_load(answers: Sequence[Answer], title: str, file: str) -> None:
    """Left, the share of requests (of tokens, for ITL) within so many milliseconds; right, each request over time."""
    done = sorted((a for a in answers if a.pieces_s and not a.error), key=lambda a: a.sent_s)
    figure = check_plot(file)(figsize=(11, 4.2), layout="constrained")
    figure.suptitle(title)
    shares, times = figure.subplots(1, 2)
    for name, values in (
        ("TTFT", [a.ttft_s for a in done]),
        ("TPOT", [tpot for a in done if (tpot := a.tpot_s) is not None]),
        ("ITL", [itl for a in done for itl in a.itl_s()]),
        ("E2E", [a.e2e_s for a in done]),
    ):
        if values:
            shares.step(sorted(1e3 * value for value in values), [(i + 1) / len(values) for i in range(len(values))])
            shares.lines[-1].set_label(name)
    shares.set(xscale="log", xlabel="milliseconds", ylabel="share within", ylim=(0, 1))
    shares.grid(alpha=0.3)
    if shares.lines:
        shares.legend()
    begin = min((a.sent_s for a in done), default=0.0)
    for row, answer in enumerate(done):
        first = answer.pieces_s[0]
        times.plot([answer.sent_s - begin, first - begin], [row, row], color="tab:orange", linewidth=1)
        times.plot([first - begin, answer.ended_s - begin], [row, row], color="tab:blue", linewidth=1)
    times.set(xlabel="seconds (orange: before the first token)", ylabel="request")
    figure.savefig(file)
