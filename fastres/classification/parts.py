"""Parts: files of finished rows in the work folder.

``rows-1f0c9a77d24be860-000000000000-000000000512.parquet`` holds rows 0 to 512. The first number is a checksum of the
run (its settings and images), of the two row numbers and of the file's content. A run takes over only parts whose
checksums match, so that a damaged file or one of another run cannot become part of its output.

The parts of one process follow one another. Those of several processes may overlap, if a process has died and another
has done its work again. :func:`cover` takes each row from one of them.
"""

from __future__ import annotations

import hashlib
import io
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from fastres.errors import ResumeError, StorageError
from fastres.terminal import progress_bar

from .formats import COMPRESSION

ROW_GROUP = 4096  # rows in a row group of the output, so that it does not depend on the parts
# A part is closed when it has this many rows or is this old. This limits the memory used and the rows lost to a kill.
PART_ROWS, PART_SECONDS = 4096, 15.0
_NAME = re.compile(r"rows-([0-9a-f]{16})-(\d{12})-(\d{12})\.parquet")

Read = Callable[[str], bytes]  # returns the content of a file in the work folder; raises OSError


@dataclass(frozen=True, order=True)
class Part:
    """A file with the rows from ``start`` to ``stop``, whose ``name`` says that it has this ``checksum``."""

    start: int
    stop: int
    name: str
    checksum: str

    @property
    def rows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Slice:
    """The rows from ``start`` to ``stop`` of a part."""

    part: Part
    start: int
    stop: int


def is_part(name: str) -> bool:
    """Return True if ``name`` is the name of a part."""
    return _NAME.fullmatch(name) is not None


def named_parts(names: Iterable[str]) -> list[Part]:
    """Return the parts among the files with these ``names``, in the order of their rows; nothing is read."""
    found = [(_NAME.fullmatch(name), name) for name in names]
    return sorted(Part(int(match[2]), int(match[3]), name, match[1]) for match, name in found if match)


