"""Parts: files of finished rows in the work folder.

``rows-1f0c9a77d24be860-000000000000-000000000512.json`` holds rows 0 to 512 of a CSV or JSON Lines file, as finished
lines. A part of a Parquet output is a Parquet file. The first number is a checksum of the run (its settings and
images), of the two row numbers and of the file's content. A run takes over only parts whose checksums match, so that a
damaged file or one of another run cannot become part of its output.

The parts of one process follow one another. Those of several processes may overlap, if a process has died and another
has done its work again. :func:`cover` takes each row from one of them.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from fastres.errors import ResumeError, StorageError
from fastres.terminal import progress_bar

from . import lines
from .lines import Lines

ROW_GROUP = 4096  # rows in a row group of the output, so that it does not depend on the parts
# A part is closed when it has this many rows or bytes or is this old. This limits the memory used and the rows lost to
# a kill.
PART_ROWS, PART_BYTES, PART_SECONDS = 4096, 1 << 26, 15.0
_LINES, _ARROW = ".json", ".parquet"
_NAME = re.compile(r"rows-([0-9a-f]{16})-(\d{12})-(\d{12})\.(?:json|parquet)")

Rows = Any  # Lines, or Arrow's rows: a RecordBatch when they are written, a Table when they are read
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


def packed(batches: Sequence[Rows], run: str, start: int) -> tuple[str, bytes]:
    """Return name and content of the part with ``batches``, the rows from ``start`` on, of the run ``run``."""
    if isinstance(batches[0], Lines):
        content, suffix = lines.packed(batches), _LINES
    else:
        from . import arrow_parts

        content, suffix = arrow_parts.packed(batches), _ARROW
    stop = start + sum(batch.num_rows for batch in batches)
    return f"rows-{_checksum(run, start, stop, content)}-{start:012}-{stop:012}{suffix}", content


def _checksum(run: str, start: int, stop: int, content: bytes) -> str:
    digest = hashlib.sha256(f"{run} {start} {stop} ".encode())
    digest.update(content)
    return digest.hexdigest()[:16]


class DamagedPartError(ResumeError):
    """A part is damaged, cannot be read, or belongs to another run."""

    def __init__(self, part: Part, what: str) -> None:
        super().__init__(f"{part.name!r} {what}")
        self.part = part


def read(part: Part, run: str, read_file: Read) -> Rows:
    """Return the rows of a part of the run ``run``. Raises ``DamagedPartError`` if the checksum does not match."""
    try:
        content = read_file(part.name)
    except StorageError:  # the store fails, not the part
        raise
    except OSError as error:
        raise DamagedPartError(part, f"cannot be read: {error.strerror or error}") from error
    if _checksum(run, part.start, part.stop, content) != part.checksum:
        raise DamagedPartError(part, "is damaged, or belongs to another run")
    if part.name.endswith(_LINES):
        return lines.unpacked(content)
    from . import arrow_parts

    return arrow_parts.unpacked(content)


def failed(rows: Rows) -> list[int]:
    """Return the places of those of ``rows``, which :func:`read` has returned, that have an error."""
    if isinstance(rows, Lines):
        return rows.failed
    from . import arrow_parts

    return arrow_parts.failed(rows)


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
            found = failed(read(part, run, read_file))
        except DamagedPartError:
            bad.append(part)
            continue
        good.append(part)
        if found:
            errors[part] = [part.start + place for place in found]
    slices, missing = cover(good, rows)
    count = sum(each.start <= row < each.stop for each in slices for row in errors.get(each.part, ()))
    return Kept(slices, missing, bad, count)


def merged(slices: Iterable[Slice], run: str, read_file: Read) -> Iterator[Rows]:
    """Yield the rows of ``slices`` in order. Arrow's come as tables of ``ROW_GROUP`` rows; the last may be smaller."""
    rows = (
        read(each.part, run, read_file).slice(each.start - each.part.start, each.stop - each.start) for each in slices
    )
    first = next(rows, None)
    if first is None:
        return
    if isinstance(first, Lines):
        yield from chain([first], rows)
        return
    from . import arrow_parts

    yield from arrow_parts.regrouped(chain([first], rows), ROW_GROUP)


class PartWriter:
    """Collects the rows of the run ``run``. ``write`` gets name and content of each part that is complete."""

    def __init__(self, run: str, write: Callable[[str, bytes], None]) -> None:
        self.written = 0  # rows in the parts
        self._run, self._write = run, write
        # The rows that wait for the next part, and the number of the first. They change together: an interrupt can
        # come at any time.
        self._waiting: tuple[int, list[Rows]] = 0, []
        self._since = time.monotonic()

    def add(self, start: int, rows: Rows) -> None:
        """Add rows from number ``start`` on. Write a part if enough rows are waiting, or for long enough."""
        if start != self._stop():
            self.flush()
            self._waiting = start, []
        self._waiting[1].append(rows)
        is_old = time.monotonic() - self._since >= PART_SECONDS
        if is_old or self._stop() - self._waiting[0] >= PART_ROWS or self._size() >= PART_BYTES:
            self.flush()

    def _size(self) -> int:
        return sum(batch.nbytes for batch in self._waiting[1])

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
