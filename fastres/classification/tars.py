"""Read images from tar files in WebDataset's convention: files with the same name up to the first dot are one sample.

See https://github.com/webdataset/webdataset. The first image of a sample is classified; its other files are ignored.
"""

from __future__ import annotations

import os
import posixpath
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, groupby
from typing import BinaryIO, ClassVar, NamedTuple

from fastres.errors import ImageError, SourceError, StorageError
from fastres.files import open_regular
from fastres.storage.urls import is_url, url_text
from fastres.text import path_text

from .archives import Archive, Damage, Member
from .columns import Columns, Kinds
from .listing import FURTHER, HIDDEN, Entry, Listing
from .remote import is_remote, object_facts, opened_object, requested, shown
from .walking import has_image_suffix

_MAX_LINKS = 40
_MAX_BYTES = (1 << 31) - 4096  # the most that the system reads at once


def tar_entries(path: str, skipped: Counter[str]) -> Iterator[Entry]:
    """Yield one entry for each sample with an image: the position of its bytes in the tar.

    What is damaged, cut off or cannot be read has an entry with an error. Raises ``SourceError`` if the file cannot be
    read or is no tar.
    """
    with _opened(path) as tar:
        size, mtime_ns = tar.facts()
        base = {"path": os.fsencode(path), "size": size, "mtime_ns": mtime_ns}
        for entry in _Samples(tar.file, path, size, skipped).entries():
            yield base | entry
        _check_unchanged(path, tar.facts(), size, mtime_ns)


def tar_texts(entry: Entry, extension: str, most: int) -> Iterator[tuple[str, bytes | None] | None]:
    """Yield the key and the content of each file ``key.extension`` in a tar, at most its first ``most`` bytes.

    ``entry`` is one of those that :func:`tar_entries` yields for the tar. The content is ``None`` if it cannot be read;
    a part of the tar that is damaged or cut off is ``None``. Raises ``SourceError`` if the tar has changed.
    """
    path = os.fsdecode(entry["path"])
    with _opened(path) as tar:
        _check_unchanged(path, tar.facts(), entry["size"], entry["mtime_ns"])
        yield from _Samples(tar.file, path, entry["size"], Counter()).texts(extension, most)
        _check_unchanged(path, tar.facts(), entry["size"], entry["mtime_ns"])


class _Tar(NamedTuple):
    """An open tar, and a function that asks for its present size in bytes and time in ns."""

    file: BinaryIO
    facts: Callable[[], tuple[int, int]]


@contextmanager
def _opened(path: str) -> Iterator[_Tar]:
    """Open a tar, local or in an object store. Raises ``SourceError``, also for an ``OSError`` in the block."""
    if is_url(path):
        with opened_object(path) as (file, facts):
            yield _Tar(file, facts)
        return
    try:
        with open_regular(path) as unbuffered, open(unbuffered.fileno(), "rb", closefd=False) as file:
            yield _Tar(file, lambda: _facts(os.fstat(file.fileno())))
    except OSError as error:
        raise _unreadable(path, error) from error


def _facts(found: os.stat_result) -> tuple[int, int]:
    return found.st_size, found.st_mtime_ns


def split_name(name: str) -> tuple[str, str]:
    """Split ``a/b.left.jpg`` into ``a/b``, the key of the sample, and ``left.jpg``, the file's name in the sample."""
    folder, base = posixpath.split(name)
    stem, _, extension = base.partition(".")
    return posixpath.join(folder, stem), extension


class _Samples:
    """The samples of a tar file."""

    def __init__(self, file: BinaryIO, path: str, size: int, skipped: Counter[str]) -> None:
        self._path = url_text(path) if is_url(path) else path  # for messages
        self._file, self._size, self._skipped = file, size, skipped
        self._index: dict[str, list[Member]] | None = None

    def entries(self) -> Iterator[Entry]:
        key: str | None = None  # of the last sample
        usual: str | None = None  # the file's name in it, such as jpg
        damaged = False  # whether damage followed it
        for member in Archive(self._file, self._path, self._size).members():
            if isinstance(member, Damage):
                yield {"error": _described(member)}
                damaged = True
                continue
            own, extension = split_name(member.name)
            if member.is_cut:
                yield _error(
                    own, f"The file {path_text(_raw(member.name))!r} is cut off: the tar ends before its data."
                )
                continue
            if not self._is_image(member, extension):
                continue
            if own == key:
                self._skipped[FURTHER] += 1
                continue
            key = own
            if damaged and usual not in (None, extension):
                yield _error(own, "The first image of this sample may be in the damaged part before it.")
            else:
                yield self._entry(member, own)
                usual = extension
            damaged = False

    def texts(self, extension: str, most: int) -> Iterator[tuple[str, bytes | None] | None]:
        for member in Archive(self._file, self._path, self._size).members():
            if isinstance(member, Damage) or member.is_cut:
                yield None
                continue
            key, own = split_name(member.name)
            if own == extension and (member.isreg() or member.islnk() or member.issym()):
                found = self._entry(member, key)
                if "error" in found:
                    yield path_text(_raw(key)), None
                else:
                    length = min(found["length"], most)
                    self._file.seek(found["offset"])
                    yield path_text(_raw(key)), self._file.read(length)

    def _is_image(self, member: Member, extension: str) -> bool:
        """Return True if ``member`` is named like an image and is a file or a link; count it if its name is hidden."""
        if not has_image_suffix(f"x.{extension}") or not (member.isreg() or member.islnk() or member.issym()):
            return False
        if any(part.startswith(".") and part not in (".", "..") for part in member.name.split("/")):
            self._skipped[HIDDEN] += 1
            return False
        return True

    def _entry(self, member: Member, key: str) -> Entry:
        target: Member | None = member
        for _ in range(_MAX_LINKS):
            if target is None or target.isreg():
                break
            target = self._target(target)
        if target is None or not target.isreg():
            return _error(key, f"The link leads nowhere: the tar holds no file {path_text(_raw(member.linkname))!r}.")
        if target.is_sparse:
            return _error(key, "The file is stored as a sparse file; write the tar without sparse files.")
        if target.is_cut or target.size > _MAX_BYTES:
            what = "is cut off" if target.is_cut else f"has {target.size:,} bytes, more than fastres reads"
            return _error(key, f"The file {path_text(_raw(target.name))!r} {what}.")
        return {"key": path_text(_raw(key)), "offset": target.offset_data, "length": target.size}

    def _target(self, link: Member) -> Member | None:
        """Return what ``link`` leads to: hard links to a member before them, symbolic links to any."""
        if self._index is None:
            self._index = {}
            for member in Archive(self._file, self._path, self._size).members():
                if isinstance(member, Member):
                    self._index.setdefault(posixpath.normpath(member.name), []).append(member)
        if link.issym():
            name = posixpath.join(posixpath.dirname(link.name), link.linkname)
            return next(reversed(self._index.get(posixpath.normpath(name), [])), None)
        found = self._index.get(posixpath.normpath(link.linkname), [])
        return next((member for member in reversed(found) if member.offset < link.offset), None)


