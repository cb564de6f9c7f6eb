"""The list of a source's images: an Arrow file in the work folder, written once in a fixed order.

Worker processes map the file into memory, so that a hundred million images take disk space, not memory. Its sha256
shows if a resumed run has the same images.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from fastres.terminal import progress_bar

Entry = dict[str, Any]
CHUNK = 8192
FILES, TAR, PARQUET = "files", "tar", "parquet"

_FILE = [("path", pa.binary()), ("size", pa.int64()), ("mtime_ns", pa.int64())]
SCHEMAS = {
    FILES: pa.schema(_FILE),
    TAR: pa.schema([*_FILE, ("key", pa.string()), ("offset", pa.int64()), ("length", pa.int64())]),
    PARQUET: pa.schema([*_FILE, ("rows", pa.int64())]),
}


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


def read_listing(path: Path) -> pa.Table:
    """Return the list as a table; its columns are memory-mapped from the file."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def difference(before: Path, after: Path) -> str:
    """Describe the first difference between two lists in words."""
    tables = [read_listing(path) for path in (before, after)]
    rows = [(row for batch in table.to_batches() for row in batch.to_pylist()) for table in tables]
    counts = f"{tables[0].num_rows:,} entries then, {tables[1].num_rows:,} now"
    for old, new in zip_longest(*rows):
        if old != new:
            return f"{counts}; the first difference: {_named(old)} then, {_named(new)} now"
    return counts


def _named(entry: Entry | None) -> str:
    if entry is None:
        return "nothing"
    facts = ", ".join(f"{name} {value}" for name, value in entry.items() if name != "path")
    return f"{os.fsdecode(entry['path'])!r} ({facts})"
