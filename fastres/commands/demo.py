"""``fastres demo``: classify handwritten digits with a trained network, then compare ResNet-50 with eager PyTorch.

The demo downloads nothing: the digits come with scikit-learn, their network comes with fastres, and ResNet-50 has
random weights.
"""

from __future__ import annotations

import copy
import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastres.errors import FastresError
from fastres.extras import check_dependencies
from fastres.look.pictures import checked_picture, save_picture
from fastres.model.conversion import from_module
from fastres.model.loading import load
from fastres.model.model import Model
from fastres.network.architectures import get_architecture
from fastres.terminal import progress_bar, wrote
from fastres.text import dtype_name, path_text

Engine = Callable[[Tensor], Tensor]

NAME = "resnet20_digits"
PICTURE = "fastres_demo.png"
CELLS, COLUMNS = 40, 10
IMAGE_SIZE = 224
BATCHES = (1, 8)
# Largest accepted relative difference of an image's logits from those of eager float32. Folding batch norm and summing
# in another order cost about 1e-6 (CPU, 2026-11-23); half precision rounds every activation to 11 or 8 bits.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Speed:
    """Median milliseconds of one ResNet-50 batch in each engine, all with the same dtype."""

    batch: int
    fastres_ms: float
    eager_ms: float
    eager_channels_last_ms: float

    @property
    def ratio(self) -> float:
        """The speedup of fastres over the faster of the two eager layouts."""
        return min(self.eager_ms, self.eager_channels_last_ms) / self.fastres_ms


@dataclass(frozen=True)
class DemoReport:
    """The results of the demo. ``wrong`` holds a pair (digit, prediction) for each misread held-out digit."""

    device: str
    dtype: str
    images: int
    correct: int
    recorded_accuracy: float
    wrong: tuple[tuple[str, str], ...]
    max_relative_error: float
    speeds: tuple[Speed, ...]
    picture: Path

    @property
    def accuracy(self) -> float:
        return self.correct / self.images


@dataclass(frozen=True)
class Reading:
    """The held-out digits with the network's predictions."""

    pixels: Tensor  # uint8 [N, 3, 32, 32]
    digits: list[int]
    read: list[int]
    scores: list[float]

    @property
    def wrong(self) -> list[int]:
        return [index for index, (digit, read) in enumerate(zip(self.digits, self.read, strict=True)) if digit != read]


def run(output: Path | None = None, quick: bool = False) -> DemoReport:
    """Run the demo on the GPU if there is one, else on the CPU; print the results and draw the digits.

    ``output`` is the picture's path (``.png``, ``.jpg``, ``.pdf`` or ``.svg``; by default ``fastres_demo.png`` in the
    current folder). ``quick`` times with fewer repetitions. Raises ``MissingDependencyError`` without scikit-learn or
    matplotlib, and ``FastresError`` if the picture cannot be written or the logits differ from eager PyTorch's.
    """
    picture = checked_picture(PICTURE if output is None else output, PICTURE)
    check_dependencies("The demo", ["sklearn", "matplotlib"], "demo")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load(NAME).to(device)
    dtype = dtype_name(model.dtype)
    print(f"On {describe_device(device)}, in {dtype}.\n", flush=True)

    reading, error = read_digits(model)
    wrong = tuple((str(reading.digits[index]), str(reading.read[index])) for index in reading.wrong)
    count = len(reading.digits)
    recorded = _record()["held_out_accuracy"]
    _print_reading(count, wrong, recorded, error)

    speeds = compare_speed(device, quick)
    _print_speeds(speeds)

    draw(reading, picture)
    wrote(picture)
    print(f"Picture of the digits: {path_text(picture)}")
    correct = count - len(wrong)
    return DemoReport(str(device), dtype, count, correct, recorded, wrong, error, speeds, picture)


