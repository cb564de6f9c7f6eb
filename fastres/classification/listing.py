"""The list of a source's images: an Arrow file in the work folder, written once in a fixed order.

Worker processes read the parts that they need from the file, so that a hundred million images take disk space, not
memory. Its sha256 shows if a resumed run has the same images.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from fastres.errors import FastresError, OutputError
from fastres.files import open_regular
from fastres.terminal import progress_bar
from fastres.text import path_text

Entry = dict[str, Any]
CHUNK = 8192
FILES, TAR, PARQUET = "files", "tar", "parquet"

# An entry with an ``error`` is one row of the table with that error.
_FILE = [("path", pa.binary()), ("size", pa.int64()), ("mtime_ns", pa.int64()), ("error", pa.string())]
SCHEMAS = {
    FILES: pa.schema(_FILE),
    TAR: pa.schema([*_FILE, ("key", pa.string()), ("offset", pa.int64()), ("length", pa.int64())]),
    PARQUET: pa.schema([*_FILE, ("rows", pa.int64())]),
}

# Reasons for which images are left out; the keys of ``Found.skipped``.
HIDDEN = "hidden names (they begin with a dot)"
FURTHER = "further images of a sample"

# What a damaged file makes Arrow raise. ArrowException covers most, but its bindings let others through.
DAMAGE = (OSError, pa.ArrowException, ValueError, KeyError, TypeError, IndexError, OverflowError)


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
    """Write ``entries`` to the Arrow file ``file``, open for writing and reading; return its sha256.

    The same entries have the same sha256.
    """
    schema = SCHEMAS[kind]
    entries = progress_bar(entries, desc="Listing images", unit="", delay=1.0, disable=not progress)
    with pa.ipc.new_file(file, schema) as writer:
        for chunk in _chunks(entries):
            writer.write_batch(pa.RecordBatch.from_pylist(chunk, schema=schema))
    file.seek(0)
    return _sha256(file)


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
    """The list in the Arrow file ``path``, read in parts. It can be pickled; each process opens the file itself.

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

    def rows(self, start: int, stop: int) -> pa.Table:
        """Return the entries ``start`` to ``stop``."""
        self._open()
        parts = []
        while start < stop:
            number, first = divmod(start, CHUNK)
            parts.append(self._chunk(number).slice(first, stop - start))
            start = (number + 1) * CHUNK
        return pa.Table.from_batches(parts, self._reader.schema)

    def entries(self) -> Iterator[Entry]:
        """Yield all entries in order."""
        self._open()
        for number in range(self._reader.num_record_batches):
            yield from self._chunk(number).to_pylist()

    def _open(self) -> None:
        if self._process == os.getpid():
            return
        try:
            open_regular(self.path).close()  # opening a named pipe would wait for its writer
            reader = pa.ipc.open_file(pa.OSFile(os.fsencode(self.path), "rb"))
            if reader.schema not in SCHEMAS.values():
                raise ValueError("it has the columns of another version of fastres")
            self._reader, self._last = reader, (-1, None)
            chunks = reader.num_record_batches
            self._count = max(chunks - 1, 0) * CHUNK + (self._read(chunks - 1).num_rows if chunks else 0)
        except DAMAGE as error:
            raise self._damaged(error) from error
        self._process = os.getpid()

    def _chunk(self, number: int) -> pa.RecordBatch:
        if number != self._last[0]:
            try:
                self._last = number, self._read(number)
            except DAMAGE as error:
                raise self._damaged(error) from error
        return self._last[1]

    def _read(self, number: int) -> pa.RecordBatch:
        chunk = self._reader.get_batch(number)
        chunk.validate(full=True)
        if number < self._reader.num_record_batches - 1 and chunk.num_rows != CHUNK:
            raise ValueError("a part of it has a wrong length")
        return chunk

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
