"""Helpers of the tests of sources: list a source and read its images, as a run does."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastres.classification import sources
from fastres.classification.columns import Columns
from fastres.classification.listing import Entry, write_listing
from fastres.errors import ImageError

Row = tuple[dict[str, Any], Any]  # the identity of an image; its path, bytes or error


def listed(source: Any, work: Path, image_column: str | None = None, columns: tuple[str, ...] = ()) -> sources.Images:
    """Return the images of ``source`` as a worker receives them; their list is written into the folder ``work``."""
    return listed_and_skipped(source, work, image_column, columns)[0]


def listed_and_skipped(
    source: Any, work: Path, image_column: str | None = None, columns: tuple[str, ...] = ()
) -> tuple[sources.Images, Counter[str]]:
    found = sources.find(source)
    write_list(found.entries(), found.kind, work / "listing.jsonl")
    images = sources.opened(found, work / "listing.jsonl", image_column, columns)
    return pickle.loads(pickle.dumps(images)), found.skipped


def write_list(entries: Iterable[Entry], kind: str, path: Path) -> str:
    with path.open("wb+") as file:
        return write_listing(entries, kind, file, progress=False)


def rows(images: sources.Images, size: int = 0) -> list[Row]:
    """Read all images in batches of ``size`` (0: at once)."""
    found: list[Row] = []
    for start in range(0, len(images), size or len(images)):
        identity, contents = images.read(start, min(start + (size or len(images)), len(images)))
        found += zip(rows_of(identity), contents, strict=True)
    return found


def rows_of(columns: Columns) -> list[dict[str, Any]]:
    values = (list(map(python_value, each)) for each in columns.values())
    return [dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True)]


def python_value(value: Any) -> Any:
    """Return a value of a list, or of an Arrow array."""
    return value.as_py() if hasattr(value, "as_py") else value


def errors(found: list[Row]) -> list[str]:
    return [str(content) for _, content in found if isinstance(content, ImageError)]


def names(images: sources.Images) -> list[str]:
    identity, _ = images.read(0, len(images))
    return [Path(path).name for path in identity["path"]]
