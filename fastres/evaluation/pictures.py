"""Whole pictures, for files that do their own preprocessing, and thumbnails for the report."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image

from fastres.classification.columns import Columns
from fastres.classification.sources import Images
from fastres.errors import ImageError
from fastres.images.decoding import load_image
from fastres.pages.pictures import data_uri
from fastres.terminal import progress_bar

THREADS = 4


@dataclass(frozen=True)
class Pictures:
    """The images from ``start`` on as uint8 arrays ``[H, W, 3]``. One with an error is a black pixel."""

    start: int
    identity: Columns
    pixels: list[np.ndarray]
    errors: tuple[str | None, ...]


def whole_pictures(images: Images, ranges: Sequence[range], size: int) -> Generator[Pictures, None, None]:
    """Yield the pictures whose numbers are in ``ranges`` in batches of ``size``, decoded by threads."""
    with ThreadPoolExecutor(THREADS) as pool:
        for part in ranges:
            for start in range(part.start, part.stop, size):
                identity, sources = images.read(start, min(start + size, part.stop))
                found = list(pool.map(_decoded, sources))
                pixels = [black() if isinstance(picture, str) else picture for picture in found]
                errors = tuple(picture if isinstance(picture, str) else None for picture in found)
                yield Pictures(start, identity, pixels, errors)


def black() -> np.ndarray:
    """Return one black pixel."""
    return np.zeros((1, 1, 3), np.uint8)


def _decoded(source: str | bytes | ImageError) -> np.ndarray | str:
    """Return the picture, or the message of its error."""
    if isinstance(source, ImageError):
        return str(source)
    try:
        return np.asarray(load_image(source))
    except ImageError as error:
        return str(error)


def thumbnails(images: Images, rows: Iterable[int], progress: bool) -> dict[int, str]:
    """Return small pictures of ``rows`` as data URIs (JPEG), without those that can no longer be read."""
    found = {}
    wanted = sorted(set(rows))
    for row in progress_bar(wanted, desc="pictures", unit="image", delay=1.0, disable=not progress):
        _, (source,) = images.read(row, row + 1)
        picture = _decoded(source)
        if not isinstance(picture, str):
            found[row] = data_uri(Image.fromarray(picture))
    return found