def _raw(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _error(key: str, error: str) -> Entry:
    return {"key": path_text(_raw(key)), "error": error}


def _described(damage: Damage) -> str:
    if damage.start == damage.stop:
        return f"The tar ends at byte {damage.start:,} without an end mark; images behind it may be lost."
    return (
        f"The tar is damaged between bytes {damage.start:,} and {damage.stop:,} ({damage.what}); images there are lost."
    )


@dataclass(frozen=True)
class TarImages:
    """Image files in uncompressed tar files; ``listing`` has their offsets."""

    listing: Listing
    identity: ClassVar[Kinds] = (("path", str), ("key", str))

    def __len__(self) -> int:
        return len(self.listing)

    def read(self, start: int, stop: int) -> tuple[Columns, Iterator[str | bytes | ImageError]]:
        entries = self.listing.rows(start, stop)
        identity = {"path": [shown(entry["path"]) for entry in entries], "key": [entry["key"] for entry in entries]}
        members = chain.from_iterable(
            (_members_of_object if remote else _members)(list(group)) for remote, group in groupby(entries, is_remote)
        )
        return identity, members


def _members(entries: list[Entry]) -> Iterator[bytes | ImageError]:
    """Yield the bytes of each entry; a tar stays open until another one is needed."""
    name, file = "", None
    try:
        for entry in entries:
            if entry["error"] is not None:
                yield ImageError(entry["error"])
                continue
            if os.fsdecode(entry["path"]) != name:
                if file is not None:
                    file.close()
                name = os.fsdecode(entry["path"])
                file = open_regular(name)
            assert file is not None
            data = os.pread(file.fileno(), entry["length"], entry["offset"])
            _check_unchanged(name, _facts(os.fstat(file.fileno())), entry["size"], entry["mtime_ns"])
            if len(data) != entry["length"]:
                raise SourceError(f"{path_text(name)!r} cannot be read completely; check the disk")
            yield data
    except OSError as error:
        raise _unreadable(name, error) from error
    finally:
        if file is not None:
            file.close()


def _members_of_object(entries: list[Entry]) -> Iterator[bytes | ImageError]:
    """Yield the bytes of each entry of tars in object stores, requested several at a time."""
    for entry, data in requested(entries, _place, _check_object):
        if entry["error"] is not None:
            yield ImageError(entry["error"])
            continue
        if isinstance(data, StorageError):
            raise SourceError(str(data)) from data
        if len(data) != entry["length"]:
            raise SourceError(f"{shown(entry['path'])!r} cannot be read completely; check the store")
        yield data


def _place(entry: Entry) -> tuple[int, int]:
    return entry["offset"], entry["offset"] + entry["length"]


def _check_object(entry: Entry) -> None:
    path = os.fsdecode(entry["path"])
    _check_unchanged(path, object_facts(path), entry["size"], entry["mtime_ns"])


def _check_unchanged(path: str, now: tuple[int, int], size: int, mtime_ns: int) -> None:
    if now[0] != size:
        change = "shorter" if now[0] < size else "longer"
        raise SourceError(
            f"{shown(path)!r} became {change} while it was being read; wait until it is completely written"
        )
    if now[1] != mtime_ns:
        raise SourceError(f"{shown(path)!r} was changed while it was being read; start again when it is complete")


def _unreadable(path: str, error: OSError) -> SourceError:
    return SourceError(
        f"{path_text(path)!r} cannot be read: {error.strerror or error}; check that it still exists and is readable"
    )
