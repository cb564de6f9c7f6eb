"""Sources of images: files, tar shards (WebDataset) or Parquet files. Each is a numbered sequence of images."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from fastres.errors import ImageError, SourceError

from .listing import FILES, PARQUET, TAR, Entry, read_listing
from .parquet import ParquetImages, parquet_entries
from .tars import TarImages, tar_entries

# Files in folders and tars count as images if they have one of these suffixes. Paths and globs may have any name.
SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .ppm .pgm .pbm .pnm .avif .heic .heif .jp2 .j2k".split()  # noqa: SIM905
)
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


class Images(Protocol):
    """A numbered sequence of images; it can be pickled, and is cheap to send to a worker process."""

    @property
    def identity(self) -> pa.Schema:
        """The columns that identify the image of a row."""

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> tuple[pa.RecordBatch, Iterator[str | bytes | ImageError]]:
        """Return the identity of images ``start`` to ``stop``, and each image as a path, bytes or an error."""


@dataclass(frozen=True)
class Found:
    """The files and folders of the user's source in the given order, their ``kind``, and the source as given."""

    kind: str
    paths: tuple[str, ...]
    description: tuple[str, ...]
    skipped: Counter[str] = field(default_factory=Counter, compare=False)

    def entries(self) -> Iterator[Entry]:
        """Yield one entry for each image (``files`` and ``tar``) or file (``parquet``), in a fixed order."""
        for path in self.paths:
            if self.kind == TAR:
                yield from tar_entries(path, SUFFIXES)
            elif self.kind == PARQUET:
                yield from parquet_entries(path)
            elif os.path.isdir(path):
                yield from _folder_entries(path, ())
            else:
                yield _named_file_entry(path)


def find(source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> Found:
    """Find the files of ``source``: a folder, an image, a glob, tar files or Parquet files, or several of one kind.

    Raises ``SourceError`` if a source is missing, a glob matches nothing, or the kinds differ.
    """
    given = [source] if isinstance(source, (str, os.PathLike)) else list(source)
    names = tuple(os.fspath(name) for name in given)
    if not names or not all(isinstance(name, str) and name for name in names):
        raise SourceError(f"The source is {source!r}; pass a folder, a glob, tar files or Parquet files")
    paths = [path for name in names for path in _expanded(name)]
    kinds = {_kind(path): path for path in paths}
    if len(kinds) > 1:
        examples = ", ".join(f"{path!r} ({kind})" for kind, path in kinds.items())
        raise SourceError(f"The sources are of different kinds: {examples}; classify each kind in a separate run")
    return Found(next(iter(kinds)), tuple(paths), names)


def _expanded(name: str) -> list[str]:
    if os.path.exists(name):
        return [name]
    if not glob.has_magic(name):
        raise SourceError(f"{name!r} does not exist; pass a folder, a glob, tar files or Parquet files")
    paths = sorted(path for path in glob.iglob(name, recursive=True) if not os.path.isdir(path))
    if not paths:
        raise SourceError(f"{name!r} matches no file; to search subfolders, use a glob such as 'photos/**/*.jpg'")
    return paths


def _kind(path: str) -> str:
    lower = path.lower()
    if lower.endswith(COMPRESSED):
        raise SourceError(f"{path!r} is a compressed tar, which fastres cannot read; decompress it first")
    if os.path.isdir(path):
        return FILES
    return TAR if lower.endswith(".tar") else PARQUET if lower.endswith((".parquet", ".pq")) else FILES


def _folder_entries(folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[Entry]:
    """Yield the images in ``folder`` and its subfolders, sorted by name; skip names that begin with a dot.

    ``above`` holds device and inode of the parent folders, so that links cannot cause endless recursion.
    """
    try:
        own = os.stat(folder)
        if (own.st_dev, own.st_ino) in above:
            return
        with os.scandir(folder) as scanned:
            found = sorted((entry for entry in scanned if not entry.name.startswith(".")), key=lambda e: e.name)
        for entry in found:
            if entry.is_dir():
                yield from _folder_entries(entry.path, (*above, (own.st_dev, own.st_ino)))
            elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:
                # A broken link is listed as well; its row has the error.
                yield _file_entry(entry.path, entry.stat(follow_symlinks=entry.is_file()))
    except OSError as error:
        raise SourceError(
            f"{error.filename or folder!r} cannot be listed: {error.strerror}; check its permissions"
        ) from error


def _named_file_entry(path: str) -> Entry:
    try:
        return _file_entry(path, os.stat(path))
    except OSError as error:
        raise SourceError(f"{path!r} cannot be read: {error.strerror}; check the path and its permissions") from error


def _file_entry(path: str, facts: os.stat_result) -> Entry:
    return {"path": os.fsencode(path), "size": facts.st_size, "mtime_ns": facts.st_mtime_ns}


def opened(found: Found, listing: Path, image_column: str | None, columns: Sequence[str]) -> Images:
    """Return the images in ``listing``. Raises ``SourceError`` if there are none, or if ``columns`` do not exist."""
    if found.kind != PARQUET and (image_column or columns):
        raise SourceError(
            f"image_column and columns work only for Parquet files, but the source is of kind {found.kind!r}; leave "
            "them out"
        )
    images: Images
    if found.kind == PARQUET:
        images = ParquetImages.of(read_listing(listing), image_column, tuple(columns))
    else:
        images = FileImages(listing) if found.kind == FILES else TarImages(listing)
    if not len(images):
        raise SourceError(f"There are no images in {', '.join(map(repr, found.description))}. {_advice(found)}")
    return images


def _advice(found: Found) -> str:
    if found.kind == TAR:
        return f"Members count as images if their names end in {' '.join(sorted(SUFFIXES))}"
    if found.kind == PARQUET:
        return "The Parquet files have no rows"
    inside = {
        os.path.splitext(name)[1].lower() for path in found.paths if os.path.isdir(path) for name in os.listdir(path)
    }
    for suffix in (".tar", ".parquet"):
        if suffix in inside:
            return f"It holds {suffix} files; pass '{os.path.join(found.paths[0], '*' + suffix)}'"
    return f"Files count as images if their names end in {' '.join(sorted(SUFFIXES))}; a glob accepts any name"


@dataclass(frozen=True)
class FileImages:
    """Image files; ``listing`` is an Arrow file with the :data:`SCHEMAS` entry for files."""

    listing: Path
    identity = pa.schema([("path", pa.string())])

    @cached_property
    def _paths(self) -> pa.ChunkedArray:
        return read_listing(self.listing)["path"]

    def __len__(self) -> int:
        return len(self._paths)

    def __getstate__(self) -> dict[str, Any]:
        return {"listing": self.listing}

    def read(self, start: int, stop: int) -> tuple[pa.RecordBatch, Iterator[str | bytes | ImageError]]:
        paths = self._paths.slice(start, stop - start).to_pylist()
        names = [path.decode("utf-8", "backslashreplace") for path in paths]
        identity = pa.RecordBatch.from_arrays([pa.array(names, pa.string())], schema=self.identity)
        return identity, map(os.fsdecode, paths)
