"""Makes the checkpoint folder of narrows-demo from a training state: bf16 weights, tokenizer, evaluation files.

    python examples/train_demo/export.py --folder runs/train_demo --out runs/narrows-demo

Knows the files of a Hugging Face folder. Every evaluation file is made of held-out text and facts only.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from random import Random

import corpus
import model as architecture
import problems
import torch

CHOICES_PER_SOURCE = 60
PROBLEMS = 600
WORD_PROBLEMS = 100
NUM_ENDINGS = 4
WORDS_OF_CONTEXT, WORDS_OF_ENDING = 40, 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/train_demo"), help="what train.py wrote to")
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint folder")
    args = parser.parse_args()
    if not (args.folder / "state.pt").exists():
        sys.exit(f"{args.folder} holds no state.pt; run train.py --folder {args.folder} first")
    if find_spec("matplotlib") is None:
        sys.exit("the training curve is drawn with matplotlib: pip install -e '.[plot]'")
    args.out.mkdir(parents=True, exist_ok=True)
    _weights(args.folder, args.out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(args.folder / name, args.out / name)
    held_out = {name: held for name, (_, held) in corpus.load(args.folder / "packages").items()}
    _evaluation(held_out, args.out / "eval")
    _plot(args.folder / "curve.csv", args.out / "training.png")


def _weights(folder: Path, out: Path) -> None:
    state = torch.load(folder / "state.pt")
    model = architecture.build()
    model.load_state_dict(state["model"])
    # Selection biases stay in float32, as DeepSeek's own checkpoints have them.
    biases = {name: value.clone() for name, value in model.named_buffers() if name.endswith("correction_bias")}
    model = model.to(torch.bfloat16)
    for name, value in biases.items():
        model.get_buffer(name).data = value
    model.save_pretrained(out)


def _evaluation(held_out: dict[str, list[str]], out: Path) -> None:
    out.mkdir(exist_ok=True)
    text = "\n\n".join(piece for pieces in held_out.values() for piece in pieces[:6])
    (out / "heldout.txt").write_text(text + "\n")
    random = Random("evaluation")
    drawn = [problems.draw(random, held_out=True) for _ in range(PROBLEMS)]
    fields = ("kind", "question", "answer")
    chosen = [problem for problem in drawn if problem.kind != "word problem"]
    _write(out / "arithmetic.jsonl", ({name: getattr(p, name) for name in fields} for p in chosen))
    words = [problems.draw(random, held_out=True, kind=problems.word_problem) for _ in range(WORD_PROBLEMS)]
    _write(out / "gsm8k.jsonl", ({"question": p.question, "answer": p.answer} for p in words))
    _write(out / "choices.jsonl", _choices(held_out, random))


def _choices(held_out: dict[str, list[str]], random: Random) -> Iterable[dict[str, object]]:
    """A passage and four endings: its own, and one each of three other pieces of the same source."""
    for name, pieces in held_out.items():
        long = [
            words for words in (piece.split(" ") for piece in pieces) if len(words) > WORDS_OF_CONTEXT + WORDS_OF_ENDING
        ]
        for _ in range(min(CHOICES_PER_SOURCE, 4 * len(long)) if len(long) >= NUM_ENDINGS else 0):
            passages = [_passage(words, random) for words in random.sample(long, NUM_ENDINGS)]
            context, right = passages[0]
            endings = [ending for _, ending in passages]
            random.shuffle(endings)
            yield {"source": name, "ctx": context, "endings": endings, "label": endings.index(right)}


def _passage(words: list[str], random: Random) -> tuple[str, str]:
    start = random.randrange(len(words) - WORDS_OF_CONTEXT - WORDS_OF_ENDING)
    middle = start + WORDS_OF_CONTEXT
    return " ".join(words[start:middle]), " ".join(words[middle : middle + WORDS_OF_ENDING])


def _write(path: Path, lines: Iterable[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _plot(curve: Path, out: Path) -> None:
    import matplotlib.pyplot as plt  # noqa: PLC0415 - only the picture needs it

    steps, losses = zip(*((int(row[0]), float(row[1])) for row in csv.reader(curve.open())), strict=True)
    figure, axes = plt.subplots(figsize=(7, 3))
    axes.plot(steps, losses, linewidth=0.8)
    axes.set_xlabel("step (4,096 tokens each)")
    axes.set_ylabel("training loss, nats per learned token")
    axes.set_yscale("log")
    figure.tight_layout()
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main()
