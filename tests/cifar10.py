"""A tiny CIFAR-10 in its published format: six pickles with protocol 2, as Python 2 wrote them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from fastres.bench.study.data import CIFAR_FOLDER, CIFAR_TEST, CIFAR_TRAIN

PER_BATCH = 4


def batch(seed: int) -> dict[bytes, Any]:
    random = np.random.default_rng(seed)
    return {
        b"batch_label": b"training batch",
        b"labels": random.integers(0, 10, PER_BATCH).tolist(),
        b"data": random.integers(0, 256, (PER_BATCH, 3072), dtype=np.uint8),
        b"filenames": [b"image.png"] * PER_BATCH,
    }


def write_cifar10(folder: Path) -> Path:
    """Write batches of four images, with the seeds 0 to 5 in order. Return ``cifar-10-batches-py``."""
    path = folder / CIFAR_FOLDER
    path.mkdir()
    for seed, name in enumerate((*CIFAR_TRAIN, CIFAR_TEST)):
        (path / name).write_bytes(pickle.dumps(batch(seed), protocol=2))
    return path