def packed(batches: Sequence[pa.RecordBatch], run: str, start: int) -> tuple[str, bytes]:
    """Return name and content of the part with ``batches``, the rows from ``start`` on, of the run ``run``."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_batches(batches), buffer, compression=COMPRESSION)
    content, stop = buffer.getvalue(), start + sum(batch.num_rows for batch in batches)
    return f"rows-{_checksum(run, start, stop, content)}-{start:012}-{stop:012}.parquet", content


def _checksum(run: str, start: int, stop: int, content: bytes) -> str:
    digest = hashlib.sha256(f"{run} {start} {stop} ".encode())
    digest.update(content)
    return digest.hexdigest()[:16]


class DamagedPartError(ResumeError):
    """A part is damaged, cannot be read, or belongs to another run."""

    def __init__(self, part: Part, what: str) -> None:
        super().__init__(f"{part.name!r} {what}")
        self.part = part


def read(part: Part, run: str, read_file: Read) -> pa.Table:
    """Return the rows of a part of the run ``run``. Raises ``DamagedPartError`` if the checksum does not match."""
    try:
        content = read_file(part.name)
    except StorageError:  # the store fails, not the part
        raise
    except OSError as error:
        raise DamagedPartError(part, f"cannot be read: {error.strerror or error}") from error
    if _checksum(run, part.start, part.stop, content) != part.checksum:
        raise DamagedPartError(part, "is damaged, or belongs to another run")
    # pq.read_table starts threads that are at work after it. If the program then ended, they could abort it.
    return pq.ParquetFile(io.BytesIO(content)).read(use_threads=False)


def cover(parts: Iterable[Part], rows: range) -> tuple[list[Slice], list[range]]:
    """Return slices of ``parts`` that have each of the ``rows`` at most once, in order, and the rows that none has."""
    chosen: list[Slice] = []
    missing: list[range] = []
    position = rows.start
    for part in sorted(parts, key=lambda part: (part.start, -part.stop, part.name)):
        start, stop = max(part.start, position), min(part.stop, rows.stop)
        if start < stop:
            if position < start:
                missing.append(range(position, start))
            chosen.append(Slice(part, start, stop))
            position = stop
    if position < rows.stop:
        missing.append(range(position, rows.stop))
    return chosen, missing


@dataclass(frozen=True)
class Kept:
    """The rows that are finished and those that are missing; parts that are damaged or of another run; error rows."""

    slices: list[Slice]
    missing: list[range]
    bad: list[Part]
    errors: int

    @property
    def rows(self) -> int:
        return sum(each.stop - each.start for each in self.slices)


def check(parts: Iterable[Part], rows: range, count: int, run: str, read_file: Read, progress: bool) -> Kept:
    """Compare the checksum of each part that has some of ``rows`` with its name, and cover the rows with the good ones.

    ``count`` is the number of rows of the run.
    """
    good: list[Part] = []
    bad: list[Part] = []
    errors: dict[Part, list[int]] = {}  # the numbers of the rows with an error
    wanted = [part for part in parts if (part.start < rows.stop and rows.start < part.stop) or part.stop > count]
    for part in progress_bar(wanted, desc="Checking finished rows", unit="part", delay=1.0, disable=not progress):
        try:
            if part.stop > count:
                raise DamagedPartError(part, "has more rows than the run")
            column = read(part, run, read_file)["error"]
        except DamagedPartError:
            bad.append(part)
            continue
        good.append(part)
        if column.null_count < len(column):
            errors[part] = [part.start + row for row, error in enumerate(column.to_pylist()) if error is not None]
    slices, missing = cover(good, rows)
    failed = sum(each.start <= row < each.stop for each in slices for row in errors.get(each.part, ()))
    return Kept(slices, missing, bad, failed)


def merged(slices: Iterable[Slice], run: str, read_file: Read) -> Iterator[pa.Table]:
    """Yield the rows of ``slices`` as tables of ``ROW_GROUP`` rows; the last may be smaller.

    Each column is in one piece: where pieces end shows in the bytes of a Parquet file.
    """
    waiting: list[pa.Table] = []
    for each in slices:
        table = read(each.part, run, read_file)
        waiting.append(table.slice(each.start - each.part.start, each.stop - each.start))
        if sum(table.num_rows for table in waiting) >= ROW_GROUP:
            joined = pa.concat_tables(waiting)
            whole = joined.num_rows - joined.num_rows % ROW_GROUP
            yield from (joined.slice(start, ROW_GROUP).combine_chunks() for start in range(0, whole, ROW_GROUP))
            waiting = [joined.slice(whole)]
    if rest := sum(table.num_rows for table in waiting):
        yield pa.concat_tables(waiting).slice(0, rest).combine_chunks()


class PartWriter:
    """Collects the rows of the run ``run``. ``write`` gets name and content of each part that is complete."""

    def __init__(self, run: str, write: Callable[[str, bytes], None]) -> None:
        self.written = 0  # rows in the parts
        self._run, self._write = run, write
        # The rows that wait for the next part, and the number of the first. They change together: an interrupt can
        # come at any time.
        self._waiting: tuple[int, list[pa.RecordBatch]] = 0, []
        self._since = time.monotonic()

    def add(self, start: int, rows: pa.RecordBatch) -> None:
        """Add rows from number ``start`` on. Write a part if enough rows are waiting, or for long enough."""
        if start != self._stop():
            self.flush()
            self._waiting = start, []
        self._waiting[1].append(rows)
        if self._stop() - self._waiting[0] >= PART_ROWS or time.monotonic() - self._since >= PART_SECONDS:
            self.flush()

    def _stop(self) -> int:
        start, batches = self._waiting
        return start + sum(batch.num_rows for batch in batches)

    def flush(self) -> None:
        """Write the waiting rows as a part. If ``write`` raises, they keep waiting."""
        (start, batches), stop = self._waiting, self._stop()
        if stop > start:
            self._write(*packed(batches, self._run, start))
        self._since = time.monotonic()
        self.written, self._waiting = self.written + stop - start, (stop, [])
