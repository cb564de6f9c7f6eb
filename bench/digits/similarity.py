"""``python -m bench.similarity``: find the training scans that look most like a held-out digit, by embedding.

Each scan is represented by the pooled features of ``resnet20_digits``, ``[64]``. A held-out digit is classified by its
nearest neighbour among the training scans (cosine similarity), or by a vote of the nearest five. The same is done with
raw pixels. The network was trained on the training scans, so the accuracy is for new digits of the same ten classes,
not for unseen classes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastres
from fastres.bench.report.results import write_whole
from fastres.commands.environment import environment
from fastres.errors import FastresError
from fastres.look.pictures import require_matplotlib, save_picture
from fastres.program import run_program
from fastres.terminal import progress_bar

from .data import load_digits, split

MODEL = "resnet20_digits"
VOTERS = 5
BATCH = 256
QUERIES_DRAWN = 12


@dataclass(frozen=True)
class Accuracy:
    """Numbers of held-out digits classified correctly by the nearest neighbour, and by a vote of the nearest five."""

    nearest: int
    vote_of_5: int


@dataclass(frozen=True, eq=False)
class Similarity:
    """The nearest training scans of each held-out digit: their positions and cosine similarities, ``[360, 5]``."""

    neighbours: Tensor
    similarities: Tensor
    queries: Tensor  # digits, int64 [360]
    candidates: Tensor  # digits of the training scans, int64 [1437]

    @property
    def accuracy(self) -> Accuracy:
        votes = self.candidates[self.neighbours]  # [360, 5], the nearest first
        nearest = int((votes[:, 0] == self.queries).sum())
        return Accuracy(nearest, int((votes.mode(1).values == self.queries).sum()))

    @property
    def wrong(self) -> list[int]:
        """The held-out digits whose nearest neighbour is a different digit."""
        return torch.nonzero(self.candidates[self.neighbours[:, 0]] != self.queries).flatten().tolist()


def embeddings(model: fastres.Model, images: Tensor) -> Tensor:
    """Return pooled features of pixels ``[N, 3, H, W]`` uint8, scaled to unit length, float32 ``[N, C]`` on the CPU."""
    parts = progress_bar(images.split(BATCH), desc="embed", unit="batch", delay=1.0)
    return torch.nn.functional.normalize(torch.cat([model.embed(part.to(model.device)).cpu() for part in parts]))


def compare(vectors: Tensor, labels: Tensor) -> Similarity:
    """Find the nearest training scans of each held-out digit. ``vectors`` ``[1797, C]`` must have unit length."""
    train, held_out = split(labels)
    similarities, neighbours = (vectors[held_out] @ vectors[train].T).topk(VOTERS, dim=1)
    return Similarity(neighbours, similarities, labels[held_out], labels[train])


def draw(found: Similarity, images: Tensor, labels: Tensor, path: Path) -> None:
    """Draw held-out digits, one per column (all misclassified ones first), each above its nearest training scans."""
    from matplotlib.figure import Figure

    train, held_out = split(labels)
    spread = [int((found.queries == digit).nonzero()[0]) for digit in range(10)]
    columns = list(dict.fromkeys([*found.wrong, *spread]))[:QUERIES_DRAWN]
    figure = Figure(figsize=(len(columns) * 1.15, (VOTERS + 1) * 1.3 + 0.6), layout="constrained")
    right = found.accuracy.nearest
    figure.suptitle(f"Nearest training scans by embedding: {right} of {len(found.queries)} held-out digits correct")
    axes = figure.subplots(VOTERS + 1, len(columns), squeeze=False)
    for column, query in enumerate(columns):
        digit = int(found.queries[query])
        _tile(axes[0, column], images[held_out[query]], f"held out: {digit}", "black")
        for rank in range(VOTERS):
            neighbour = int(found.neighbours[query, rank])
            other = int(found.candidates[neighbour])
            words = f"{other} ({float(found.similarities[query, rank]):.3f})"
            _tile(axes[rank + 1, column], images[train[neighbour]], words, "#555555" if other == digit else "red")
    save_picture(figure, path, dpi=120)


def _tile(axis: Any, pixels: Tensor, words: str, colour: str) -> None:
    axis.imshow(pixels[0].numpy(), cmap="gray_r", vmin=0, vmax=255)
    axis.set_title(words, fontsize=8, color=colour)
    axis.axis("off")


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare and print, and write ``similarity.json`` and ``similarity.png`` to the folder ``--out``."""
    parser = argparse.ArgumentParser(prog="python -m bench.similarity", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for similarity.json and similarity.png (default: print only)")
    options = parser.parse_args(arguments)
    try:
        _run(options.out)
    except FastresError as error:
        print(f"similarity: {error}", file=sys.stderr)
        return 2
    return 0


def _run(out: Path | None) -> None:
    if out:
        require_matplotlib()
    images, labels = load_digits()
    model = fastres.load(MODEL)
    found = compare(embeddings(model, images), labels)
    pixels = compare(torch.nn.functional.normalize(images[:, 0].flatten(1).float()), labels)
    count = len(found.queries)
    print(f"{count} held-out digits, {len(found.candidates)} training scans, cosine similarity. Correct:")
    for name, result in (("embeddings of resnet20_digits", found), ("raw pixels", pixels)):
        accuracy = result.accuracy
        print(
            f"  {name:30}  nearest {accuracy.nearest} ({accuracy.nearest / count:.2%}), "
            f"vote of {VOTERS} {accuracy.vote_of_5} ({accuracy.vote_of_5 / count:.2%})"
        )
    if out:
        record = {
            "held_out": count,
            "training_scans": len(found.candidates),
            "embeddings": asdict(found.accuracy),
            "pixels": asdict(pixels.accuracy),
            "command": "python -m bench.similarity",
            "environment": {key: value for key, value in environment().items() if key != "weights_folder"},
        }
        write_whole(out / "similarity.json", (json.dumps(record, indent=2) + "\n").encode())
        draw(found, images, labels, out / "similarity.png")
        print(f"Wrote {out / 'similarity.json'} and {out / 'similarity.png'}.")


if __name__ == "__main__":
    sys.exit(run_program(main, "python -m bench.similarity"))
