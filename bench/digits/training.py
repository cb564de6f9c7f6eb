"""Train the bundled model: ``python -m bench.train_digits`` writes ``fastres/data/resnet20_digits.*``.

It trains a CIFAR ResNet-20 (He et al., CVPR 2016, §4.2) on scikit-learn's digits, from scratch, on a CPU, in minutes.
The recipe was chosen with ``--validate``, which trains on a part of the training digits and measures accuracy on the
rest. The held-out digits are used only once, after training.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import hashlib
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

import fastres
from fastres.bench.engines.eager import EagerResNet
from fastres.bench.report.results import write_whole
from fastres.network.architectures import get_architecture
from fastres.program import run_program
from fastres.terminal import progress_bar

from .data import CLASSES, SIZE, load_digits, split, validation_split

NAME = "resnet20_digits"
ENTRY = "DIGITS_V1"
DATA = Path(fastres.__file__).parent / "data"


@dataclass(frozen=True)
class Recipe:
    """SGD with Nesterov momentum. The learning rate rises linearly, then falls to zero along a cosine.

    Every image of every epoch is rotated, scaled, sheared and shifted at random, never mirrored. ``degrees``, ``zoom``,
    ``shear`` and ``shift`` (a fraction of the image) are the largest changes in either direction. With this recipe, 279
    of 280 validation digits are right.
    """

    epochs: int = 24
    batch_size: int = 64
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.15
    label_smoothing: float = 0.1
    degrees: float = 12.0
    zoom: float = 0.12
    shear: float = 0.15
    shift: float = 0.1


@dataclass(frozen=True)
class Trained:
    """A trained module in eval mode, the mean and std that normalise its pixels, and the loss of every step."""

    module: EagerResNet
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    losses: list[float]


def augment(images: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Transform each image (float32 ``[N, C, H, W]``, zero is paper) with its own random affine map, bilinearly."""
    draw = torch.rand(6, len(images), generator=generator) * 2 - 1  # [6, N], in [-1, 1)
    angle = draw[0] * math.radians(recipe.degrees)
    width, height = 1 + draw[1] * recipe.zoom, 1 + draw[2] * recipe.zoom
    shear = draw[3] * recipe.shear
    cos, sin = angle.cos(), angle.sin()
    rows = (
        torch.stack([width * cos, width * (shear * cos - sin), draw[4] * 2 * recipe.shift], dim=1),
        torch.stack([height * sin, height * (shear * sin + cos), draw[5] * 2 * recipe.shift], dim=1),
    )
    grid = nn.functional.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    return nn.functional.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def train(images: Tensor, labels: Tensor, recipe: Recipe, seed: int = 0, steps: int | None = None) -> Trained:
    """Train a new network on pixels ``[N, 3, 32, 32]`` uint8 and labels ``[N]``. The same seed gives the same network.

    ``steps`` stops early, with the schedule of the full recipe. The caller's random state does not change.
    """
    pixels = images.float() / 255
    level, spread = round(float(pixels.mean()), 4), round(float(pixels.std()), 4)
    mean, std = (level, level, level), (spread, spread, spread)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = EagerResNet(get_architecture(NAME).with_classes(len(CLASSES)))
    module = module.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    generator = torch.Generator().manual_seed(seed + 1)
    batches = math.ceil(len(images) / recipe.batch_size)
    total = recipe.epochs * batches
    stop = total if steps is None else min(steps, total)
    optimizer, scheduler = _optimizer(module, recipe, total)
    loss_function = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    losses: list[float] = []
    with progress_bar(total=stop, desc=f"Training {NAME}", unit="step") as progress:
        while len(losses) < stop:
            order = torch.randperm(len(images), generator=generator)
            for batch in order.tensor_split(batches):
                x = (augment(pixels[batch], recipe, generator) - level) / spread
                loss = loss_function(module(x.contiguous(memory_format=torch.channels_last)), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                scheduler.step()
                losses.append(loss.item())
                progress.set_postfix(epoch=len(losses) // batches, loss=f"{losses[-1]:.3f}", refresh=False)
                progress.update()
                if len(losses) == stop:
                    break
    return Trained(module.eval(), mean, std, losses)


def _optimizer(
    module: nn.Module, recipe: Recipe, total: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Return SGD over ``total`` steps, with weight decay for weights but not for biases and batch norm."""
    decayed = [parameter for parameter in module.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in module.parameters() if parameter.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=recipe.momentum, nesterov=True)
    warm = max(1, round(total * recipe.warmup))

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / (total - warm)))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@torch.inference_mode()
def logits(module: nn.Module, images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return logits ``[N, 10]``, float32, of pixels ``[N, 3, 32, 32]`` uint8, normalised with ``mean`` and ``std``."""
    shift, scale = (torch.tensor(list(values)).view(3, 1, 1) for values in (mean, std))
    parts = [module((part.float() / 255 - shift) / scale) for part in images.split(256)]
    return torch.cat(parts)


def confusion_matrix(predicted: Tensor, labels: Tensor) -> list[list[int]]:
    """Return counts ``[10, 10]``: a row for each true digit, a column for each predicted digit."""
    count = len(CLASSES)
    return torch.bincount(labels * count + predicted, minlength=count**2).view(count, count).tolist()


def make_record(trained: Trained, recipe: Recipe, seed: int, seconds: float, command: str) -> dict[str, Any]:
    """Return the whole record except the file's hash. This is the only place that uses the held-out digits."""
    images, labels = load_digits()
    train_part, held_out = split(labels)
    predicted = logits(trained.module, images[held_out], trained.mean, trained.std).argmax(1)
    correct = int((predicted == labels[held_out]).sum())
    return {
        "architecture": NAME,
        "entry": ENTRY,
        "classes": list(CLASSES),
        "data": "scikit-learn load_digits: 1797 scans of 8x8 pixels, the test part of UCI's Optical Recognition of "
        "Handwritten Digits (Alpaydin & Kaynak, 1998), enlarged to 32x32",
        "split": "fixed, 36 scans of each digit held out by the hash of their index; no two scans of the data set are "
        "equal; both parts hold digits of the same 13 writers",
        "seed": seed,
        "epochs": recipe.epochs,
        "optimizer": "SGD, Nesterov momentum; linear warm-up, then cosine to zero",
        "recipe": dataclasses.asdict(recipe),
        "train_images": len(train_part),
        "held_out_images": len(held_out),
        "held_out_correct": correct,
        "held_out_accuracy": correct / len(held_out),
        "confusion_matrix": confusion_matrix(predicted, labels[held_out]),
        "final_train_loss": round(sum(trained.losses[-20:]) / len(trained.losses[-20:]), 4),
        "mean": list(trained.mean),
        "std": list(trained.std),
        "resize": SIZE,
        "crop": SIZE,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "date": datetime.date.today().isoformat(),
        "seconds": round(seconds, 1),
        "command": command,
    }


def save(trained: Trained, record: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """Write ``resnet20_digits.safetensors`` (float32, torchvision's names) and its record. Return both paths."""
    state = {name: tensor.detach().contiguous() for name, tensor in trained.module.state_dict().items()}
    weights = safetensors.torch.save(state, metadata={"format": "pt"})
    record = {**record, "sha256": hashlib.sha256(weights).hexdigest()}
    weights_path, record_path = folder / f"{NAME}.safetensors", folder / f"{NAME}.json"
    write_whole(weights_path, weights)
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in record.items())
    write_whole(record_path, f"{{\n{lines}\n}}\n".encode())
    return weights_path, record_path


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line: train, measure accuracy on the held-out digits, and write both files."""
    parser = argparse.ArgumentParser(prog="python -m bench.train_digits", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, data order and augmentation (default 0)")
    parser.add_argument("--epochs", type=int, default=Recipe.epochs, help=f"training epochs (default {Recipe.epochs})")
    parser.add_argument("--out", type=Path, default=DATA, help="folder to write to (default: the package's data)")
    parser.add_argument(
        "--validate", action="store_true", help="measure the recipe on training digits only; write nothing"
    )
    options = parser.parse_args(arguments)
    recipe = Recipe(epochs=options.epochs)
    images, labels = load_digits()
    if options.validate:
        train_part, rest = validation_split(labels)
        trained = train(images[train_part], labels[train_part], recipe, options.seed)
        predicted = logits(trained.module, images[rest], trained.mean, trained.std).argmax(1)
        print(f"Validation accuracy {float((predicted == labels[rest]).double().mean()):.4f} on {len(rest)} digits.")
        return
    start = time.perf_counter()
    train_part, _ = split(labels)
    trained = train(images[train_part], labels[train_part], recipe, options.seed)
    seconds = time.perf_counter() - start
    command = f"python -m bench.train_digits --seed {options.seed} --epochs {options.epochs}"
    record = make_record(trained, recipe, options.seed, seconds, command)
    paths = save(trained, record, options.out)
    print(f"Held-out accuracy {record['held_out_accuracy']:.4f} on {record['held_out_images']} digits.")
    print(f"Wrote {paths[0]} and {paths[1]}.")


if __name__ == "__main__":
    sys.exit(run_program(main, "python -m bench.train_digits"))
