"""Read images from Parquet files: from a column of bytes, or a struct with ``bytes`` (Hugging Face's format)."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain
from typing import Any

import pyarrow as pa

from fastres.errors import ImageError, SourceError, near_matches

from .arrow_rows import identity_schema
from .columns import Columns, Kinds
from .contents import contents, holds_images
from .listing import Entry, Listing
from .parquet_rows import Cursor, OpenParquet
from .remote import shown


def parquet_entries(path: str) -> Iterator[Entry]:
    """Yield the single entry of a Parquet file, with its number of rows.

    Raises ``SourceError`` if it is not a Parquet file.
    """
    file = OpenParquet(path)
    rows = file.stops[-1] if file.stops else 0
    yield {"path": os.fsencode(path), "size": file.size, "mtime_ns": file.mtime_ns, "rows": rows}


@dataclass(frozen=True)
class ParquetImages:
    """The rows of Parquet files, one after another; ``stops[i]`` is the number of rows up to the end of file i.

    An entry with an error, a folder that could not be listed, is one row with this error.
    """

    entries: tuple[Entry, ...]
    stops: tuple[int, ...]
    image_column: str
    columns: pa.Schema

    @classmethod
    def of(cls, listing: Listing, image_column: str | None, columns: tuple[str, ...]) -> ParquetImages:
        """Return the images of the files in ``listing``; if ``image_column`` is ``None``, find the column.

        Raises ``SourceError`` if the columns of the files differ, a column does not exist, or the image column holds no
        bytes.
        """
        entries = tuple(listing.entries())
        files = [os.fsdecode(entry["path"]) for entry in entries if entry["error"] is None]
        stops = tuple(accumulate(entry["rows"] for entry in entries))
        if not files:
            return cls(entries, stops, "", pa.schema([]))
        first = OpenParquet(files[0])
        image = image_column or _image_column(first)
        for name in (image, *columns):
            if name not in first.names:
                raise SourceError(f"{_text(first)} has no column {name!r}.{near_matches(name, first.names)}")
        wanted = first.fields([image, *columns])
        if not holds_images(wanted[0].type):
            raise SourceError(
                f"Column {image!r} of {_text(first)} has type {wanted[0].type}; use a column of images, which is "
                "binary, or a struct with a binary field 'bytes'"
            )
        for path in files[1:]:
            other = OpenParquet(path)
            names = [field.name for field in wanted]
            if not set(names) <= set(other.names) or other.fields(names) != wanted:
                raise SourceError(
                    f"{_text(other)} does not have the same columns as {_text(first)} ({', '.join(names)}); classify "
                    "the files in separate runs"
                )
        return cls(entries, stops, image, pa.schema([_nullable(field) for field in wanted[1:]]))

    @property
    def identity(self) -> Kinds:
        return ("path", str), ("row", int), *((field.name, field) for field in self.columns)

    def __len__(self) -> int:
        return self.stops[-1] if self.stops else 0

    def __getstate__(self) -> dict[str, Any]:
        return {name: vars(self)[name] for name in self.__dataclass_fields__}

    @cached_property
    def _cursors(self) -> dict[int, Cursor]:
        return {}

    @property
    def _cursor(self) -> Cursor:
        """The cursor of this process; the one of the process that it was forked from must not be used."""
        columns = list(dict.fromkeys([self.image_column, *self.columns.names]))
        return self._cursors.setdefault(os.getpid(), Cursor(columns))

    def read(self, start: int, stop: int) -> tuple[Columns, Iterator[str | bytes | ImageError]]:
        parts: list[pa.Table] = []
        images: list[pa.Array | list[ImageError]] = []
        while start < stop:
            index = bisect_right(self.stops, start)
            entry, first = self.entries[index], self.stops[index - 1] if index else 0
            count = min(stop, self.stops[index]) - start
            row = None if entry["error"] else start - first
            for part in self._parts(entry, start - first, count):
                if isinstance(part, pa.RecordBatch):
                    carried, size = [part.column(name) for name in self.columns.names], part.num_rows
                    images.append(part.column(self.image_column))
                else:
                    size, error = part
                    carried = [pa.nulls(size, field.type) for field in self.columns]
                    images.append([ImageError(error)] * size)
                parts.append(self._identified(entry, row, size, carried))
                row = None if row is None else row + size
            start += count
        joined = pa.concat_tables(parts).combine_chunks().to_batches()[0]
        copied = {name: joined.column(name) for name in self.columns.names}
        identity: Columns = {name: joined.column(name).to_pylist() for name in ("path", "row")} | copied
        return identity, chain.from_iterable(part if isinstance(part, list) else contents(part) for part in images)

    def _parts(self, entry: Entry, start: int, count: int) -> Iterator[pa.RecordBatch | tuple[int, str]]:
        if entry["error"] is not None:
            yield count, entry["error"]
            return
        path = os.fsdecode(entry["path"])
        self._cursor.open(path).check_unchanged(entry["size"], entry["mtime_ns"])
        for part in self._cursor.rows(path, start, count):
            self._cursor.open(path).check_unchanged(entry["size"], entry["mtime_ns"])
            yield part

    def _identified(self, entry: Entry, row: int | None, size: int, carried: list[pa.Array]) -> pa.Table:
        numbers = pa.nulls(size, pa.int64()) if row is None else pa.array(range(row, row + size), pa.int64())
        cast = [
            array if array.type == field.type else array.cast(field.type)
            for array, field in zip(carried, self.columns, strict=True)
        ]
        return pa.table(
            [pa.array([shown(entry["path"])] * size, pa.string()), numbers, *cast],
            schema=identity_schema(self.identity),
        )


def _text(file: OpenParquet) -> str:
    return repr(shown(file.path))


def _nullable(field: pa.Field) -> pa.Field:
    """Return ``field`` so that it can be null, as in the row of a damaged image."""
    kind = field.type
    if pa.types.is_struct(kind):
        kind = pa.struct([_nullable(inner) for inner in kind])
    return field.with_type(kind).with_nullable(True)


def _image_column(file: OpenParquet) -> str:
    fitting = [field.name for field in file.schema if holds_images(field.type)]
    if "image" in fitting or len(fitting) == 1:
        return "image" if "image" in fitting else fitting[0]
    names = ", ".join(fitting or file.names)
    found = (
        f"several columns are binary ({names}); pass one of them as image_column"
        if fitting
        else f"none of the columns is binary ({names}); use files with a binary column of images"
    )
    raise SourceError(f"The column of images in {_text(file)} cannot be found: {found}")