def describe_device(device: torch.device) -> str:
    """Return the GPU's name, or the CPU's number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"the CPU ({threads} thread{'s' if threads != 1 else ''})"


def _record() -> dict[str, Any]:
    """Return the training record beside the weights."""
    record: dict[str, Any] = json.loads((Path(__file__).parents[1] / "data" / f"{NAME}.json").read_text())
    return record


def read_digits(model: Model) -> tuple[Reading, float]:
    """Classify the held-out digits with ``model``; return the result and the largest relative error of its logits.

    Raises ``FastresError`` if the logits differ from those of the plain PyTorch network with the same weights.
    """
    from fastres.bench.digits.data import as_image, load_digits, load_scans, split
    from fastres.bench.digits.training import logits
    from fastres.bench.engines.eager import EagerResNet

    images, labels = load_digits()
    _, held_out = split(labels)
    scans, _ = load_scans()
    predictions = model.predict([as_image(scans[index]) for index in held_out.tolist()], top_k=1)
    best = [ranked[0] for ranked in predictions]
    pixels = images[held_out]
    reading = Reading(pixels, labels[held_out].tolist(), [p.index for p in best], [p.score for p in best])

    eager = EagerResNet(model.architecture)
    eager.load_state_dict({name: tensor.cpu() for name, tensor in model.state_dict().items()})
    expected = logits(eager.eval(), pixels, model.transforms.mean, model.transforms.std)
    found = torch.cat([model(part.to(model.device)).cpu() for part in pixels.split(60)])
    return reading, _checked_error(found, expected, model.dtype, NAME)


def _checked_error(found: Tensor, expected: Tensor, dtype: torch.dtype, name: str) -> float:
    """Return the largest relative L2 difference of an image's logits.

    Raises ``FastresError`` if it is above the dtype's tolerance.
    """
    error = float(((found.float() - expected.float()).norm(dim=1) / expected.float().norm(dim=1)).max())
    if not error <= TOLERANCE[dtype]:
        raise FastresError(
            f"The logits of {name} in {dtype_name(dtype)} differ from eager PyTorch's by {error:.2g}, but at most "
            f"{TOLERANCE[dtype]:.0e} is accepted. Please report this with the output of 'fastres env'"
        )
    return error


def compare_speed(
    device: torch.device, quick: bool = False, name: str = "resnet50", size: int = IMAGE_SIZE
) -> tuple[Speed, ...]:
    """Time each batch size in fastres and in eager PyTorch (both memory layouts) in turns; return the medians.

    The weights are random. The logits of each batch size are compared before it is timed. Raises ``FastresError`` if
    they differ.
    """
    from fastres.bench.measure.calibration import calibrated, smooth_images

    reference = calibrated(get_architecture(name))
    model = from_module(reference).to(device)
    eager = copy.deepcopy(reference).to(device, model.dtype)
    eager_last = copy.deepcopy(eager).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    engines: tuple[Engine, ...] = (model, eager, eager_last)
    on_gpu = device.type == "cuda"
    warm_ups = 5 if on_gpu else 1
    repetitions = {(False, False): 15, (False, True): 5, (True, False): 100, (True, True): 20}[on_gpu, quick]
    speeds = []
    total = len(BATCHES) * (warm_ups + repetitions)
    with (
        progress_bar(total=total, desc=f"Timing {name}", unit="round", disable=None) as progress,
        torch.inference_mode(),
    ):
        for batch in BATCHES:
            x = smooth_images(batch, size, size, seed=batch)
            found = model(x.to(device, model.dtype)).cpu()
            _checked_error(found, reference(x), model.dtype, name)
            x = x.to(device, model.dtype)
            given = (x, x, x.contiguous(memory_format=torch.channels_last))
            times: tuple[list[float], ...] = ([], [], [])
            for turn in range(-warm_ups, repetitions):
                for engine in (0, 1, 2):
                    elapsed = _milliseconds(engines[engine], given[engine], device)
                    if turn >= 0:
                        times[engine].append(elapsed)
                progress.update()
            speeds.append(Speed(batch, *(statistics.median(engine_times) for engine_times in times)))
    return tuple(speeds)


def _milliseconds(engine: Engine, x: Tensor, device: torch.device) -> float:
    """Return the time of one call, including launches and the GPU's work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    engine(x)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) * 1e3


def _print_reading(count: int, wrong: Sequence[tuple[str, str]], recorded: float, error: float) -> None:
    accuracy = (count - len(wrong)) / count
    print(f"A ResNet-20 reads {count} handwritten digits that it was not trained on:")
    print(f"  {count - len(wrong)} correct, {accuracy:.2%} (its training record says {recorded:.2%})")
    if wrong:
        pairs = Counter(f"{digit} as {read}" for digit, read in wrong)
        print(f"  misread: {', '.join(f'{times} × {pair}' for pair, times in pairs.items())}")
    print(f"  largest relative difference from eager PyTorch's logits (float32, same weights): {error:.1e}\n")


def _print_speeds(speeds: Sequence[Speed]) -> None:
    print(f"ResNet-50, {IMAGE_SIZE}×{IMAGE_SIZE} images, random weights, same logits; median milliseconds per batch:")
    print("  batch    fastres      eager   eager, channels last   fastres vs. the faster eager")
    for speed in speeds:
        print(
            f"  {speed.batch:5d} {speed.fastres_ms:10.2f} {speed.eager_ms:10.2f} {speed.eager_channels_last_ms:22.2f}"
            f"   {speed.ratio:.2f}× as fast"
        )
    print()


def draw(reading: Reading, path: Path) -> None:
    """Write a grid of held-out digits with their predictions: all misread digits, in red, and some others.

    The file is written completely or not at all. Raises ``FastresError`` if it cannot be written.
    """
    from matplotlib.figure import Figure

    shown = chosen_cells(len(reading.digits), reading.wrong)
    rows = math.ceil(len(shown) / COLUMNS)
    figure = Figure(figsize=(COLUMNS * 1.05, rows * 1.3 + 0.5), layout="constrained")
    right = len(reading.digits) - len(reading.wrong)
    figure.suptitle(f"{right} of {len(reading.digits)} held-out digits read correctly", fontsize=12)
    axes = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for axis in axes:
        axis.axis("off")
    for axis, index in zip(axes, shown, strict=False):
        digit, read, score = reading.digits[index], reading.read[index], reading.scores[index]
        axis.imshow(reading.pixels[index, 0].numpy(), cmap="gray_r", vmin=0, vmax=255)
        wrong = digit != read
        title = f"{read}, is {digit} ({score:.0%})" if wrong else f"{read} ({score:.0%})"
        axis.set_title(title, fontsize=8, color="red" if wrong else "black")
    save_picture(figure, path, dpi=120)


def chosen_cells(count: int, wrong: Sequence[int], cells: int = CELLS) -> list[int]:
    """Return the indices of the digits to draw, ascending: all ``wrong`` ones, and others, up to ``cells`` in all.

    The others are spread evenly over the ``count`` digits.
    """
    others = [index for index in range(count) if index not in set(wrong)]
    wanted = max(0, min(cells - len(wrong), len(others)))
    return sorted([*wrong, *(others[place * len(others) // wanted] for place in range(wanted))])
