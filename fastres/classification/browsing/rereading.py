"""Thumbnails of the images in a table. They are read again from where the table says that they were."""

from __future__ import annotations

import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

from fastres.classification.listing import FILES, PARQUET, TAR, Entry, create_listing
from fastres.classification.parquet import parquet_entries
from fastres.classification.remote import object_entry
from fastres.classification.sources import Found, Images, opened
from fastres.classification.tars import tar_entries
from fastres.classification.walking import error_entry, file_entry
from fastres.errors import ImageError, InputError, SourceError, StorageError
from fastres.executors.quota import suitable_threads
from fastres.images.decoding import load_image
from fastres.pages.pictures import data_uri
from fastres.storage import objects
from fastres.storage.urls import is_url
from fastres.terminal import progress_bar
from fastres.text import path_of_text

MAX_THREADS = 8
CHUNK = 16  # images that are read together
STORED_TARS = 20  # tars in object stores that are searched: each needs many requests

Source = str | bytes | ImageError
Item = TypeVar("Item")


class Identity(NamedTuple):
    """Which image a row of the table is about, as the table says it: ``key`` in a tar, ``row`` in a Parquet file."""

    path: str
    key: str | None = None
    row: int | None = None


def thumbnails(
    kind: str, identities: Mapping[int, Identity], image_column: str | None, progress: bool
) -> dict[int, str | ImageError]:
    """Return thumbnails as data URIs, or why there is none, by the row of the table.

    ``identities`` are those of the rows. Nothing that happens to a source is an error of the whole.
    """
    found: dict[int, str | ImageError] = {}
    with (
        tempfile.TemporaryDirectory(prefix="fastres-") as folder,
        ThreadPoolExecutor(min(suitable_threads(), MAX_THREADS)) as pool,
        progress_bar(total=len(identities), desc="Thumbnails", unit="image", delay=1.0, disable=not progress) as bar,
    ):
        sources = _sources(kind, identities, image_column, Path(folder), pool)
        for chunk in _chunks(sources, CHUNK):
            for (row, _), picture in zip(chunk, pool.map(_thumbnail, [source for _, source in chunk]), strict=True):
                found[row] = picture
            bar.update(len(chunk))
    return found


def _thumbnail(source: Source) -> str | ImageError:
    if isinstance(source, ImageError):
        return source
    try:
        return data_uri(load_image(source))
    except ImageError as error:
        return error


def _sources(
    kind: str, identities: Mapping[int, Identity], image_column: str | None, folder: Path, pool: ThreadPoolExecutor
) -> Iterator[tuple[int, Source]]:
    """Yield each row with its image."""
    if kind == FILES:
        entries = list(pool.map(_file, [identity.path for identity in identities.values()]))
        yield from _read(list(identities), partial(_opened, kind, entries, folder), range(len(entries)))
        return
    by_path: dict[str, list[int]] = defaultdict(list)
    for row, identity in identities.items():
        by_path[identity.path].append(row)
    searched = 0
    for path, rows in by_path.items():
        searched += is_url(path)
        if kind == PARQUET:
            numbers = [identities[row].row or 0 for row in rows]
            yield from _read(rows, partial(_parquet, path, folder, image_column), numbers)
        elif is_url(path) and searched > STORED_TARS:
            reason = f"It is in a tar in an object store, of which only {STORED_TARS} are searched for a page."
            yield from ((row, ImageError(reason)) for row in rows)
        else:
            keys = [identities[row].key or "" for row in rows]
            yield from _read(rows, partial(_tar, path, keys, folder), range(len(rows)))


def _read(
    rows: Sequence[int], open_images: Callable[[], Images], numbers: Sequence[int]
) -> Iterator[tuple[int, Source]]:
    """Yield ``rows`` with the images of these ``numbers``, in parts: one at a time, unless the numbers are a range."""
    try:
        images = open_images()
    except SourceError as error:
        yield from ((row, ImageError(str(error))) for row in rows)
        return
    size = CHUNK if isinstance(numbers, range) else 1
    for first in range(0, len(rows), size):
        part, number = rows[first : first + size], numbers[first]
        try:
            _, found = images.read(number, number + len(part))
            sources: list[Source] = list(found)
        except (SourceError, IndexError) as error:
            sources = [ImageError(str(error))] * len(part)
        yield from zip(part, sources, strict=True)


def _opened(kind: str, entries: Iterable[Entry], folder: Path, image_column: str | None = None) -> Images:
    path = folder / "listing.jsonl"
    create_listing(path, entries, kind, False)
    return opened(Found(kind, (), ()), path, image_column, ())


def _parquet(path: str, folder: Path, image_column: str | None) -> Images:
    return _opened(PARQUET, parquet_entries(path_of_text(path)), folder, image_column)


def _tar(path: str, keys: Sequence[str], folder: Path) -> Images:
    return _opened(TAR, _members(path_of_text(path), keys), folder)


def _file(text: str) -> Entry:
    path = path_of_text(text)
    try:
        if not is_url(path):
            return file_entry(path)
        found = objects.info(path)
    except (StorageError, InputError, ValueError) as error:  # ValueError: a NUL in the name
        return error_entry(path.replace("\0", ""), str(error))
    return object_entry(found) if found else error_entry(path, "The object does not exist any more.")


def _members(path: str, keys: Sequence[str]) -> list[Entry]:
    """Return the entries of samples in a tar. Raises ``SourceError`` if it cannot be read."""
    found: dict[str, list[Entry]] = {key: [] for key in keys}
    for entry in tar_entries(path, Counter()):
        if entry.get("key") in found and "error" not in entry:
            found[entry["key"]].append(entry)
    return [found[key][0] if len(found[key]) == 1 else _not_one(path, key, len(found[key])) for key in keys]


def _not_one(path: str, key: str, samples: int) -> Entry:
    reason = "The tar has several samples with this key." if samples else "The tar has no such sample any more."
    return error_entry(path, reason) | {"key": key}


def _chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
