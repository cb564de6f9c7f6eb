"""Compare the speed of ``fastres classify`` with its decoders and its model alone: ``python -m bench.classify``.

It makes a folder of JPEGs from pictures that come with scikit-learn, scikit-image and matplotlib, and from
scikit-learn's digits. One in a hundred files is cut in half. Then it measures:

- the speed of decoding alone, of the model alone and of the whole run, in turn in one process
- the memory of a whole run with its worker processes, sampled over time
- the decoders compared with Pillow: their speed, and the differences of their pixels and predictions

It writes ``classify.json`` to ``--out``.
"""

from __future__ import annotations

import argparse
import datetime
import io
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import fastres
from fastres.bench.engines.eager import EagerResNet
from fastres.bench.measure.calibration import calibrate_
from fastres.bench.measure.watching import children, used_mb
from fastres.bench.report.results import check_folder, significant, write_json
from fastres.classification import CPU_BATCH, GPU_BATCH, sources
from fastres.classification.batches import Reading, default_workers
from fastres.classification.driving import every
from fastres.classification.listing import write_listing
from fastres.commands.environment import installed_version
from fastres.executors.processor import processor
from fastres.executors.quota import threads
from fastres.images.jpeg import DECODERS, EXACT, FAST, exact_pixels, fast_pixels
from fastres.network.architectures import get_architecture
from fastres.program import run_program
from fastres.terminal import progress_bar, wrote
from fastres.text import text_table

JSON_NAME = "classify.json"
# Width × height and share in per cent: photographs of ImageNet's size, some larger ones, and digits.
SIZES = (((500, 375), 60), ((375, 500), 20), ((1024, 768), 10), ((1600, 1200), 2), ((96, 96), 8))
BROKEN_EVERY = 100
COMPARED = ((500, 375), (640, 480), (1024, 768), (1600, 1200), (4000, 3000))
MEMORY_EVERY_S = 0.25


# -- the images ----------------------------------------------------------------------------------------------


def photographs() -> list[Image.Image]:
    """Return the colour photographs that come with three libraries and are at least 300 pixels wide and high."""
    import matplotlib
    import skimage
    import sklearn

    places = ((skimage, "data"), (sklearn, "datasets/images"), (matplotlib, "mpl-data/sample_data"))
    found = []
    for module, folder in places:
        for path in sorted((Path(str(module.__file__)).parent / folder).iterdir()):
            if path.suffix in (".jpg", ".png"):
                with Image.open(path) as image:
                    if image.mode == "RGB" and min(image.size) >= 300:
                        found.append(image.copy())
    return found


def digits() -> list[Image.Image]:
    from sklearn.datasets import load_digits

    return [Image.fromarray((image * (255 / 16)).astype(np.uint8)) for image in load_digits().images]


def varied(image: Image.Image, size: tuple[int, int], generator: random.Random) -> Image.Image:
    """Return a random crop of ``image``, at least half as wide and half as high, resized to ``size``."""
    width, height = (round(length * generator.uniform(0.5, 1)) for length in image.size)
    left, top = generator.randint(0, image.width - width), generator.randint(0, image.height - height)
    return image.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))


def jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def make_folder(folder: Path, count: int) -> int:
    """Write ``count`` JPEGs, the same ones every time, and return how many of them are cut in half."""
    generator = random.Random(0)
    photos, scans = photographs(), digits()
    sizes = generator.choices([size for size, _ in SIZES], [share for _, share in SIZES], k=count)
    broken = 0
    for index, size in enumerate(progress_bar(sizes, desc="Making images", unit="image")):
        image = (
            scans[index % len(scans)].resize(size)
            if size == (96, 96)
            else varied(photos[index % len(photos)], size, generator)
        )
        data = jpeg(image)
        if index % BROKEN_EVERY == BROKEN_EVERY // 2:
            data, broken = data[: len(data) // 2], broken + 1
        (folder / f"{index:06}.jpg").write_bytes(data)
    return broken


# -- speed ---------------------------------------------------------------------------------------------------


def calibrated(name: str, device: torch.device) -> fastres.Model:
    """Return the model ``name`` with random weights whose logits depend on the image."""
    module = calibrate_(EagerResNet(get_architecture(name)), size=128)
    return fastres.load(name, module.state_dict(), device=device)


class Runs:
    """The three timed tasks: decoding alone, the model alone, and a whole run of ``fastres classify``."""

    def __init__(self, folder: Path, scratch: Path, model: fastres.Model, reading: Reading) -> None:
        self.folder, self.scratch, self.model, self.reading = folder, scratch, model, reading
        found = sources.find(folder)
        with (scratch / "listing.jsonl").open("wb+") as file:
            write_listing(found.entries(), found.kind, file, progress=False)
        self.images = sources.opened(found, scratch / "listing.jsonl", None, ())
        crop = reading.transforms.crop
        pixels = torch.randint(0, 256, (reading.batch_size, crop, crop, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
        self.pixels = pixels.to(model.device)
        for _ in range(3):
            model(self.pixels)

    def decode(self) -> float:
        """Decode all images and return images per second."""
        start = time.perf_counter()
        for _ in self.reading.batches(self.images, [range(len(self.images))], self.model.device):
            pass
        return len(self.images) / (time.perf_counter() - start)

    def infer(self) -> float:
        batches = -(-len(self.images) // self.reading.batch_size)
        start = time.perf_counter()
        for _ in range(batches):
            self.model(self.pixels).cpu()
        return batches * self.reading.batch_size / (time.perf_counter() - start)

    def whole(self) -> float:
        report = fastres.classify(
            self.folder,
            self.scratch / "out.parquet",
            model=self.model,
            decoder=self.reading.decoder,
            batch_size=self.reading.batch_size,
            workers=self.reading.workers,
            overwrite=True,
            progress=False,
        )
        return report.images_per_s


def compare_speed(runs: Runs, rounds: int) -> dict[str, Any]:
    """Return the median images per second over ``rounds`` rounds, each in a new order.

    ``share_of_slower`` is the whole run's speed over the speed of its slower part.
    """
    calls: dict[str, Callable[[], float]] = {"decode": runs.decode, "model": runs.infer, "whole": runs.whole}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0).shuffle
    for _ in progress_bar(
        range(rounds), desc=f"Timing {runs.model.architecture.name}, {runs.reading.decoder}", unit="round"
    ):
        shuffle(order)
        for name in order:
            samples[name].append(calls[name]())
    medians = {name: statistics.median(values) for name, values in samples.items()}
    shares = [w / min(d, m) for d, m, w in zip(samples["decode"], samples["model"], samples["whole"], strict=True)]
    return {
        "model": runs.model.architecture.name,
        "decoder": runs.reading.decoder,
        "batch_size": runs.reading.batch_size,
        "workers": runs.reading.workers,
        "images_per_s": {name: significant(value, 4) for name, value in medians.items()},
        "samples": {name: [significant(value, 4) for value in values] for name, values in samples.items()},
        "share_of_slower": significant(statistics.median(shares), 3),
    }


# -- memory --------------------------------------------------------------------------------------------------


@contextmanager
def sampled_memory(samples: list[dict[str, float]]) -> Iterator[None]:
    """Append seconds and MB of this process and its children to ``samples``, from start to end at intervals."""
    start = time.perf_counter()

    def sample() -> None:
        used = used_mb(os.getpid()), sum(map(used_mb, children(os.getpid())))
        samples.append({"s": round(time.perf_counter() - start, 2), "main_mb": used[0], "workers_mb": used[1]})

    sample()
    with every(MEMORY_EVERY_S, sample):
        yield
    sample()


def memory(runs: Runs) -> dict[str, Any]:
    """Return the peak memory of each quarter of a whole run. It is flat if the last peak does not exceed the second."""
    samples: list[dict[str, float]] = []
    with sampled_memory(samples):
        runs.whole()
    totals = [sample["main_mb"] + sample["workers_mb"] for sample in samples]
    quarter = max(1, len(totals) // 4)
    peaks = [max(totals[at : at + quarter], default=0.0) for at in range(0, quarter * 4, quarter)]
    return {"peak_mb_by_quarter": [significant(peak, 4) for peak in peaks], "samples": samples}


# -- decoders ------------------------------------------------------------------------------------------------


def pillow_draft(data: bytes, transforms: Any) -> torch.Tensor:
    """Decode with Pillow's own scaling, then proceed like the exact decoder."""
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (transforms.resize, transforms.resize))
    pixels: torch.Tensor = transforms.pixels(image)
    return pixels


def compare_decoders(model: fastres.Model, rounds: int, each: int) -> list[dict[str, Any]]:
    """Return milliseconds per image on one thread, and how pixels and predictions differ from the exact ones."""
    generator, photos = random.Random(1), photographs()
    functions = {EXACT: exact_pixels, "Pillow draft": pillow_draft, FAST: fast_pixels}
    rows = []
    for size in progress_bar(COMPARED, desc="Comparing decoders", unit="size"):
        files = [jpeg(varied(photos[i % len(photos)], size, generator)) for i in range(each)]
        times: dict[str, list[float]] = {name: [] for name in functions}
        pixels: dict[str, torch.Tensor] = {}
        for _ in range(rounds):
            for name, function in functions.items():
                start = time.perf_counter()
                results = [function(data, model.transforms) for data in files]
                times[name].append((time.perf_counter() - start) * 1e3 / each)
                pixels[name] = torch.stack(results)
        scores = {name: model(values.to(model.device)).softmax(1).cpu() for name, values in pixels.items()}
        for name in functions:
            apart = (pixels[name].int() - pixels[EXACT].int()).abs().float()
            rows.append(
                {
                    "width": size[0],
                    "height": size[1],
                    "decoder": name,
                    "ms_an_image": significant(statistics.median(times[name]), 3),
                    "largest_pixel_difference": int(apart.max()),
                    "mean_pixel_difference": significant(float(apart.mean()), 3),
                    "top_1_agreement": float((scores[name].argmax(1) == scores[EXACT].argmax(1)).float().mean()),
                    "largest_score_difference": significant(float((scores[name] - scores[EXACT]).abs().max()), 3),
                    "images": each,
                }
            )
    return rows


# -- the command ---------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the results, and write them if ``--out`` is given."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(arguments)
    if options.out:
        check_folder(options.out)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    found: dict[str, Any] = {"environment": _environment(device, arguments), "runs": [], "memory": {}}
    scratch = Path(tempfile.mkdtemp(prefix="fastres-classify-"))
    try:
        (scratch / "images").mkdir()
        found["images"] = {"count": options.images, "broken": make_folder(scratch / "images", options.images)}
        for name in options.models:
            model = calibrated(name, device)
            if not found.get("decoders"):
                with threads(1):
                    found["decoders"] = compare_decoders(model, options.rounds, min(44, options.images))
            batch = options.batch_size or (GPU_BATCH if device.type == "cuda" else CPU_BATCH)
            workers = default_workers() if options.workers is None else options.workers
            for decoder in DECODERS:
                runs = Runs(scratch / "images", scratch, model, Reading(batch, workers, model.transforms, decoder))
                found["runs"].append(compare_speed(runs, options.rounds))
            found["memory"][name] = memory(runs)
    finally:
        shutil.rmtree(scratch)
    if options.out:
        write_json(options.out / JSON_NAME, found)
        wrote(options.out / JSON_NAME)
    print(summary(found))
    if options.out:
        print(f"Wrote {options.out / JSON_NAME}")
    return 0


def summary(found: dict[str, Any]) -> str:
    """Return the main tables as text."""
    speed = [("model", "decoder", "decode/s", "model/s", "whole/s", "share of slower")]
    for run in found["runs"]:
        rates = run["images_per_s"]
        numbers = [f"{rates[name]:g}" for name in ("decode", "model", "whole")]
        speed.append((run["model"], run["decoder"], *numbers, f"{run['share_of_slower']:.0%}"))
    decoders = [("size", "decoder", "ms", "pixels differ by", "top-1 agrees", "scores differ by")]
    decoders += [
        (
            f"{row['width']}×{row['height']}",
            row["decoder"],
            f"{row['ms_an_image']:g}",
            f"{row['mean_pixel_difference']:g} (at most {row['largest_pixel_difference']})",
            f"{row['top_1_agreement']:.1%}",
            f"{row['largest_score_difference']:g}",
        )
        for row in found["decoders"]
    ]
    peaks = [
        f"{name}: peak MB by quarter of the run {', '.join(f'{peak:g}' for peak in entry['peak_mb_by_quarter'])}"
        for name, entry in found["memory"].items()
    ]
    return "\n\n".join([text_table(speed, right=range(2, 6)), text_table(decoders, right=(2,)), "\n".join(peaks)])


def _environment(device: torch.device, arguments: Sequence[str]) -> dict[str, Any]:
    packages = ("torch", "pillow", "simplejpeg", "pyarrow")
    return {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        **processor(),
        "cpu_count": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "threads": torch.get_num_threads(),
        **{package: installed_version(package) for package in packages},
        "fastres": fastres.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", "-m", "bench.classify", *arguments]),
        "weights": "random, calibrated",
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.classify", description="Measure the speed of fastres classify."
    )
    parser.add_argument("--images", type=int, default=2000, help="number of images (default: %(default)s)")
    parser.add_argument(
        "--models", nargs="+", default=["resnet18", "resnet50"], help="models to run (default: resnet18 resnet50)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="timing rounds per decoder (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, help=f"images (default: {CPU_BATCH}, or {GPU_BATCH} on a GPU)")
    parser.add_argument("--workers", type=int, help="decoding processes (default: one per core)")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--out", type=Path, help=f"output folder for {JSON_NAME}")
    return parser


if __name__ == "__main__":
    sys.exit(run_program(main, "python -m bench.classify"))
