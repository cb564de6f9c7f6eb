"""Sources of images: files, tar shards (WebDataset) or Parquet files. Each is a numbered sequence of images."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol

from fastres.errors import ImageError, SourceError
from fastres.extras import check_dependencies
from fastres.files import other_kind
from fastres.storage.objects import Object
from fastres.storage.urls import is_url, url_text
from fastres.text import path_text

from .columns import Columns, Kinds
from .globs import Glob
from .listing import FILES, HIDDEN, PARQUET, TAR, Entry, Listing
from .remote import (
    ObjectWalk,
    expand,
    file_contents,
    object_entry,
    refuse_mistaken,
    shown,
    source_errors,
    suffixes_below,
)
from .tars import TarImages, tar_entries
from .walking import SUFFIXES, Walk, error_entry, file_entry, has_image_suffix

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


class Images(Protocol):
    """A numbered sequence of images; it can be pickled, and is cheap to send to a worker process."""

    @property
    def identity(self) -> Kinds:
        """The columns that identify the image of a row."""

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> tuple[Columns, Iterator[str | bytes | ImageError]]:
        """Return the identity of images ``start`` to ``stop``, and each image as a path, bytes or an error.

        Raises ``SourceError`` if a tar or Parquet file has changed since it was listed, and ``OutputError`` if the list
        cannot be read.
        """


class Part(NamedTuple):
    """A file or folder of a source, whether a glob has matched it, and why it cannot be read (if a glob found out).

    An object in a store has a URL as its ``path``, and ``found``; one without is a folder.
    """

    path: str
    matched: bool = False
    error: str | None = None
    found: Object | None = None

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder that was given, with everything in it."""
        if is_url(self.path):
            return self.found is None
        return not self.matched and self.error is None and os.path.isdir(self.path)


@dataclass(frozen=True)
class Found:
    """The files and folders of the user's source in the given order, their ``kind``, and the source as given.

    ``skipped`` counts the images that were left out, by reason; it is filled while :meth:`entries` is consumed.
    """

    kind: str
    parts: tuple[Part, ...]
    description: tuple[str, ...]
    hidden: int = 0  # images that globs left out
    skipped: Counter[str] = field(default_factory=Counter, compare=False)

    @property
    def locations(self) -> tuple[str, ...]:
        """All files, folders and URLs."""
        return tuple(part.path for part in self.parts)

    @property
    def paths(self) -> tuple[str, ...]:
        """The local files and folders."""
        return tuple(part.path for part in self.parts if not is_url(part.path))

    def entries(self) -> Iterator[Entry]:
        """Yield one entry for each image (``files`` and ``tar``) or file (``parquet``), in a fixed order."""
        self.skipped.clear()
        walk, objects = Walk(), ObjectWalk()
        for part in self.parts:
            if part.error is not None:
                yield error_entry(part.path, part.error) | ({"rows": 1} if self.kind == PARQUET else {})
            elif not part.matched or (objects if is_url(part.path) else walk).is_new_match(part.path):
                yield from self._in_part(part, walk, objects)
        yield from walk.links()
        if hidden := self.hidden + walk.hidden + objects.hidden:
            self.skipped[HIDDEN] += hidden

    def _in_part(self, part: Part, walk: Walk, objects: ObjectWalk) -> Iterator[Entry]:
        if self.kind == TAR:
            yield from tar_entries(part.path, self.skipped)
        elif self.kind == PARQUET:
            from .parquet import parquet_entries

            yield from parquet_entries(part.path)
        elif part.found is not None:
            yield object_entry(part.found)
        elif is_url(part.path):
            with source_errors():
                yield from objects.folder(part.path)
        elif part.is_folder:
            yield from walk.folder(part.path)
        else:
            yield file_entry(part.path)


