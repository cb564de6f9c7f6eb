"""Helpers of the tests of labels: write sources, and find the labels of their images."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastres.classification import sources
from fastres.classification.listing import write_listing
from fastres.labels.finding import ImageLabels, find_labels

ANIMALS = ("cat", "dog", "owl")


def opened(source: Any, work: Path, image_column: str | None = None) -> tuple[sources.Found, sources.Images]:
    found = sources.find(source)
    with (work / "listing.jsonl").open("wb+") as file:
        write_listing(found.entries(), found.kind, file, progress=False)
    return found, sources.opened(found, work / "listing.jsonl", image_column, ())


def labels(source: Any, given: Any, work: Path, classes: int | Sequence[str] = 3, **options: Any) -> ImageLabels:
    """Return the labels of ``source`` for a model with these ``classes``, or this number of classes without names."""
    found, images = opened(source, work, options.pop("image_column", None))
    named = not isinstance(classes, int)
    result = find_labels(
        given, found, images, len(classes) if named else classes, tuple(classes) if named else None, **options
    )  # fmt: skip
    assert result.indices.shape == (len(images),)
    assert result.indices.dtype == "int64"
    assert result.text.endswith(".")
    present = set(result.indices.tolist()) - {-1}
    assert set(result.missing) == set(range(len(classes) if named else classes)) - present
    return result


def write_images(top: Path, *names: str) -> Path:
    """Write files with these names below ``top``; names that end in a slash are empty folders."""
    for name in names:
        path = top / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.write_bytes(b"image")
    return top


def write_tar(path: Path, members: Sequence[tuple[str, str | bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path
