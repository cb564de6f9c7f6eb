"""The sample of a stream of images: a bounded number of them, and what could not be read."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from fastres.errors import CalibrationError

LEAST = 8  # images: four to measure the values, two to choose, two to judge
MOST_FIT, MOST_CHOOSE = 256, 64  # images; all others judge
REASONS = 20  # images that could not be read, of which the name and the reason are kept
SEED = 0


@dataclass(frozen=True)
class Samples:
    """Preprocessed images in the order in which they came: ``pixels`` is uint8 ``[N, 3, crop, crop]``.

    ``labels`` are class indices, or ``None``. ``read`` images were read, ``skipped`` of them could not be; ``reasons``
    has the first of these, with names.
    """

    pixels: Tensor
    labels: Tensor | None
    read: int
    skipped: int
    reasons: tuple[tuple[str, str], ...]

    @property
    def fit(self) -> Tensor:
        """Half of the images, at most ``MOST_FIT``, for measuring the values of the network."""
        return self.pixels[self._parts[0]]

    @property
    def choose(self) -> Tensor:
        """A quarter of the images, at most ``MOST_CHOOSE``, for choosing how to quantise."""
        return self.pixels[self._parts[1]]

    @property
    def judge(self) -> Tensor:
        """All other images, for judging the result."""
        return self.pixels[self._parts[2]]

    @property
    def judge_labels(self) -> Tensor | None:
        return None if self.labels is None else self.labels[self._parts[2]]

    @property
    def _parts(self) -> tuple[list[int], list[int], list[int]]:
        count = len(self.pixels)
        fit, choose = _thinned(range(0, count, 2), MOST_FIT), _thinned(range(1, count, 4), MOST_CHOOSE)
        used = {*fit, *choose}
        return fit, choose, [index for index in range(count) if index not in used]


def _thinned(places: range, most: int) -> list[int]:
    """Return ``places``, or ``most`` of them at even distances."""
    count = min(len(places), most)
    return [places[index * len(places) // count] for index in range(count)]


class Sampler:
    """Keeps ``most`` images of a stream, each with the same chance (reservoir sampling, always with the same seed)."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._random = random.Random(SEED)
        self._kept: list[tuple[int, Tensor, int | None]] = []
        self._usable = self._skipped = 0
        self._reasons: list[tuple[str, str]] = []

    @property
    def read(self) -> int:
        """The number of images so far."""
        return self._usable + self._skipped

    def add(self, pixels: Tensor, label: int | None = None) -> None:
        """Take the next image, uint8 ``[3, crop, crop]``."""
        place = self._usable if self._usable < self._most else self._random.randrange(self._usable + 1)
        if place < self._most:
            image = (self._usable, pixels.to("cpu", copy=True), label)
            if place == len(self._kept):
                self._kept.append(image)
            else:
                self._kept[place] = image
        self._usable += 1

    def skip(self, name: str, reason: str) -> None:
        """Count the next image as one that cannot be read."""
        self._skipped += 1
        if len(self._reasons) < REASONS:
            self._reasons.append((name, reason))

    def samples(self) -> Samples:
        """Return the sample.

        Raises ``CalibrationError`` if there are too few usable images, or if they have no content.
        """
        if self._usable < LEAST:
            raise CalibrationError(_too_few(self._usable, self._skipped, self._reasons))
        kept = sorted(self._kept, key=lambda image: image[0])
        self._kept.clear()
        labels = [label for _, _, label in kept if label is not None]
        stacked = torch.empty(len(kept), *kept[0][1].shape[1:], 3, dtype=torch.uint8, device="cpu").permute(0, 3, 1, 2)
        for index in range(len(kept)):
            stacked[index] = kept[index][1]
            kept[index] = (0, stacked[index], None)  # one copy of each image in memory
        _check_content(stacked)
        return Samples(
            stacked,
            torch.tensor(labels, dtype=torch.int64, device="cpu") if labels else None,
            self.read,
            self._skipped,
            tuple(self._reasons),
        )


def _too_few(usable: int, skipped: int, reasons: list[tuple[str, str]]) -> str:
    found = f"{usable} usable image{'' if usable == 1 else 's'}"
    text = f"There are {found} for calibration, but at least {LEAST} are needed"
    if skipped:
        text += f"; {skipped:,} could not be read, the first because: {reasons[0][1]}"
    return f"{text}. Pass a few hundred images like those that the model will see"


def _check_content(pixels: Tensor) -> None:
    """Raise ``CalibrationError`` if every image has one colour, or all images are the same."""
    flat = pixels.flatten(2)
    if bool((flat.amin(2) == flat.amax(2)).all()):
        raise CalibrationError(
            f"Each of the {len(pixels)} calibration images has one colour only, so the ranges of the network's values "
            "cannot be measured on them. Pass images like those that the model will see"
        )
    if bool((pixels == pixels[:1]).all()):
        raise CalibrationError(
            f"All {len(pixels)} calibration images are the same picture. Pass different images, like those that the "
            "model will see"
        )
