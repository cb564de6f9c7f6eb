"""The images that the studies train on: scikit-learn's digits, or CIFAR-10 from a folder."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastres.bench.digits.data import load_digits, split
from fastres.errors import DatasetError

CIFAR_FOLDER = "cifar-10-batches-py"
CIFAR_TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
CIFAR_TEST = "test_batch"
CLASSES = 10
PIXELS = (3, 32, 32)


@dataclass(frozen=True)
class Dataset:
    """RGB images, uint8 ``[N, 3, 32, 32]``, with labels of ten classes, int64 ``[N]``, in a training and a test part.

    ``mean`` and ``std`` are those of the training pixels (scaled to [0, 1]), one per channel. ``mirror`` is True if a
    mirrored image has the same class.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    mirror: bool

    def normalise(self, images: Tensor) -> Tensor:
        """Normalise pixels, uint8 ``[N, 3, 32, 32]``, to float32 with zero mean and unit variance."""
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (images.float() / 255 - mean) / std

    def describe(self) -> str:
        return f"{self.name}, {len(self.train_images):,} training and {len(self.test_images):,} test images, 32×32"


def load_dataset(folder: Path | None = None, limit: int | None = None) -> Dataset:
    """Load CIFAR-10 from ``folder``, or the digits if it is ``None``, with at most ``limit`` images of each part.

    Raise ``DatasetError`` if the folder is not CIFAR-10, and ``MissingDependencyError`` if the digits need scikit-learn
    and it is not installed.
    """
    if folder is not None:
        return _dataset("CIFAR-10", *_read_cifar10(folder), mirror=True, limit=limit)
    images, labels = load_digits()
    train, test = split(labels)
    return _dataset("digits", images[train], labels[train], images[test], labels[test], mirror=False, limit=limit)


def _dataset(
    name: str,
    train_images: Tensor,
    train_labels: Tensor,
    test_images: Tensor,
    test_labels: Tensor,
    *,
    mirror: bool,
    limit: int | None,
) -> Dataset:
    pixels = train_images.double().transpose(0, 1).flatten(1) / 255  # [3, N·32·32]
    mean, std = (tuple(round(value, 4) for value in values.tolist()) for values in (pixels.mean(1), pixels.std(1)))
    kept = slice(limit)
    return Dataset(
        name,
        train_images[kept],
        train_labels[kept],
        test_images[kept],
        test_labels[kept],
        mean,
        std,
        mirror,
    )


def _read_cifar10(folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Read the five training batches and the test batch of the Python version from ``cs.toronto.edu/~kriz``."""
    if folder.name != CIFAR_FOLDER and (folder / CIFAR_FOLDER).is_dir():
        folder = folder / CIFAR_FOLDER
    if not folder.is_dir():
        raise DatasetError(
            f"{folder} is not a folder; give the unpacked {CIFAR_FOLDER}, or the folder that contains it"
        )
    batches = [_read_batch(folder / name) for name in CIFAR_TRAIN]
    train_images, train_labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return train_images, train_labels, *_read_batch(folder / CIFAR_TEST)


def _read_batch(path: Path) -> tuple[Tensor, Tensor]:
    """Read one batch: pixels, uint8 ``[N, 3, 32, 32]``, and labels, int64 ``[N]``."""
    try:
        with path.open("rb") as file:
            batch = _ArrayUnpickler(file, encoding="bytes").load()
    except FileNotFoundError as error:
        raise DatasetError(f"{path} is missing; unpack the Python version of CIFAR-10 again") from error
    except Exception as error:  # unpickling damaged bytes can raise anything
        raise DatasetError(f"{path} is not a CIFAR-10 batch ({error}); unpack the Python version again") from error
    pixels, labels = (batch.get(key) for key in (b"data", b"labels")) if isinstance(batch, dict) else (None, None)
    size = int(np.prod(PIXELS))
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != size:
        found = f"{pixels.dtype} {list(pixels.shape)}" if isinstance(pixels, np.ndarray) else type(pixels).__name__
        raise DatasetError(f"{path}: data is {found}; CIFAR-10 has uint8 [N, {size}]; CIFAR-100 is not supported")
    if not isinstance(labels, list) or len(labels) != len(pixels) or not all(_is_label(label) for label in labels):
        raise DatasetError(f"{path}: labels are not {len(pixels)} whole numbers from 0 to {CLASSES - 1}")
    return torch.from_numpy(pixels.reshape(-1, *PIXELS).copy()), torch.tensor(labels, dtype=torch.int64)


def _is_label(label: Any) -> bool:
    return isinstance(label, int) and 0 <= label < CLASSES


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles NumPy arrays and plain data only, because a pickle can run any code."""

    _ALLOWED = frozenset(
        {
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("_codecs", "encode"),  # how protocol 2 writes bytes
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it uses {module}.{name}, which an array does not need")
        return super().find_class(module, name)
