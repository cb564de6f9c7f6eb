"""The list of a source's images: a file in the work folder, written once in a fixed order.

Worker processes read the parts that they need from the file, so that a hundred million images take disk space, not
memory. Its sha256 shows if a resumed run has the same images.

Each line is JSON. There is one for each ``CHUNK`` entries, which has their columns, without those that are null
throughout. Then comes an index with the place and the CRC-32 of each of these lines. The last line, whose length is
fixed, has the place and the CRC-32 of the index.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any, BinaryIO

from fastres.errors import FastresError, OutputError
from fastres.files import open_regular
from fastres.terminal import progress_bar
from fastres.text import path_text

Entry = dict[str, Any]
CHUNK = 8192
FILES, TAR, PARQUET = "files", "tar", "parquet"

# An entry with an ``error`` is one row of the table with that error.
_FILE = ("path", "size", "mtime_ns", "error")
COLUMNS = {FILES: _FILE, TAR: (*_FILE, "key", "offset", "length"), PARQUET: (*_FILE, "rows")}

# Reasons for which images are left out; the keys of ``Found.skipped``.
HIDDEN = "hidden names (they begin with a dot)"
FURTHER = "further images of a sample"

_END = '["%016x", "%08x"]\n'  # the last line
_END_SIZE = len(_END % (0, 0))
# What a damaged file makes the reader raise.
_DAMAGE = (OSError, ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError)


@contextmanager
def writing_list(path: Path) -> Iterator[BinaryIO]:
    """Yield the file ``path``, open for writing and reading. Raises ``OutputError`` if it cannot be written."""
    try:
        with path.open("wb+") as file:
            yield file
    except FastresError:
        raise
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        temporary = Path(tempfile.gettempdir()) in path.parents
        raise OutputError(
            f"The list of images cannot be written in {path_text(path.parent)!r}: {reason}. Free some space there"
            + (", or set TMPDIR to another folder" if temporary else "")
        ) from error


def create_listing(path: Path, entries: Iterable[Entry], kind: str, progress: bool) -> str:
    """Do what :func:`write_listing` does, to a new file. Raises ``OutputError`` if it cannot be written."""
    with writing_list(path) as file:
        return write_listing(entries, kind, file, progress)


def write_listing(entries: Iterable[Entry], kind: str, file: BinaryIO, progress: bool) -> str:
    """Write ``entries`` to ``file``, open for writing and reading; return its sha256.

    The same entries have the same sha256.
    """
    names = COLUMNS[kind]
    entries = progress_bar(entries, desc="Listing images", unit="", delay=1.0, disable=not progress)
    places: list[tuple[int, int, int]] = []
    count = position = 0
    for chunk in _chunks(entries):
        line = _json(_as_columns(chunk, names))
        places.append((position, len(line), zlib.crc32(line)))
        count, position = count + len(chunk), position + len(line)
        file.write(line)
    index = _json({"columns": names, "count": count, "chunks": places})
    file.write(index)
    file.write((_END % (position, zlib.crc32(index))).encode())
    file.seek(0)
    return _sha256(file)


def _json(value: Any) -> bytes:
    return (json.dumps(value, separators=(",", ":")) + "\n").encode()


def _as_columns(chunk: list[Entry], names: Iterable[str]) -> dict[str, list[Any]]:
    columns = {name: [entry.get(name) for entry in chunk] for name in names}
    columns["path"] = [entry["path"].decode("utf-8", "surrogateescape") for entry in chunk]
    return {name: values for name, values in columns.items() if any(value is not None for value in values)}


def _chunks(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    chunk: list[Entry] = []
    for entry in entries:
        chunk.append(entry)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


class Listing:
    """The list in the file ``path``, read in parts. It can be pickled; each process opens the file itself.

    The methods raise ``OutputError`` if the file cannot be read or is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._process: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_process": None}

    def __len__(self) -> int:
        self._open()
        return self._count

    def rows(self, start: int, stop: int) -> list[Entry]:
        """Return the entries ``start`` to ``stop``."""
        self._open()
        found: list[Entry] = []
        while start < stop:
            number, first = divmod(start, CHUNK)
            found += self._entries(number, slice(first, first + stop - start))
            start = (number + 1) * CHUNK
        return found

    def entries(self) -> Iterator[Entry]:
        """Yield all entries in order."""
        self._open()
        for number in range(len(self._places)):
            yield from self._entries(number, slice(None))

    def _entries(self, number: int, wanted: slice) -> Iterator[Entry]:
        chunk = self._chunk(number)
        paths = [path.encode("utf-8", "surrogateescape") for path in chunk["path"][wanted]]
        others = [chunk[name][wanted] if name in chunk else [None] * len(paths) for name in self._names]
        others[0] = paths
        return (dict(zip(self._names, values, strict=True)) for values in zip(*others, strict=True))

    def _open(self) -> None:
        if self._process == os.getpid():
            return
        try:
            self._file = open_regular(self.path)  # opening a named pipe would wait for its writer
            self._read_index()
        except _DAMAGE as error:
            raise self._damaged(error) from error
        self._last: tuple[int, dict[str, list[Any]]] = -1, {}
        self._process = os.getpid()

    def _read_index(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        position, checksum = (int(number, 16) for number in json.loads(self._bytes(size - _END_SIZE, _END_SIZE)))
        index = json.loads(self._checked(position, size - _END_SIZE - position, checksum))
        self._names, self._count, self._places = tuple(index["columns"]), index["count"], index["chunks"]
        if self._names not in COLUMNS.values():
            raise ValueError("it has the columns of another version of fastres")

    def _chunk(self, number: int) -> dict[str, list[Any]]:
        if number != self._last[0]:
            try:
                self._last = number, json.loads(self._checked(*self._places[number]))
            except _DAMAGE as error:
                raise self._damaged(error) from error
        return self._last[1]

    def _checked(self, position: int, size: int, checksum: int) -> bytes:
        content = self._bytes(position, size)
        if zlib.crc32(content) != checksum:
            raise ValueError("a part of it is damaged")
        return content

    def _bytes(self, position: int, size: int) -> bytes:
        return os.pread(self._file.fileno(), size, position)

    def _damaged(self, error: Exception) -> OutputError:
        reason = getattr(error, "strerror", None) or error
        return OutputError(
            f"{path_text(self.path)!r}, the list of images, cannot be read: {reason}. If it is damaged, use "
            "--overwrite to start over"
        )


def difference(before: Path, after: Path) -> str:
    """Describe the first difference between two lists in words."""
    then, now = Listing(before), Listing(after)
    try:
        counts = f"{len(then):,} entries then, {len(now):,} now"
        for old, new in zip_longest(then.entries(), now.entries()):
            if old != new:
                return f"{counts}; the first difference: {_named(old)} then, {_named(new)} now"
    except OutputError as error:
        return f"the lists cannot be compared: {error}"
    return counts


def _named(entry: Entry | None) -> str:
    if entry is None:
        return "nothing"
    facts = ", ".join(f"{name} {value}" for name, value in entry.items() if name != "path" and value is not None)
    return f"{path_text(entry['path'])!r} ({facts})"
