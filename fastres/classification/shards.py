"""Shards: files of finished rows in the work folder.

``rows-1f0c9a77d24be860-000000000000-000000000512.parquet`` holds rows 0 to 512. The first number is a checksum of the
run (its settings and images), of the two row numbers and of the file's content. A resumed run takes over only shards
whose checksums match, so that a damaged file or one of another run cannot become part of its output.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from fastres.errors import ResumeError
from fastres.files import read_regular
from fastres.terminal import progress_bar

from .formats import COMPRESSION

ROW_GROUP = 4096  # rows in a row group of the output, so that it does not depend on the shards
_NAME = re.compile(r"rows-([0-9a-f]{16})-(\d{12})-(\d{12})\.parquet")


@dataclass(frozen=True, order=True)
class Shard:
    """A file with the rows from ``start`` to ``stop``, whose name says that it has this ``checksum``."""

    start: int
    stop: int
    path: Path
    checksum: str

    @property
    def rows(self) -> int:
        return self.stop - self.start


def is_shard(name: str) -> bool:
    """Return True if ``name`` is the name of a shard."""
    return _NAME.fullmatch(name) is not None


def named_shards(folder: Path) -> list[Shard]:
    """Return the shards in ``folder`` by their names, in the order of their rows; their content is not checked."""
    found = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    return sorted(Shard(int(match[2]), int(match[3]), path, match[1]) for match, path in found if match)


def packed(batches: Sequence[pa.RecordBatch], run: str, start: int) -> tuple[str, bytes]:
    """Return name and content of the shard with ``batches``, the rows from ``start`` on, of the run ``run``."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_batches(batches), buffer, compression=COMPRESSION)
    content, stop = buffer.getvalue(), start + sum(batch.num_rows for batch in batches)
    return f"rows-{_checksum(run, start, stop, content)}-{start:012}-{stop:012}.parquet", content


def _checksum(run: str, start: int, stop: int, content: bytes) -> str:
    digest = hashlib.sha256(f"{run} {start} {stop} ".encode())
    digest.update(content)
    return digest.hexdigest()[:16]


def read(shard: Shard, run: str) -> pa.Table:
    """Return the rows of a shard of the run ``run``. Raises ``ResumeError`` if the checksum does not match."""
    try:
        content = read_regular(shard.path)
    except OSError as error:
        raise ResumeError(f"{str(shard.path)!r} cannot be read: {error.strerror}") from error
    if _checksum(run, shard.start, shard.stop, content) != shard.checksum:
        raise ResumeError(f"{str(shard.path)!r} is damaged, or belongs to another run")
    return pq.read_table(io.BytesIO(content))


@dataclass(frozen=True)
class Kept:
    """The shards in a folder: those that match the run, those that do not, and how many rows have errors."""

    good: list[Shard]
    bad: list[Shard]
    errors: int


def gaps(shards: Sequence[Shard], count: int) -> list[range]:
    """Return the rows from 0 to ``count`` that are in none of ``shards``, as ranges."""
    stops, starts = [0, *(shard.stop for shard in shards)], [*(shard.start for shard in shards), count]
    return [range(stop, start) for stop, start in zip(stops, starts, strict=True) if stop < start]


def check(folder: Path, run: str, count: int, progress: bool) -> Kept:
    """Read every shard in ``folder``, and compare its checksum with its name. ``count`` is the run's number of rows."""
    good: list[Shard] = []
    bad: list[Shard] = []
    errors = 0
    shards = named_shards(folder)
    for shard in progress_bar(shards, desc="Checking finished rows", unit="shard", delay=1.0, disable=not progress):
        try:
            column = read(shard, run)["error"]
        except ResumeError:
            bad.append(shard)
            continue
        if shard.start < (good[-1].stop if good else 0) or shard.stop > count:
            bad.append(shard)
            continue
        good.append(shard)
        errors += len(column) - column.null_count
    return Kept(good, bad, errors)


def merged(shards: Iterable[Shard], run: str) -> Iterator[pa.Table]:
    """Yield the rows of ``shards`` as tables of ``ROW_GROUP`` rows; the last may be smaller."""
    waiting: list[pa.Table] = []
    for shard in shards:
        waiting.append(read(shard, run))
        if sum(table.num_rows for table in waiting) >= ROW_GROUP:
            joined = pa.concat_tables(waiting)
            whole = joined.num_rows - joined.num_rows % ROW_GROUP
            yield from (joined.slice(start, ROW_GROUP) for start in range(0, whole, ROW_GROUP))
            waiting = [joined.slice(whole)]
    if rest := sum(table.num_rows for table in waiting):
        yield pa.concat_tables(waiting).slice(0, rest)