def find(source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> Found:
    """Find the files of ``source``: a folder, an image, a glob, tar files or Parquet files, or several of one kind.

    Each can be a path, or the URL of an object or folder in a store, as text.

    Raises ``SourceError`` if a source is missing, a glob matches nothing, or the kinds differ, and
    ``MissingDependencyError`` for Parquet files without pyarrow.
    """
    given = [source] if isinstance(source, (str, os.PathLike)) or not isinstance(source, Iterable) else list(source)
    names = tuple(os.fspath(name) if isinstance(name, (str, os.PathLike)) else name for name in given)
    if not names or not all(isinstance(name, str) and name for name in names):
        raise SourceError(f"The source is {source!r}; pass a folder, a glob, tar files or Parquet files")
    parts, hidden = [], 0
    for name in names:
        found, left_out = _expanded(name)
        parts += found
        hidden += left_out
    kinds = {_kind(part): part.path for part in parts if part.error is None}
    if len(kinds) > 1:
        examples = ", ".join(f"{shown(path)!r} ({kind})" for kind, path in kinds.items())
        raise SourceError(f"The sources are of different kinds: {examples}; classify each kind in a separate run")
    kind = next(iter(kinds), FILES)
    if kind == PARQUET:
        check_dependencies("Reading Parquet files", ["pyarrow"])
    return Found(kind, tuple(parts), tuple(map(_as_text, names)), hidden)


def _as_text(name: str) -> str:
    """Return a source as it was given, but without a secret in a URL."""
    return url_text(name) if is_url(name) else name


def _expanded(name: str) -> tuple[list[Part], int]:
    """Return the parts of one source, and the number of hidden images that its glob would match."""
    if is_url(name):
        named = expand(name)
        if named.folder is not None:
            _refuse_folder(name)
            return [Part(named.folder)], 0
        return [Part(found.url, named.is_glob, None, found) for found in named.objects], named.hidden
    try:
        os.stat(name)
        return [Part(name)], 0
    except ValueError as error:  # a NUL, or characters that no file name has
        raise SourceError(f"{name!r} cannot be the name of a file ({error}); check the path") from error
    except OSError as error:
        if os.path.islink(name) and has_image_suffix(name):
            return [Part(name)], 0  # its row has the error
        refuse_mistaken(name)
        if not glob.has_magic(name):
            raise SourceError(_missing(name, error)) from error
    pattern = Glob(name)
    matches = pattern.matches()
    if not matches:
        raise SourceError(
            f"{path_text(name)!r} matches no file; to search subfolders, use a glob such as 'photos/**/*.jpg'"
        )
    if list(matches) == [pattern.top] and matches[pattern.top] is not None:
        raise SourceError(f"{path_text(name)!r} matches no file. {path_text(pattern.top)!r}: {matches[pattern.top]}")
    return [Part(path, True, error) for path, error in matches.items()], pattern.hidden


def _missing(name: str, error: OSError) -> str:
    advice = "pass a folder, a glob, tar files or Parquet files"
    if os.path.islink(name):
        return f"{path_text(name)!r} is a link that leads nowhere ({error.strerror}); {advice}"
    if isinstance(error, FileNotFoundError):
        return f"{path_text(name)!r} does not exist; {advice}"
    return f"{path_text(name)!r} cannot be read ({error.strerror}); check the path and its permissions"


def _refuse_folder(url: str) -> None:
    """Raise ``SourceError`` if the folder ``url`` is named like a tar or a Parquet file, without a slash behind it."""
    if (kind := _named_kind(url)) != FILES:
        raise SourceError(
            f"{shown(url)!r} is a folder, not a {kind} file; if it holds images, pass {shown(url) + '/'!r}, and for "
            f"{kind} files, {shown(url) + '/*'!r}"
        )


def _named_kind(path: str) -> str:
    lower = path.lower()
    if lower.endswith(COMPRESSED):
        raise SourceError(f"{shown(path)!r} is a compressed tar, which fastres cannot read; decompress it first")
    return TAR if lower.endswith(".tar") else PARQUET if lower.endswith((".parquet", ".pq")) else FILES


def _kind(part: Part) -> str:
    kind = _named_kind(part.path)
    if kind == FILES or part.found is not None:
        return kind
    try:
        other = other_kind(os.stat(part.path).st_mode)
    except OSError as error:
        raise SourceError(_missing(part.path, error)) from error
    if other is not None:
        advice = f"if it holds images, pass {path_text(part.path) + '/'!r}" if other == "a folder" else "pass a file"
        raise SourceError(f"{path_text(part.path)!r} is {other}, not a {kind} file; {advice}")
    return kind


def opened(found: Found, listing: Path, image_column: str | None, columns: Sequence[str]) -> Images:
    """Return the images in ``listing``. Raises ``SourceError`` if there are none, or if ``columns`` do not exist."""
    if found.kind != PARQUET and (image_column or columns):
        raise SourceError(
            f"image_column and columns work only for Parquet files, but the source is of kind {found.kind!r}; leave "
            "them out"
        )
    images: Images
    if found.kind == PARQUET:
        from .parquet import ParquetImages

        images = ParquetImages.of(Listing(listing), image_column, tuple(columns))
    else:
        images = FileImages(Listing(listing)) if found.kind == FILES else TarImages(Listing(listing))
    if not len(images):
        raise SourceError(
            f"There are no images in {', '.join(map(repr, map(path_text, found.description)))}. {_advice(found)}"
        )
    return images


def _advice(found: Found) -> str:
    if found.kind == TAR:
        return f"Members count as images if their names end in {' '.join(sorted(SUFFIXES))}"
    if found.kind == PARQUET:
        return "The Parquet files have no rows"
    inside = {
        os.path.splitext(name)[1].lower() for path in found.paths if os.path.isdir(path) for name in os.listdir(path)
    }.union(*(suffixes_below(part.path) for part in found.parts if is_url(part.path) and part.is_folder))
    for suffix in (".tar", ".parquet"):
        if suffix in inside:
            return f"It holds {suffix} files; pass {shown(os.path.join(found.parts[0].path, '*' + suffix))!r}"
    return f"Files count as images if their names end in {' '.join(sorted(SUFFIXES))}; a glob accepts any name"


@dataclass(frozen=True)
class FileImages:
    """Image files in a list."""

    listing: Listing
    identity: ClassVar[Kinds] = (("path", str),)

    def __len__(self) -> int:
        return len(self.listing)

    def read(self, start: int, stop: int) -> tuple[Columns, Iterator[str | bytes | ImageError]]:
        entries = self.listing.rows(start, stop)
        return {"path": [shown(entry["path"]) for entry in entries]}, file_contents(entries, path_or_error)


def path_or_error(entry: Entry) -> str | ImageError:
    """Return the path of a listed image file, or an error if it is no longer the file that was listed."""
    if entry["error"] is not None:
        return ImageError(entry["error"])
    path = os.fsdecode(entry["path"])
    now = file_entry(path)
    if "error" in now:
        return ImageError(f"The file changed after it was listed. {now['error']}")
    if any(now[name] != entry[name] for name in ("size", "mtime_ns")):
        return ImageError(
            f"The file changed after it was listed: it had {entry['size']:,} bytes and now has {now['size']:,}, or was "
            "written again."
        )
    return path
