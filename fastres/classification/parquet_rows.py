"""Read rows of a Parquet file. Rows that are damaged are left out, always the same ones."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate

import pyarrow as pa
import pyarrow.parquet as pq

from fastres.errors import SourceError
from fastres.files import other_kind
from fastres.storage.objects import ObjectFile
from fastres.storage.urls import is_url

from .remote import object_facts, open_object, shown

# What a damaged file makes Arrow raise. ArrowException covers most, but its bindings let others through.
DAMAGE = (OSError, pa.ArrowException, ValueError, KeyError, TypeError, IndexError, OverflowError)
BUFFER, REMOTE_BUFFER = 1 << 20, 1 << 22  # bytes read at once from each column of a file, of an object


class OpenParquet:
    """An open Parquet file. Raises ``SourceError`` if it is none, or if its footer contradicts itself."""

    def __init__(self, path: str) -> None:
        try:
            self._open(path)
            # The file is not mapped into memory: if it were truncated meanwhile, the process would be killed.
            self.file = pq.ParquetFile(
                self.source,
                buffer_size=REMOTE_BUFFER if self._object else BUFFER,
                pre_buffer=False,
                page_checksum_verification=True,
            )
            self.schema: pa.Schema = self.file.schema_arrow
            self.names: list[str] = self.schema.names
            self.stops = _checked_stops(self.file.metadata)  # rows up to the end of each row group
        except DAMAGE as error:
            self.check_store(error)
            raise SourceError(
                f"{shown(path)!r} cannot be read as a Parquet file: {_first_line(error)} Write the file again"
            ) from error
        self.path = path

    def _open(self, path: str) -> None:
        self._object: ObjectFile | None = None
        if is_url(path):
            self._object, found = open_object(path)
            self.source = pa.PythonFile(self._object, mode="r")
            self.size, self.mtime_ns = found.size, found.mtime_ns
            return
        facts = os.stat(path)
        if (kind := other_kind(facts.st_mode)) is not None:
            raise OSError(f"it is {kind}")
        self.source = pa.OSFile(os.fsencode(path), "rb")
        facts = os.fstat(self.source.fileno())
        self.size, self.mtime_ns = facts.st_size, facts.st_mtime_ns

    def check_store(self, error: Exception) -> None:
        """Raise ``SourceError`` if ``error`` says nothing of the file: the object store failed, not Arrow."""
        if isinstance(error, SourceError):
            raise error
        if self._object is not None and self._object.failure is not None:
            raise SourceError(str(self._object.failure)) from error

    def check_unchanged(self, size: int, mtime_ns: int) -> None:
        """Raise ``SourceError`` if the file no longer has this size and time."""
        if self._object is not None:
            now = object_facts(self.path)
        else:
            facts = os.fstat(self.source.fileno())
            now = facts.st_size, facts.st_mtime_ns
        if {now, (self.size, self.mtime_ns)} != {(size, mtime_ns)}:
            raise SourceError(
                f"{shown(self.path)!r} was changed while it was being read; start again when it is complete"
            )

    def fields(self, names: list[str]) -> list[pa.Field]:
        """Return the fields of columns. Raises ``SourceError`` if one occurs twice."""
        for name in names:
            if self.names.count(name) > 1:
                raise SourceError(f"{shown(self.path)!r} has several columns {name!r}; write it with different names")
        return [self.schema.field(name) for name in names]


def _checked_stops(facts: pq.FileMetaData) -> list[int]:
    """Return the number of rows up to the end of each row group. Raises ``ValueError`` if the footer is damaged.

    The metadata of columns are not looked at: if they are damaged, Arrow's bindings end the process.
    """
    counts = [facts.row_group(number).num_rows for number in range(facts.num_row_groups)]
    if any(count < 0 for count in counts) or sum(counts) != facts.num_rows:
        raise ValueError("its footer contradicts itself about the number of rows")
    return list(accumulate(counts))


class Cursor:
    """Reader of rows of Parquet files, fastest in forward order; it streams row groups and never holds a whole one."""

    def __init__(self, columns: list[str]) -> None:
        self._columns = columns
        self._file: OpenParquet | None = None
        self._group = -1
        self._position = 0
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._rest: pa.RecordBatch | None = None
        self._sound: dict[int, tuple[int, str]] = {}  # damaged row groups: number of sound rows, and the error

    def open(self, path: str) -> OpenParquet:
        """Return the file ``path``, which stays open until another one is needed."""
        if self._file is None or self._file.path != path:
            self._file, self._group, self._sound = OpenParquet(path), -1, {}
            self._batches, self._rest = iter(()), None
        return self._file

    def rows(self, path: str, start: int, count: int) -> Iterator[pa.RecordBatch | tuple[int, str]]:
        """Yield rows ``start`` to ``start + count`` in parts: batches, or the number of damaged rows and the error."""
        stops = self.open(path).stops
        while count:
            group = bisect_right(stops, start)
            first = stops[group - 1] if group else 0
            wanted = min(count, stops[group] - start)
            try:
                part = self._part(group, first, start, wanted)
            except DAMAGE as error:  # it was read without an error a moment ago
                self.open(path).check_store(error)
                raise SourceError(f"{shown(path)!r} cannot be read: {_first_line(error)} Check the disk") from error
            taken = part[0] if isinstance(part, tuple) else part.num_rows
            yield part
            start, count = start + taken, count - taken

    def _part(self, group: int, first: int, start: int, wanted: int) -> pa.RecordBatch | tuple[int, str]:
        """Return rows of one group: at least one, and at most ``wanted``."""
        if group not in self._sound:
            try:
                return self._take(group, first, start, wanted, wanted)
            except DAMAGE as error:
                self._check_store(error)
                self._sound[group] = self._sound_rows(group)
        sound, reason = self._sound[group]
        if start >= first + sound:
            return wanted, reason
        return self._take(group, first, start, 1, 1)  # they could be read one by one, so they can be again

    def _sound_rows(self, group: int) -> tuple[int, str]:
        """Return how many rows from the start of the group on can be read one by one, and the error at the next."""
        self._group, count = -1, 0
        try:
            for batch in self._opened(group, 1):
                count += batch.num_rows
            reason = "Some of its rows are missing."
        except DAMAGE as error:
            self._check_store(error)
            reason = _first_line(error)
        return count, f"Row group {group} of the Parquet file is damaged: {reason}"

    def _check_store(self, error: Exception) -> None:
        assert self._file is not None
        self._file.check_store(error)

    def _opened(self, group: int, size: int) -> Iterator[pa.RecordBatch]:
        assert self._file is not None
        for batch in self._file.file.iter_batches(size, [group], self._columns, use_threads=False):
            batch.validate(full=True)
            yield batch

    def _take(self, group: int, first: int, start: int, wanted: int, size: int) -> pa.RecordBatch:
        """Return at least one and at most ``wanted`` rows from ``start`` on; drop the rows before them."""
        if group != self._group or start < self._position:
            self._group, self._position, self._rest = group, first, None
            self._batches = self._opened(group, size)
        while True:
            if self._rest is None or not self._rest.num_rows:
                self._rest = next(self._batches, None)
                if self._rest is None:
                    raise ValueError("some of its rows are missing")
            skipped = min(start - self._position, self._rest.num_rows)
            self._position, self._rest = self._position + skipped, self._rest.slice(skipped)
            if self._position == start and self._rest.num_rows:
                taken = self._rest.slice(0, wanted)
                self._position, self._rest = start + taken.num_rows, self._rest.slice(taken.num_rows)
                return taken


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0].strip().rstrip(".") + "."
