"""Read images from Parquet files: from a binary column, or a struct with a field ``bytes`` (Hugging Face's format)."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fastres.errors import ImageError, SourceError, near_matches


def parquet_entries(path: str) -> Iterator[dict[str, Any]]:
    """Yield the single entry of a Parquet file, with its number of rows.

    Raises ``SourceError`` if it is not a Parquet file.
    """
    try:
        facts, rows = os.stat(path), pq.read_metadata(path).num_rows
    except (OSError, pa.ArrowException) as error:
        raise SourceError(f"{path!r} cannot be read as a Parquet file: {error}; write the file again") from error
    yield {"path": os.fsencode(path), "size": facts.st_size, "mtime_ns": facts.st_mtime_ns, "rows": rows}


@dataclass(frozen=True)
class ParquetImages:
    """The rows of ``files``, one after another; ``stops[i]`` is the number of rows up to the end of file i."""

    files: tuple[str, ...]
    stops: tuple[int, ...]
    image_column: str
    columns: pa.Schema

    @classmethod
    def of(cls, listing: pa.Table, image_column: str | None, columns: tuple[str, ...]) -> ParquetImages:
        """Return the images of the files in ``listing``; if ``image_column`` is ``None``, find the column.

        Raises ``SourceError`` if the columns of the files differ, a column does not exist, or the image column holds no
        bytes.
        """
        files = tuple(map(os.fsdecode, listing["path"].to_pylist()))
        schema = pq.read_schema(files[0])
        image = image_column or _image_column(files[0], schema)
        for name in (image, *columns):
            if name not in schema.names:
                raise SourceError(f"{files[0]!r} has no column {name!r}.{near_matches(name, schema.names)}")
        if not _holds_bytes(schema.field(image).type):
            raise SourceError(
                f"Column {image!r} of {files[0]!r} has type {schema.field(image).type}; use a column of images, which "
                "is binary, or a struct with a binary field 'bytes'"
            )
        wanted = pa.schema([schema.field(name) for name in (image, *columns)])
        for file in files[1:]:
            other = pq.read_schema(file)
            if not all(field.name in other.names and other.field(field.name).equals(field) for field in wanted):
                raise SourceError(
                    f"{file!r} does not have the same columns as {files[0]!r} ({', '.join(wanted.names)}); classify "
                    "the files in separate runs"
                )
        stops = tuple(accumulate(listing["rows"].to_pylist()))
        return cls(files, stops, image, pa.schema([schema.field(name) for name in columns]))

    @property
    def identity(self) -> pa.Schema:
        return pa.schema([("path", pa.string()), ("row", pa.int64()), *self.columns])

    def __len__(self) -> int:
        return self.stops[-1] if self.stops else 0

    def __getstate__(self) -> dict[str, Any]:
        return {name: vars(self)[name] for name in self.__dataclass_fields__}

    @cached_property
    def _cursor(self) -> _Cursor:
        return _Cursor(list(dict.fromkeys([self.image_column, *self.columns.names])))

    def read(self, start: int, stop: int) -> tuple[pa.RecordBatch, Iterator[str | bytes | ImageError]]:
        parts, images = [], []
        while start < stop:
            index = bisect_right(self.stops, start)
            file, first = self.files[index], self.stops[index - 1] if index else 0
            count = min(stop, self.stops[index]) - start
            try:
                rows = self._cursor.rows(file, start - first, count)
            except (OSError, pa.ArrowException) as error:
                raise SourceError(f"{file!r} cannot be read: {error}; write the file again") from error
            name = file.encode("utf-8", "backslashreplace").decode()
            numbers = pa.array(range(start - first, start - first + count), pa.int64())
            carried = [rows[column].combine_chunks() for column in self.columns.names]
            arrays = [pa.array([name] * count, pa.string()), numbers, *carried]
            parts.append(pa.table(arrays, schema=self.identity))
            images.append(rows[self.image_column])
            start += count
        identity = pa.concat_tables(parts).combine_chunks().to_batches()[0]
        return identity, (_content(value.as_py()) for column in images for value in column)


def _content(value: Any) -> bytes | ImageError:
    data = value.get("bytes") if isinstance(value, dict) else value
    return ImageError("The row holds no image (null).") if data is None else data


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _image_column(file: str, schema: pa.Schema) -> str:
    fitting = [field.name for field in schema if _holds_bytes(field.type)]
    if "image" in fitting or len(fitting) == 1:
        return "image" if "image" in fitting else fitting[0]
    names = ", ".join(fitting or schema.names)
    found = (
        f"several columns are binary ({names}); pass one of them as image_column"
        if fitting
        else f"none of the columns is binary ({names}); use files with a binary column of images"
    )
    raise SourceError(f"The column of images in {file!r} cannot be found: {found}")


class _Cursor:
    """Reader of rows of a Parquet file, fastest in forward order; it streams row groups and never holds a whole one."""

    def __init__(self, columns: list[str]) -> None:
        self._columns = columns
        self._path: str | None = None
        self._file: pq.ParquetFile | None = None
        self._stops: list[int] = []  # rows up to the end of each row group
        self._group = -1
        self._position = 0
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._rest: pa.Table | None = None

    def rows(self, path: str, start: int, count: int) -> pa.Table:
        """Return rows ``start`` to ``start + count`` of ``path``."""
        if path != self._path:
            self._file = pq.ParquetFile(path, memory_map=True, pre_buffer=False)
            facts = self._file.metadata
            self._stops = list(accumulate(facts.row_group(group).num_rows for group in range(facts.num_row_groups)))
            self._path, self._group = path, -1
        parts = []
        while count:
            group = bisect_right(self._stops, start)
            first = self._stops[group - 1] if group else 0
            if group != self._group or start < self._position:
                self._open(group, first, count)
            taken = self._take(start, min(count, self._stops[group] - start))
            parts.append(taken)
            start, count = start + taken.num_rows, count - taken.num_rows
        return pa.concat_tables(parts)

    def _open(self, group: int, first: int, count: int) -> None:
        assert self._file is not None
        self._group, self._position, self._rest = group, first, None
        self._batches = self._file.iter_batches(count, [group], self._columns, use_threads=False)

    def _take(self, start: int, count: int) -> pa.Table:
        """Return at least one and at most ``count`` rows from ``start`` on; drop the rows before them."""
        while True:
            if self._rest is None or not self._rest.num_rows:
                self._rest = pa.Table.from_batches([next(self._batches)])
            skipped = min(start - self._position, self._rest.num_rows)
            self._position, self._rest = self._position + skipped, self._rest.slice(skipped)
            if self._position == start and self._rest.num_rows:
                taken = self._rest.slice(0, count)
                self._position, self._rest = start + taken.num_rows, self._rest.slice(taken.num_rows)
                return taken
