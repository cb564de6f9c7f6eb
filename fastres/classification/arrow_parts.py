"""The parts of a Parquet output: Arrow rows as Parquet files."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from .formats import COMPRESSION


def packed(batches: Sequence[pa.RecordBatch]) -> bytes:
    """Return rows as the content of a file."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_batches(batches), buffer, compression=COMPRESSION)
    return buffer.getvalue()


def unpacked(content: bytes) -> pa.Table:
    """Return the rows that :func:`packed` has written."""
    # pq.read_table starts threads that are at work after it. If the program then ended, they could abort it.
    return pq.ParquetFile(io.BytesIO(content)).read(use_threads=False)


def failed(table: pa.Table) -> list[int]:
    """Return the places of the rows that have an error."""
    column = table["error"]
    if column.null_count == len(column):
        return []
    return [place for place, error in enumerate(column.to_pylist()) if error is not None]


def regrouped(tables: Iterable[pa.Table], size: int) -> Iterator[pa.Table]:
    """Yield the rows as tables of ``size`` rows; the last may be smaller.

    Each column is in one piece: where pieces end shows in the bytes of a Parquet file.
    """
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        if sum(table.num_rows for table in waiting) >= size:
            joined = pa.concat_tables(waiting)
            whole = joined.num_rows - joined.num_rows % size
            yield from (joined.slice(start, size).combine_chunks() for start in range(0, whole, size))
            waiting = [joined.slice(whole)]
    if rest := sum(table.num_rows for table in waiting):
        yield pa.concat_tables(waiting).slice(0, rest).combine_chunks()
