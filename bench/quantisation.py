"""Measure how near 8 bit is to float32: ``python -m bench.quantisation`` writes ``quantisation.json`` to ``--out``.

- The bundled network, and networks that this command trains on scikit-learn's digits: calibrated on training images,
  judged on the held-out ones, which have labels. Each of these is judged in eight places, because two of the 360 scans
  more or less would be half a point of accuracy.
- Networks of ImageNet's size with random weights (:mod:`bench.measure.calibration`): smooth random pictures, no labels.
  Random networks amplify every error, because no training has made them robust. They are the hard case for the choice
  of scales, not an example of what users see.
- The memory and the time of a calibration on a folder of JPEGs of several sizes, one in a hundred of them broken.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastres
from fastres.bench.classify import make_folder, sampled_memory
from fastres.bench.digits.data import load_digits, split
from fastres.bench.measure.calibration import calibrated, pixels, smooth_images
from fastres.bench.report.results import check_folder, significant, write_json
from fastres.bench.study.data import load_dataset
from fastres.bench.study.training import Job, Recipe, augment, train_all
from fastres.commands.environment import installed_version
from fastres.executors.processor import processor
from fastres.network.architectures import get_architecture
from fastres.program import run_program
from fastres.quantisation.comparison import CLEAR, compare
from fastres.terminal import wrote
from fastres.text import text_table

JSON_NAME = "quantisation.json"
BUNDLED = "resnet20_digits"
# Networks to train on the digits. Those for larger pictures do not settle at the study's rate, and the deepest of them
# needs a lower one still: at 0.01, its loss rises in the first epochs, and it ends with 91 % of the scans right, not
# with 98 %.
SMALL, LARGE = Recipe(epochs=8), Recipe(epochs=12, learning_rate=0.01)
TRAINED = {
    "resnet56": SMALL,
    "resnet18": SMALL,
    "resnet50": LARGE,
    "resnext50_32x4d": LARGE,
    "resnet152": replace(LARGE, learning_rate=0.003),
}
RANDOM = ("resnet18", "resnet50", "resnext50_32x4d", "resnet152")
PLACES, SHIFT = 8, 3  # of a held-out scan: as it is, and moved by up to so many pixels, which is less than in training
SIZE = 224
BATCH = 16


def bundled() -> dict[str, Any]:
    """Quantise the bundled network on its training scans and judge it on the held-out ones."""
    images, labels = load_digits()
    train, held_out = split(labels)
    judged = moved(images[held_out]), labels[held_out].repeat(PLACES)
    return measured(fastres.load(BUNDLED), images[train], *judged, "trained (bundled)")


def moved(scans: Tensor) -> Tensor:
    """Return ``scans`` ``[N, 3, H, W]`` in ``PLACES`` places, ``[PLACES · N, 3, H, W]``; the first are as given."""
    generator = torch.Generator().manual_seed(0)
    return torch.cat([scans, *(augment(scans, SHIFT, False, generator) for _ in range(PLACES - 1))])


def jobs(names: Sequence[str], epochs: int | None) -> list[Job]:
    """Return the trainings of these networks, with their own number of epochs or the given one."""
    recipes = {name: TRAINED.get(name, LARGE) for name in names}
    return [Job(name, 0, replace(recipe, epochs=epochs or recipe.epochs)) for name, recipe in recipes.items()]


def trained(job: Job, folder: Path) -> dict[str, Any]:
    """Train a network on the digits, or read it from ``folder``, and quantise it."""
    (network,) = train_all([job], folder, workers=1)
    name, epochs = job.model, job.recipe.epochs
    data = load_dataset()
    transforms = fastres.Transforms(32, 32, data.mean, data.std)
    model = fastres.load(name, network.state, transforms=transforms)
    judged = moved(data.test_images), data.test_labels.repeat(PLACES)
    return measured(model, data.train_images, *judged, f"trained for {epochs} epochs")


def random(name: str, samples: int) -> dict[str, Any]:
    """Quantise a network with random weights on ``samples`` pictures and judge it on three times as many others."""
    network = calibrated(get_architecture(name))
    model = fastres.load(name, network.state_dict(), transforms=fastres.Transforms(SIZE, SIZE))
    given, others = (pixels(smooth_images(n, SIZE, SIZE, seed=seed)) for n, seed in ((samples, 11), (3 * samples, 12)))
    return measured(model, given, others, None, "random")


def measured(model: fastres.Model, given: Tensor, others: Tensor, labels: Tensor | None, kind: str) -> dict[str, Any]:
    """Quantise ``model`` with the images ``given``; compare it with float32 on the images ``others``."""
    start = time.perf_counter()
    quantized = fastres.quantize(model, given)
    seconds = time.perf_counter() - start
    truth, found = (torch.cat([each(batch) for batch in others.split(BATCH)]) for each in (model, quantized))
    difference = compare(found, truth)
    row: dict[str, Any] = {
        "model": model.architecture.name,
        "weights": kind,
        "size": others.shape[2],
        "calibrated_on": quantized.record["images"]["used"],
        **{key: quantized.record[key] for key in ("method", "equalised", "corrected", "kept")},
        **asdict(difference),
        "snr_db": difference.snr_db,
        "accuracy": None,
        "seconds": significant(seconds, 3),
        "record": quantized.record,
    }
    if labels is not None:
        right = [float((logits.argmax(1) == labels).double().mean()) for logits in (truth, found)]
        row["accuracy"] = {"float32": right[0], "int8": right[1]}
    return row


def memory(name: str, count: int) -> dict[str, Any]:
    """Return the memory and the time of a calibration of ``name`` on a folder of ``count`` JPEGs."""
    network = calibrated(get_architecture(name))
    model = fastres.load(name, network.state_dict())
    samples: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(prefix="fastres-quantisation-") as scratch:
        broken = make_folder(Path(scratch), count)
        model(torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8, device="cpu"))  # packs the weights
        start = time.perf_counter()
        with warnings.catch_warnings(), sampled_memory(samples):
            warnings.simplefilter("ignore")
            quantized = fastres.quantize(model, scratch, method="auto")
        seconds = time.perf_counter() - start
    totals = [sample["main_mb"] + sample["workers_mb"] for sample in samples]
    return {
        "model": name,
        "images": count,
        "broken": broken,
        "skipped": quantized.record["images"]["skipped"],
        "used": quantized.record["images"]["used"],
        "model_mb": significant(totals[0], 4),
        "peak_mb": significant(max(totals), 4),
        "peak_above_model_mb": significant(max(totals) - totals[0], 4),
        "seconds": significant(seconds, 4),
        "samples": samples,
    }


def summary(found: dict[str, Any]) -> str:
    """Return the results as a table."""
    rows = [("model", "weights", "px", "method", "logit error", "agree", "clear", "agree", "float32", "int8")]
    for row in found["networks"]:
        accuracy = row["accuracy"]
        rows.append(
            (
                row["model"],
                row["weights"],
                str(row["size"]),
                row["method"] + " +equalised" * row["equalised"] + " +corrected" * row["corrected"],
                f"{row['logit_error']:.2%}",
                f"{row['agreement']:.1%}",
                f"{row['clear']}/{row['images']}",
                "" if row["clear_agreement"] is None else f"{row['clear_agreement']:.1%}",
                *((f"{accuracy['float32']:.2%}", f"{accuracy['int8']:.2%}") if accuracy else ("", "")),
            )
        )
    text = text_table(rows, right=range(4, 10))
    if found["memory"]:
        used = found["memory"]
        text += (
            f"\n\n{used['model']}, {used['images']:,} JPEGs, {used['skipped']} broken: {used['seconds']:g} s, "
            f"peak {used['peak_above_model_mb']:g} MB above the model"
        )
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the results, and write them if ``--out`` is given. Each network's row is written when done."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(arguments)
    if options.out:
        check_folder(options.out)
    found: dict[str, Any] = {"environment": _environment(arguments), "clear": CLEAR, "places": PLACES}
    found |= {"networks": [], "memory": None}
    work: list[Callable[[], dict[str, Any]]] = [bundled]
    training = jobs(options.train, options.epochs)
    work += [partial(trained, job, options.trained) for job in training]
    work += [partial(random, name, options.samples) for name in options.random]
    if options.images:  # first, while the process holds nothing else
        found["memory"] = memory(options.memory_model, options.images)
        _write(options.out, found)
    if training:
        train_all(training, options.trained, workers=min(len(training), os.cpu_count() or 1))
    for measure in work:
        found["networks"].append(measure())
        _write(options.out, found)
    print(summary(found))
    if options.out:
        wrote(options.out / JSON_NAME)
        print(f"Wrote {options.out / JSON_NAME}")
    return 0


def _write(folder: Path | None, found: dict[str, Any]) -> None:
    if folder:
        write_json(folder / JSON_NAME, found)


def _environment(arguments: Sequence[str]) -> dict[str, Any]:
    return {
        **processor(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        **{package: installed_version(package) for package in ("torch", "pillow", "pyarrow")},
        "fastres": fastres.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", "-m", "bench.quantisation", *arguments]),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.quantisation", description="Measure how near 8 bit is to float32."
    )
    add = parser.add_argument
    add("--train", nargs="*", default=list(TRAINED), metavar="MODEL", help="networks to train on the digits")
    add("--epochs", type=int, help=f"epochs of every training (default: {SMALL.epochs} or {LARGE.epochs})")
    add("--trained", type=Path, default=Path("out/quantisation"), help="folder of trained networks (%(default)s)")
    add("--random", nargs="*", default=RANDOM, metavar="MODEL", help="networks with random weights")
    add("--samples", type=int, default=128, help="pictures to quantise random networks on (default: %(default)s)")
    add("--images", type=int, default=5000, help="JPEGs for the memory (default: %(default)s; 0: do not measure)")
    add("--memory-model", default="resnet50", metavar="MODEL", help="network for the memory (default: %(default)s)")
    add("--out", type=Path, help=f"output folder for {JSON_NAME}")
    return parser


if __name__ == "__main__":
    sys.exit(run_program(main, "python -m bench.quantisation"))
