"""Scikit-learn's handwritten digits, prepared exactly as ``fastres`` prepares an image, with a fixed split.

The data are 1,797 real scans of 8×8 pixels with 17 grey levels: the test part of Alpaydin & Kaynak, *Optical
recognition of handwritten digits* (UCI Machine Learning Repository, 1998). They come with scikit-learn, so nothing is
downloaded. No two scans are equal. The data set does not say which of its 13 writers wrote a digit, so both parts of
the split contain digits of the same people. Held-out accuracy is therefore for new digits, not for new writers.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fastres.errors import MissingDependencyError
from fastres.extras import install

CLASSES = tuple(str(digit) for digit in range(10))
SIZE = 32
HELD_OUT_PER_CLASS = 36
VALIDATION_PER_CLASS = 28
GREY_LEVELS = 16


def load_scans() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return the scans as greyscale pixels, uint8 ``[1797, 8, 8]`` (0 paper, 255 ink), and digits, int64 ``[1797]``.

    Raise ``MissingDependencyError`` if scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise MissingDependencyError(
            f"The handwritten digits come with scikit-learn, which is not installed: {install('demo')}"
        ) from error
    bunch = datasets.load_digits()
    scans = np.rint(bunch.images * (255 / GREY_LEVELS)).astype(np.uint8)
    return scans, bunch.target.astype(np.int64)


def as_image(scan: NDArray[np.uint8]) -> Image.Image:
    """Return one scan ``[8, 8]`` as a greyscale PIL image, which ``model.predict`` takes."""
    return Image.fromarray(scan)


def load_digits() -> tuple[Tensor, Tensor]:
    """Return RGB pixels, uint8 ``[1797, 3, 32, 32]``, and digits, int64 ``[1797]``, in the data set's order.

    Each scan is enlarged as ``model.predict`` enlarges a PIL image with ``Transforms(resize=32, crop=32)``: converted
    to RGB, then resized with PIL's bilinear filter (a test checks that the pixels are the same). Raise
    ``MissingDependencyError`` if scikit-learn is not installed.
    """
    scans, digits = load_scans()
    enlarged = [as_image(scan).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR) for scan in scans]
    images = torch.from_numpy(np.stack([np.asarray(image) for image in enlarged]))  # [1797, 32, 32, 3]
    return images.permute(0, 3, 1, 2).contiguous(), torch.from_numpy(digits)


def split(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the indices of the training part and of the held-out part, int64 ``[1437]`` and ``[360]``, both ascending.

    36 scans of each digit are held out. They are not used for training or for choosing hyperparameters.
    """
    return _part(torch.arange(len(labels)), labels, HELD_OUT_PER_CLASS, "held out")


def validation_split(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Split the training part in two, int64 ``[1157]`` and ``[280]``. Hyperparameters are chosen on the second part."""
    train, _ = split(labels)
    return _part(train, labels, VALIDATION_PER_CLASS, "validation")


def _part(indices: Tensor, labels: Tensor, per_class: int, name: str) -> tuple[Tensor, Tensor]:
    """Set aside ``per_class`` of ``indices`` for each class: those with the smallest hashes of ``name`` and index.

    It uses hashes instead of a random generator, because a generator's stream may change between versions.
    """

    def rank(index: int) -> bytes:
        return hashlib.sha256(f"{name} {index}".encode()).digest()

    aside: set[int] = set()
    for label in labels.unique().tolist():
        members = indices[labels[indices] == label].tolist()
        aside.update(sorted(members, key=rank)[:per_class])
    kept = [index for index in indices.tolist() if index not in aside]
    return torch.tensor(kept), torch.tensor(sorted(aside))
