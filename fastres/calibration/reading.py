"""Reads calibration images from anywhere into a bounded sample: files, tars, Parquet, lists, generators.

Images that cannot be read are named and counted, and the others are used.
"""

from __future__ import annotations

import glob
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastres.errors import ImageError, InputError
from fastres.images.transforms import Transforms
from fastres.storage.urls import is_url
from fastres.text import article, path_text

from .labels import Labels
from .samples import Sampler, Samples

MOST_READ = 10_000  # images of a source whose number is known
MOST_WORKERS = 2  # by default: each holds a whole picture, which can take hundreds of megabytes
BATCH = 4  # images that a worker decodes before it hands them over

_SINGLE = (bytes, bytearray, memoryview, Image.Image)


class Bar(Protocol):
    """The part of a progress bar that is used here."""

    total: Any

    def update(self, n: int = 1) -> Any: ...
    def refresh(self) -> Any: ...


def read(
    images: Any, transforms: Transforms, labels: Labels | None, most: int, workers: int | None, bar: Bar
) -> Samples:
    """Read ``images`` and return a sample of ``most`` of them. Each image is in memory only until it is cropped.

    A folder, glob, tar or Parquet file (or a list of paths) is read by ``workers`` processes; of more than
    ``MOST_READ`` images, that many are read, at even distances. Any other iterable is read to its end.
    """
    sampler = Sampler(most)
    if (paths := _as_paths(images)) is not None:
        _read_source(paths, transforms, labels, sampler, workers, bar)
    else:
        _read_each(images, transforms, labels, sampler, bar)
    return sampler.samples()


def _as_paths(images: Any) -> list[str | os.PathLike[str]] | None:
    """Return the files and folders that ``images`` names, or ``None`` if it holds images."""
    if isinstance(images, (str, os.PathLike)):
        return [images]
    if isinstance(images, (list, tuple)) and images and all(isinstance(i, (str, os.PathLike)) for i in images):
        return list(images)
    return None


def _read_each(images: Any, transforms: Transforms, labels: Labels | None, sampler: Sampler, bar: Bar) -> None:
    for position, image in enumerate(_each(images)):
        name = f"images[{position}]" if not isinstance(image, (str, os.PathLike)) else path_text(image)
        label = None if labels is None else labels.of(name, position)
        try:
            sampler.add(transforms.pixels(image), label)
        except ImageError as error:
            sampler.skip(name, f"{name}: {error}")
        bar.update()
    if labels is not None:
        labels.check_count(sampler.read)


def _each(images: Any) -> Iterator[Any]:
    """Yield the single images of a list, a generator, a data set or a batched array."""
    if (
        isinstance(images, _SINGLE)
        or hasattr(images, "read")
        or (isinstance(images, (np.ndarray, Tensor)) and images.ndim < 4)
    ):
        raise InputError("images is one image, but calibration needs many; pass a folder or a list of images")
    if isinstance(images, dict) or not (isinstance(images, Iterable) or hasattr(images, "__getitem__")):
        raise InputError(
            f"images cannot be {article(images)}; pass a folder, a glob, tar or Parquet files, or an iterable of images"
        )
    yield from images


def _read_source(
    paths: list[str | os.PathLike[str]],
    transforms: Transforms,
    labels: Labels | None,
    sampler: Sampler,
    workers: int | None,
    bar: Bar,
) -> None:
    from fastres.classification.batches import Reading, checked_workers
    from fastres.classification.listing import FILES, create_listing
    from fastres.classification.sources import Found, Part, find, opened
    from fastres.images.jpeg import EXACT

    names = tuple(map(os.fsdecode, paths))
    several = len(names) > 1 and not any(map(_is_container, names))
    found = Found(FILES, tuple(map(Part, names)), names) if several else find(names)
    with tempfile.TemporaryDirectory(prefix="fastres-") as scratch:
        listing = Path(scratch) / "listing.jsonl"
        create_listing(listing, found.entries(), found.kind, progress=False)
        images = opened(found, listing, None, ())
        count = len(images)
        if labels is not None:
            labels.check_source(found, images)
        all_of_them = count <= MOST_READ or (labels is not None and labels.in_order)
        ranges = [range(count)] if all_of_them else _spread(count)
        bar.total = sum(map(len, ranges))
        bar.refresh()
        count = checked_workers(workers)
        reading = Reading(BATCH, count if workers is not None else min(count, MOST_WORKERS), transforms, EXACT)
        with closing(reading.batches(images, ranges, torch.device("cpu"))) as batches:
            for batch in batches:
                identities = zip(*batch.identity.values(), strict=True)
                for offset, (identity, error) in enumerate(zip(identities, batch.errors, strict=True)):
                    name = "/".join(map(str, identity))
                    label = None if labels is None else labels.of(name, batch.start + offset)
                    if error is None and labels is not None and label is None:
                        sampler.skip(name, f"{name}: its label is in a damaged part of the file")
                    elif error is None:
                        sampler.add(batch.pixels[offset], label)
                    else:
                        sampler.skip(name, f"{name}: {error}" if name not in error else error)
                bar.update(len(batch.errors))


def _spread(count: int) -> list[range]:
    """Return the numbers of ``MOST_READ`` of ``count`` images, in runs at even distances."""
    runs = MOST_READ // BATCH
    return [range(start, start + BATCH) for start in (index * (count - BATCH) // (runs - 1) for index in range(runs))]


def _is_container(name: str) -> bool:
    """Return True for a folder, a glob, a tar or a Parquet file, which hold several images, and for a URL."""
    if is_url(name):
        return True
    if name.lower().endswith((".tar", ".parquet", ".pq", ".gz", ".tgz", ".bz2", ".xz", ".zst")) or os.path.isdir(name):
        return True
    return glob.has_magic(name) and not os.path.lexists(name)
