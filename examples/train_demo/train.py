"""Trains narrows-demo, in as many pieces as you like: it goes on from the last state in the folder.

    python examples/train_demo/train.py --folder runs/train_demo --minutes 60

Knows the loop, the schedule and the state on disk. What is learned and by what is said in the files beside it.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import time
from itertools import chain
from pathlib import Path

import corpus
import model as architecture
import torch
import vocabulary
from batches import TOKENS, Batches
from tokenizers import Tokenizer

PEAK_RATE = 2e-3
WARMUP = 150
DECAY = 0.25
"""The last part of all steps, over which the learning rate falls to nothing (warm-up, stable, decay)."""

SAVE_EVERY = 200


def schedule(step: int, steps: int) -> float:
    """The share of the peak learning rate: linear warm-up, then flat, then linear to 0 over the last quarter."""
    return min(1.0, (step + 1) / WARMUP, max(0.0, (steps - step) / (DECAY * steps)))


def length(step: int, steps: int) -> int:
    """Tokens of a sequence: short ones, which are faster, until the learning rate falls."""
    return 256 if step < (1 - DECAY) * steps else 512


def arithmetic_share(step: int, steps: int) -> float:
    """Arithmetic first, then the mix."""
    return 0.8 if step < steps // 2 else 0.55


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.folder.mkdir(parents=True, exist_ok=True)
    parts = corpus.load(args.folder / "packages")
    texts = list(chain.from_iterable(train for train, _ in parts.values()))
    tokenizer = _tokenizer(args.folder, texts)
    batches = Batches(tokenizer, texts)
    model = architecture.build()
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95), fused=True)
    state_file = args.folder / "state.pt"
    step = _resume(state_file, model, optimizer)
    if step > args.steps:
        sys.exit(f"{state_file} is at step {step} already; give --steps of at least that, or another --folder")
    _cut_curve(args.folder / "curve.csv", step)
    count = sum(p.numel() for p in model.parameters())
    print(
        f"{count / 1e6:.2f} M parameters, {batches.text_tokens / 1e6:.2f} M tokens of text, step {step} of {args.steps}"
    )
    forward = torch.compile(model, dynamic=False)
    end = time.monotonic() + 60 * args.minutes
    with (args.folder / "curve.csv").open("a", newline="") as file:
        curve = csv.writer(file)
        while step < args.steps and time.monotonic() < end:
            started = time.monotonic()
            pace = schedule(step, args.steps)
            for group in optimizer.param_groups:
                group["lr"] = PEAK_RATE * pace
            ids, labels = batches.draw(step, length(step, args.steps), arithmetic_share(step, args.steps))
            with torch.autocast("cpu", torch.bfloat16):
                loss = forward(input_ids=ids, labels=labels, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            imbalance = architecture.balance(model, architecture.BALANCE_RATE * pace)
            step += 1
            if step % 20 == 0:
                rate = TOKENS / (time.monotonic() - started)
                curve.writerow([step, f"{loss.item():.4f}", f"{imbalance:.2f}", f"{rate:.0f}"])
                file.flush()
                print(
                    f"step {step}: loss {loss.item():.3f}, worst expert {imbalance:.2f} x mean, {rate:.0f} tok/s",
                    flush=True,
                )
            if step % SAVE_EVERY == 0:
                _save(state_file, model, optimizer, step)
    _save(state_file, model, optimizer, step)
    print(f"step {step} of {args.steps} is in {state_file}" + ("" if step == args.steps else "; run again to go on"))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/train_demo"), help="state, packages and curve")
    parser.add_argument("--minutes", type=float, default=240, help="stop after this long; the next run goes on")
    parser.add_argument("--steps", type=_at_least_one, default=4000, help=f"steps of {TOKENS} tokens in all")
    parser.add_argument("--threads", type=_at_least_one, default=os.cpu_count() or 1)
    return parser.parse_args()


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def _cut_curve(curve: Path, step: int) -> None:
    """Drops what a run that was cut off had written after its last state: those steps come again."""
    if curve.exists():
        rows = [line for line in curve.read_text().splitlines() if int(line.split(",")[0]) <= step]
        curve.write_text("".join(f"{row}\n" for row in rows))


def _tokenizer(folder: Path, texts: list[str]) -> Tokenizer:
    if not (folder / "tokenizer.json").exists():
        vocabulary.save(vocabulary.train(texts), folder)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def _resume(state_file: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    if not state_file.exists():
        return 0
    state = torch.load(state_file)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def _save(state_file: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Written beside and renamed: a run that is cut off leaves the last whole state."""
    partial = state_file.with_suffix(".part")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, partial)
    partial.replace(state_file)


if __name__ == "__main__":
    main()
